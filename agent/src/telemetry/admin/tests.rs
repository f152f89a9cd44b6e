use std::{net::SocketAddr, time::Duration};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    task::JoinSet,
    time::timeout,
};

use super::*;
use crate::telemetry::http::{HEADER_TIMEOUT, MAX_CONNECTIONS};

const DEADLINE: Duration = Duration::from_secs(5);

struct Endpoint {
    address: SocketAddr,
    readiness: Readiness,
    /// Ends the server when dropped.
    _server: JoinSet<io::Result<Infallible>>,
}

impl Endpoint {
    fn start() -> Self {
        let listener = StdListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let readiness = Readiness::default();
        let mut server = JoinSet::new();
        let admin = Admin::new(Arc::new(Metrics::new()), readiness.clone());
        server.spawn(async move { admin.serve(vec![listener]).await });
        Self {
            address,
            readiness,
            _server: server,
        }
    }

    /// Status line and headers, then body.
    async fn request(&self, method: &str, path: &str) -> (String, String) {
        let exchange = async {
            let mut stream = TcpStream::connect(self.address).await.unwrap();
            let request = format!("{method} {path} HTTP/1.1\r\nhost: node\r\n\r\n");
            stream.write_all(request.as_bytes()).await.unwrap();
            let mut response = String::new();
            stream.read_to_string(&mut response).await.unwrap();
            response
        };
        let response = timeout(DEADLINE, exchange).await.unwrap();
        let (head, body) = response.split_once("\r\n\r\n").unwrap();
        (head.to_owned(), body.to_owned())
    }
}

#[tokio::test]
async fn metrics_come_in_prometheus_text_format() {
    let (head, body) = Endpoint::start().request("GET", "/metrics").await;
    assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{head}");
    assert!(head.contains("text/plain; version=0.0.4"), "{head}");
    assert!(body.contains("\nmalla_pods_enrolled 0\n"), "{body}");
}

#[tokio::test]
async fn an_unready_agent_says_what_it_waits_for_and_is_alive() {
    let endpoint = Endpoint::start();
    let discovery = endpoint.readiness.register("discovery");
    let _identity = {
        let identity = endpoint.readiness.register("identity");
        let (head, body) = endpoint.request("GET", "/ready").await;
        assert!(head.starts_with("HTTP/1.1 503 "), "{head}");
        assert_eq!(body, "discovery\nidentity\n");
        identity.done();
        identity
    };
    discovery.done();
    let (head, body) = endpoint.request("GET", "/ready").await;
    assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
    assert_eq!(body, "ready\n");
    discovery.undo();
    let (head, _) = endpoint.request("GET", "/ready").await;
    assert!(head.starts_with("HTTP/1.1 503 "), "{head}");
    let (head, _) = endpoint.request("GET", "/live").await;
    assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
}

#[tokio::test]
async fn nothing_else_is_there_and_nothing_can_be_changed() {
    let endpoint = Endpoint::start();
    for path in ["/", "/config", "/metrics/", "/readyz"] {
        let (head, _) = endpoint.request("GET", path).await;
        assert!(head.starts_with("HTTP/1.1 404 "), "{path}: {head}");
    }
    for method in ["POST", "PUT", "DELETE"] {
        let (head, _) = endpoint.request(method, "/metrics").await;
        assert!(head.starts_with("HTTP/1.1 405 "), "{method}: {head}");
        assert!(head.contains("allow: GET"), "{method}: {head}");
    }
}

#[tokio::test]
async fn slow_clients_keep_nobody_else_from_an_answer() {
    let endpoint = Endpoint::start();
    let mut slow = Vec::new();
    for _ in 0..2 * MAX_CONNECTIONS {
        let mut client = TcpStream::connect(endpoint.address).await.unwrap();
        client.write_all(b"GET /live HTTP/1.1\r\n").await.unwrap();
        slow.push(client);
    }
    let (head, _) = endpoint.request("GET", "/live").await;
    assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
    let mut byte = [0];
    let oldest = timeout(DEADLINE, slow[0].read(&mut byte)).await.unwrap();
    assert!(matches!(oldest, Ok(0) | Err(_)), "the oldest made room");
}

#[tokio::test(start_paused = true)]
async fn headers_that_do_not_come_end_the_connection() {
    let endpoint = Endpoint::start();
    let mut client = TcpStream::connect(endpoint.address).await.unwrap();
    client.write_all(b"GET /live HTTP/1.1\r\n").await.unwrap();
    let mut rest = Vec::new();
    let ended = timeout(2 * HEADER_TIMEOUT, client.read_to_end(&mut rest)).await;
    assert!(ended.is_ok(), "still open after twice the time-out");
}
