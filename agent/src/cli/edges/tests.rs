use super::*;

/// Labels of a leg of a connection to port 8080.
fn labels(direction: &str, peer: &str, pods: [&str; 2], more: &str) -> String {
    let [src, dst] = pods;
    let own = if direction == "outbound" { src } else { dst };
    format!(
        "direction=\"{direction}\",peer=\"{peer}\",src_pod=\"{src}\",dst_pod=\"{dst}\",\
         src_namespace=\"shop\",dst_namespace=\"shop\",namespace=\"shop\",\
         serviceaccount=\"{own}-account\",target_port=\"8080\",{more}"
    )
}

fn sample(family: &str, labels: &str, value: u64) -> String {
    format!("{family}{{{labels}}} {value}\n")
}

const LOOPBACK: &str = "tls=\"no_identity\",no_tls_reason=\"loopback\"";
const PLAIN: &str = "tls=\"no_identity\",no_tls_reason=\"no_tls_from_remote\"";

#[test]
fn a_secured_edge_has_both_identities_and_a_failed_one_its_reason() {
    let to = "tls=\"true\",server_id=\"spiffe://cluster.local/ns/shop/sa/db\"";
    let pods = ["web", "db-1"];
    let src = labels("outbound", "src", pods, LOOPBACK);
    let dst = labels("outbound", "dst", pods, to);
    let close = |labels: &str, reason: &str, value| {
        sample(
            "tcp_close_total",
            &format!("{labels},reason=\"{reason}\""),
            value,
        )
    };
    let scrape = [
        sample("tcp_open_total", &src, 10),
        sample("tcp_open_connections", &src, 1),
        close(&src, "", 5),
        close(&src, "connect_refused", 3),
        close(&src, "client_reset", 1),
        sample("tcp_open_total", &dst, 7),
        sample("tcp_open_connections", &dst, 1),
        close(&dst, "", 5),
        close(&dst, "client_reset", 1),
    ];
    let edges = edges(&Metrics::parse(&scrape.concat()));
    assert_eq!(
        table(&edges, true, Style::PLAIN),
        "SRC   DST    SRC_NS   DST_NS   CLIENT_ID          SERVER_ID   SECURED\n\
         web   db-1   shop     shop     -                  -           connect_refused\n\
         web   db-1   shop     shop     web-account.shop   db.shop     √\n"
    );
    let json = serde_json::Value::from(json(&edges));
    assert_eq!(json[0]["opened"], 3);
    assert_eq!(json[0]["secured"], false);
    assert_eq!(json[1]["opened"], 7);
    assert_eq!(json[1]["open"], 1);
    assert_eq!(
        json[1]["clientId"],
        "spiffe://cluster.local/ns/shop/sa/web-account"
    );
}

#[test]
fn a_plaintext_client_that_was_refused_is_no_plaintext_edge() {
    let src = labels("inbound", "src", ["stranger", "db-1"], PLAIN);
    let close = format!("{src},reason=\"plaintext_refused\"");
    let scrape = sample("tcp_open_total", &src, 4) + &sample("tcp_close_total", &close, 4);
    let edges = edges(&Metrics::parse(&scrape));
    assert_eq!(
        table(&edges, false, Style::PLAIN),
        "SRC        DST    SRC_NS   DST_NS   SECURED\n\
         stranger   db-1   shop     shop     plaintext_refused\n"
    );
}

#[test]
fn two_pods_of_one_node_are_told_of_once() {
    let to = "tls=\"true\",server_id=\"spiffe://cluster.local/ns/shop/sa/db\"";
    let from = "tls=\"true\",client_id=\"spiffe://cluster.local/ns/shop/sa/web\"";
    let pods = ["web", "db-1"];
    let scrape = [
        sample(
            "tcp_open_total",
            &labels("outbound", "src", pods, LOOPBACK),
            2,
        ),
        sample("tcp_open_total", &labels("outbound", "dst", pods, to), 2),
        sample("tcp_open_total", &labels("inbound", "src", pods, from), 2),
        sample(
            "tcp_open_total",
            &labels("inbound", "dst", pods, LOOPBACK),
            2,
        ),
    ];
    let edges = edges(&Metrics::parse(&scrape.concat()));
    let counts = Counts { opened: 2, open: 0 };
    assert_eq!(edges.into_values().collect::<Vec<_>>(), [counts]);
}

#[test]
fn what_went_on_to_another_endpoint_came_to_nothing_at_the_first() {
    let pods = ["web", "db-1"];
    let retried = labels("outbound", "dst", pods, "reason=\"peer_refused\"");
    let outbound = sample("malla_outbound_tcp_retries_total", &retried, 3);
    let from = "tls=\"true\",client_id=\"spiffe://cluster.local/ns/shop/sa/web\"";
    let src = labels("inbound", "src", pods, from);
    let close = format!("{src},reason=\"connect_refused\"");
    let inbound = sample("tcp_open_total", &src, 3) + &sample("tcp_close_total", &close, 3);
    for (scrape, reason) in [(outbound, "peer_refused"), (inbound, "connect_refused")] {
        let edges = edges(&Metrics::parse(&scrape));
        let [(edge, counts)] = &edges.iter().collect::<Vec<_>>()[..] else {
            panic!("{edges:?}");
        };
        assert_eq!(edge.reason.as_deref(), Some(reason));
        assert_eq!(**counts, Counts { opened: 3, open: 0 });
    }
}
