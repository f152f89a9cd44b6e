use super::*;

fn line(descriptor: RawFd, pod: u32, kind: Kind) -> Line {
    Line {
        descriptor,
        kind,
        pod,
        serial: 1,
    }
}

fn socket(number: RawFd, inode: u32) -> Descriptor {
    let target = Target::Socket(inode);
    Descriptor { number, target }
}

fn in_kernel(inode: u32, listens: bool) -> KernelSocket {
    let pair = inode.into();
    KernelSocket {
        inode,
        listens,
        pair,
    }
}

fn told(account: &Account) -> Vec<(&str, &str, Option<u32>, RawFd)> {
    let differences = account.differences.iter();
    let mut told: Vec<_> = differences
        .map(|d| (d.kind.as_str(), d.what.as_str(), d.pod, d.descriptor))
        .collect();
    told.sort_unstable();
    told
}

#[test]
fn at_rest_both_are_equal() {
    let pods = PodSockets::from([(
        1,
        Some(vec![
            in_kernel(100, true),
            in_kernel(101, false),
            // The app's own.
            in_kernel(900, false),
        ]),
    )]);
    let lines = [
        line(3, 1, Kind::Listener),
        line(4, 0, Kind::ListenerCopy),
        line(5, 1, Kind::AppOutbound),
    ];
    let start = Descriptor {
        number: 0,
        target: Target::Other("/dev/null".to_owned()),
    };
    let open = [
        start.clone(),
        socket(3, 100),
        socket(4, 100),
        socket(5, 101),
    ];
    let account = compare(&lines, &open, &HashSet::from([start]), &pods);
    assert_eq!(told(&account), []);
    let pod = &account.pods[&1];
    assert_eq!((pod.listeners(), pod.connections()), (1, 1));
    let kernel = KernelAccount {
        listeners: 1,
        connections: 1,
        closed: 0,
    };
    assert_eq!(pod.kernel, Some(kernel));
    assert_eq!(account.from_start["file"], 1);
    assert_eq!((account.open, account.entered.values().sum()), (4, 3));
}

#[test]
fn what_nobody_entered_is_told_by_what_the_kernel_knows_of_it() {
    let pods = PodSockets::from([
        (1, Some(vec![in_kernel(100, true), in_kernel(101, false)])),
        (2, None),
    ]);
    let file = Descriptor {
        number: 9,
        target: Target::Other("/etc/hosts".to_owned()),
    };
    let open = [socket(3, 100), socket(4, 101), socket(5, 102), file];
    let account = compare(&[], &open, &HashSet::new(), &pods);
    assert_eq!(
        told(&account),
        [
            ("unaccounted", "connection", Some(1), 4),
            ("unaccounted", "file", None, 9),
            ("unaccounted", "listener", Some(1), 3),
            ("unaccounted", "socket", None, 5),
        ]
    );
    let inodes: Vec<_> = account.differences.iter().map(|d| d.inode).collect();
    assert_eq!(inodes, [Some(100), Some(101), None, None]);
}

#[test]
fn an_entry_without_a_descriptor_and_one_of_a_pod_that_is_gone_are_told() {
    let lines = [
        line(3, 1, Kind::AppInbound),
        line(4, 7, Kind::TunnelInbound),
    ];
    let pods = PodSockets::from([(1, None)]);
    let account = compare(&lines, &[socket(4, 100)], &HashSet::new(), &pods);
    assert_eq!(
        told(&account),
        [
            ("missing", "app_inbound", Some(1), 3),
            ("orphaned", "tunnel_inbound", Some(7), 4),
        ]
    );
}

#[test]
fn a_socket_that_is_over_for_the_kernel_and_still_open_counts_as_closed() {
    let pods = PodSockets::from([(1, Some(vec![in_kernel(100, false)]))]);
    let lines = [line(3, 1, Kind::AppInbound), line(4, 1, Kind::AppInbound)];
    let open = [socket(3, 100), socket(4, 101)];
    let account = compare(&lines, &open, &HashSet::new(), &pods);
    assert_eq!(told(&account), []);
    let kernel = account.pods[&1].kernel.unwrap();
    assert_eq!((kernel.connections, kernel.closed), (1, 1));
}

#[test]
fn legs_to_apps_whose_other_end_nobody_holds_are_alone() {
    let end = |inode, pair| KernelSocket {
        pair,
        ..in_kernel(inode, false)
    };
    let sockets = [end(100, 1), end(900, 1), end(101, 2), end(102, 3)];
    let pods = PodSockets::from([(1, Some(sockets.to_vec())), (2, None)]);
    let lines = [
        line(3, 1, Kind::AppOutbound),
        line(4, 1, Kind::AppInbound),
        line(5, 1, Kind::TunnelOutbound),
        // Of a pod that wasn't asked, and one that is closed.
        line(6, 2, Kind::AppInbound),
        line(7, 1, Kind::AppInbound),
    ];
    let open = [(3, 100), (4, 101), (5, 102), (6, 103), (7, 104)];
    let open = open.map(|(number, inode)| socket(number, inode));
    let account = compare(&lines, &open, &HashSet::new(), &pods);
    assert_eq!(account.alone, [4]);
    assert_eq!(account.pods[&1].kernel.unwrap().closed, 1);
}
