//! What is counted of what the kernel moves, and what cuts it.

use std::{
    io::{ErrorKind, Read, Write},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use malla_testbed::{eventually, payload};

use super::pods::{MESSAGE, OneNode, SAID, converse, is_reset};

/// Within which a rule of the network's is honoured, and what a busy machine adds.
const HONOURED: Duration = Duration::from_secs(30 + 5);

#[test]
fn counters_move_while_a_joined_connection_lives() {
    let one = OneNode::new("");
    let (client, server, _) = one.joined();
    // With connections that weren't joined.
    thread::sleep(Duration::from_secs(3));
    let [mut said, _] = one.counted("outbound");
    assert!(said.is_multiple_of(SAID), "{said}");
    for turns in [100, 1, 20] {
        one.without_the_agent(|| converse(&client, &server, turns));
        said += usize::try_from(turns).unwrap() * MESSAGE;
        let began = Instant::now();
        eventually("counters to be exact", Duration::from_secs(10), || {
            let counted = ["outbound", "inbound"].map(|direction| one.counted(direction));
            counted == [[said; 2]; 2]
        })
        .unwrap();
        println!("counted after {:?}", began.elapsed());
    }
}

#[test]
fn a_killed_agents_joined_connections_are_reset_at_both_ends() {
    let mut one = OneNode::new("");
    let rest = one.joined();
    let moving = one.joined();
    let told = thread::scope(|scope| {
        let speaks = scope.spawn(|| {
            let (client, server, _) = &moving;
            for turn in 0.. {
                let sent = payload::send(client, turn, MESSAGE);
                if sent
                    .and_then(|()| payload::receive(server, turn, MESSAGE))
                    .is_err()
                {
                    break;
                }
            }
            for mut end in [client, server] {
                let error = end.write(&[1]).unwrap_err().kind();
                let is_end = matches!(error, ErrorKind::ConnectionReset | ErrorKind::BrokenPipe);
                assert!(is_end, "{error:?}");
            }
        });
        thread::sleep(Duration::from_millis(300));
        assert!(!speaks.is_finished());
        one.agent().kill9();
        is_reset(&rest.0);
        is_reset(&rest.1);
        speaks.join()
    });
    told.unwrap();
    let node = Arc::clone(&one.node);
    drop(one.bed.start_agent(&node).unwrap());
    one.wait_for_both();
    let (client, server, _) = one.joined();
    converse(&client, &server, 10);
}

/// An agent that drains has let go of what tells of its connections' ends.
#[test]
fn what_a_killed_old_agent_had_joined_goes_on_in_no_way() {
    let mut one = OneNode::new("");
    let (client, server, _) = one.joined();
    let node = Arc::clone(&one.node);
    let old = one.bed.upgrade_agent(&node).unwrap();
    one.without_the_agent(|| converse(&client, &server, 20));
    old.kill9();
    // Once it was told, the kernel's own look at a socket sees nothing amiss any more.
    is_reset(&client);
    is_reset(&server);
    for (from, to) in [(&client, &server), (&server, &client)] {
        let error = { from }.write(&[1]).unwrap_err().kind();
        assert_eq!(error, ErrorKind::BrokenPipe);
        let heard = { to }.read(&mut [0]);
        assert!(!matches!(heard, Ok(1..)), "{heard:?}");
    }
}

#[test]
fn the_idle_time_out_counts_what_is_joined() {
    let one = OneNode::new("idleTimeout: 3s");
    let (client, server, said) = one.joined();
    let began = Instant::now();
    let mut turns = 0;
    while began.elapsed() < Duration::from_secs(8) {
        converse(&client, &server, 1);
        turns += 1;
        thread::sleep(Duration::from_millis(700));
    }
    let rests = Instant::now();
    is_reset(&client);
    is_reset(&server);
    let rested = rests.elapsed();
    println!("cut after {rested:?}");
    assert!((1.5..7.0).contains(&rested.as_secs_f64()), "{rested:?}");
    let all = said + turns * MESSAGE;
    one.wait_for_lines(all, all, Some("idle_timeout"));
    one.nothing_is_left();
}

#[test]
fn a_withdrawn_pods_joined_connections_are_reset_and_counted() {
    let mut one = OneNode::new("");
    let (client, server, said) = one.joined();
    converse(&client, &server, 33);
    let pod = Arc::clone(&one.server);
    one.bed.remove_pod(&pod).unwrap();
    is_reset(&client);
    let all = said + 33 * MESSAGE;
    one.wait_for_lines(all, all, Some("withdrawn"));
    one.nothing_is_left();
    drop(server);
}

#[test]
fn a_pair_that_the_network_refuses_loses_its_joined_connections() {
    let one = OneNode::new("");
    let (client, server, said) = one.joined();
    converse(&client, &server, 5);
    let (from, to) = (one.client.v4(), one.server.v4());
    let table = format!(
        "table bridge cni {{ chain forward {{ type filter hook forward priority 0\n\
         ip saddr {from} ip daddr {to} drop\n}}\n}}\n"
    );
    let nft = one.node.command(["nft", "-f", "-"]);
    nft.input(table).run().unwrap();
    let began = Instant::now();
    // The pair's next witness tells of it, and the connection speaks until then.
    let mut turns = 5;
    while began.elapsed() < HONOURED
        && payload::send(&client, 1, MESSAGE).is_ok()
        && payload::receive(&server, 1, MESSAGE).is_ok()
    {
        turns += 1;
        thread::sleep(Duration::from_millis(50));
    }
    assert!(began.elapsed() < HONOURED);
    println!("cut after {:?}", began.elapsed());
    one.nothing_is_left();
    let from_client = said + turns * MESSAGE;
    one.wait_for_lines(from_client, said + 5 * MESSAGE, Some("network_policy"));
}
