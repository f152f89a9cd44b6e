//! Renewals while handshakes go on.

use std::time::Instant;

use rustls::pki_types::ServerName;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::watch,
    task::JoinSet,
    time::sleep,
};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use super::*;

const WORKLOADS: usize = 50;
const RENEWALS: u64 = 1_000;
/// Renewed after some 2 s. A certificate's end is a whole second, so up to one of these is lost.
const LIFETIME: Duration = Duration::from_secs(3);
/// Each workload calls another this often.
const PAUSE: Duration = Duration::from_millis(300);

fn name(number: usize) -> SpiffeId {
    identity(&format!("workload-{}", number % WORKLOADS))
}

async fn serve(certificates: Arc<Certificates>, own: SpiffeId, listener: TcpListener) {
    loop {
        let (stream, _) = listener.accept().await.unwrap();
        let config = certificates.server_config(&own).unwrap();
        // A handshake that fails is the client's to tell.
        if let Ok(mut tls) = TlsAcceptor::from(config).accept(stream).await
            && let Ok(byte) = tls.read_u8().await
        {
            let _ = tls.write_u8(byte).await;
        }
    }
}

/// A handshake of both ends, and a byte there and back: only that shows the server's verdict.
async fn call(
    certificates: &Certificates,
    own: &SpiffeId,
    other: &SpiffeId,
    port: u16,
) -> std::io::Result<()> {
    let config = certificates.client_config(own, other);
    let config = config.map_err(std::io::Error::other)?;
    let stream = TcpStream::connect(("127.0.0.1", port)).await?;
    let name = ServerName::from(std::net::IpAddr::from([127, 0, 0, 1]));
    let mut tls = TlsConnector::from(config).connect(name, stream).await?;
    tls.write_u8(7).await?;
    tls.read_u8().await.map(|_| ())
}

/// Calls on a thread of their own, as workers have: `count` is raised with each. Ends when one
/// fails, or all receivers of `ends` are told to.
fn work(certificates: &Arc<Certificates>, count: &Arc<AtomicU64>, mut ends: watch::Receiver<bool>) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let mut tasks = JoinSet::new();
        for number in 0..WORKLOADS {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let port = listener.local_addr().unwrap().port();
            tasks.spawn(serve(Arc::clone(certificates), name(number), listener));
            let (certificates, count) = (Arc::clone(certificates), Arc::clone(count));
            let (own, other) = (name(number + 1), name(number));
            tasks.spawn(async move {
                loop {
                    call(&certificates, &own, &other, port).await.unwrap();
                    count.fetch_add(1, Ordering::Relaxed);
                    sleep(PAUSE).await;
                }
            });
        }
        tokio::select! {
            failed = tasks.join_next() => failed.unwrap().unwrap(),
            ended = ends.wait_for(|ends| *ends) => drop(ended.unwrap()),
        }
    });
}

#[tokio::test]
async fn a_thousand_renewals_of_fifty_workloads_fail_no_handshake() {
    let Fixture {
        certificates,
        scratch: _scratch,
        ..
    } = Fixture::new(LIFETIME);
    let certificates = Arc::new(certificates);
    for number in 0..WORKLOADS {
        certificates.ensure(&name(number)).unwrap();
    }
    for number in 0..WORKLOADS {
        certificates.ready(&name(number)).await.unwrap();
    }
    let count = Arc::new(AtomicU64::new(0));
    let end = watch::Sender::new(false);
    let worker = {
        let (certificates, count) = (Arc::clone(&certificates), Arc::clone(&count));
        let ends = end.subscribe();
        std::thread::spawn(move || work(&certificates, &count, ends))
    };

    let (began, first) = (Instant::now(), certificates.refreshes().ok);
    while certificates.refreshes().ok < first + RENEWALS && !worker.is_finished() {
        assert!(began.elapsed() < Duration::from_mins(1));
        sleep(PAUSE).await;
    }

    end.send_replace(true);
    worker.join().unwrap();
    assert_eq!(certificates.refreshes().failed, 0);
    let count = count.load(Ordering::Relaxed);
    assert!(count > RENEWALS, "{count} handshakes only");
    println!("{count} handshakes in {:?}", began.elapsed());
}
