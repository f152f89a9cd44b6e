//! Programs that people run, over connections that malla carries.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail like the tests")]

use std::{
    fs,
    io::{ErrorKind, Read, Write},
    os::unix::fs::{PermissionsExt, chown},
    path::PathBuf,
    thread,
    time::{Duration, Instant},
};

use malla_testbed::{
    PATIENCE, Pair, Process, SERVICE_PORT, Way, accept, listen, on_each_way, payload,
};
use nix::unistd::User;

const PORT: u16 = SERVICE_PORT;

on_each_way!(
    [Mesh, RandomPorts, LossyWire, ToService, ToUnmeshed, FromUnmeshed]
    curl_gets_each_page_of_nginx_whole_and_on_one_connection,
    iperf3_runs_both_ways_with_several_streams,
    psql_reads_what_it_wrote_to_postgresql,
    redis_cli_reads_what_it_wrote_to_redis,
    ssh_keyscan_gets_the_key_of_sshd,
    a_server_that_speaks_first_is_heard_before_its_client_speaks,
);

fn curl_gets_each_page_of_nginx_whole_and_on_one_connection(pair: &Pair) {
    const SIZES: [usize; 9] = [0, 1, 100, 1_024, 16_383, 65_535, 65_537, 1 << 20, 12 << 20];
    let folder = new_folder(pair, "nginx");
    for size in SIZES {
        let mut page = fs::File::create(folder.join(size.to_string())).unwrap();
        payload::send(&mut page, 7, size).unwrap();
    }
    let _nginx = start_nginx(pair, &folder);
    for address in pair.addresses(PORT) {
        let mut curl = vec!["curl".to_owned(), "-sS".to_owned(), "-g".to_owned()];
        curl.extend([
            "-w".to_owned(),
            "%{http_code} %{num_connects} %{size_download}\\n".to_owned(),
        ]);
        if pair.way != Way::Mesh {
            let first = pair.way.client_port().clamp(33_000, 65_000);
            curl.extend([
                "--local-port".to_owned(),
                format!("{first}-{}", first + 500),
            ]);
        }
        for size in SIZES {
            let got = folder.join(format!("got-{size}")).display().to_string();
            curl.extend(["-o".to_owned(), got, format!("http://{address}/{size}")]);
        }
        let said = pair.client.run(curl).unwrap().stdout;
        let expected = SIZES.iter().enumerate().map(|(turn, size)| {
            let connects = u8::from(turn == 0);
            format!("200 {connects} {size}\n")
        });
        assert_eq!(said, expected.collect::<String>());
        for size in SIZES {
            let got = fs::read(folder.join(format!("got-{size}"))).unwrap();
            payload::receive_all(&*got, 7, size).unwrap();
        }
    }
}

/// A folder that programs with other users may enter.
fn new_folder(pair: &Pair, name: &str) -> PathBuf {
    let bed = pair.bed.folder();
    let folder = bed.join(name);
    fs::create_dir(&folder).unwrap();
    for path in [bed, &folder] {
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
    }
    folder
}

fn start_nginx(pair: &Pair, folder: &std::path::Path) -> Process {
    let listens = if pair
        .server
        .addresses()
        .iter()
        .any(std::net::IpAddr::is_ipv6)
    {
        format!("listen {PORT}; listen [::]:{PORT};")
    } else {
        format!("listen {PORT};")
    };
    let http = format!(
        "sendfile on; server {{ {listens} root {}; }}",
        folder.display()
    );
    let nginx = malla_testbed::nginx(&pair.server, folder, &http).unwrap();
    let nginx = nginx.spawn().unwrap();
    wait_listening(pair, &nginx);
    nginx
}

/// Waits until the server's program listens. Where it doesn't, its log says why.
fn wait_listening(pair: &Pair, process: &Process) {
    let listening = pair.server.wait_listening(PORT);
    listening.unwrap_or_else(|error| panic!("{error}\n{}", process.log()));
}

fn iperf3_runs_both_ways_with_several_streams(pair: &Pair) {
    let port = PORT.to_string();
    let to = pair.address(PORT).ip().to_string();
    for direction in [&["-P", "4"][..], &["-R", "-P", "4"]] {
        // A server takes one test at a time and refuses a client that comes before the end of the
        // last one has reached it.
        let server = ["iperf3", "-s", "-1", "-p", &port];
        let server = pair.server.spawn(server).unwrap();
        wait_listening(pair, &server);
        // The data connections take the port given and those after it, which no earlier run has
        // left in TIME_WAIT.
        let first = pair.way.client_port().clamp(33_000, 65_000).to_string();
        let mut command = vec!["iperf3", "-c", &to, "-p", &port, "-t", "1"];
        if pair.way != Way::Mesh {
            command.extend(["--cport", &first]);
        }
        command.extend(direction);
        let said = pair.client.run(&command).unwrap().stdout;
        let receivers = said.lines().filter(|line| line.ends_with("receiver"));
        let moved = receivers.filter(|line| !line.contains(" 0.00 Bytes "));
        // One for each stream, and one for their sum.
        assert_eq!(moved.count(), 5, "{said}");
    }
}

fn psql_reads_what_it_wrote_to_postgresql(pair: &Pair) {
    let _postgres = start_postgres(pair);
    for address in pair.addresses(PORT) {
        let to = format!(
            "host={} port={PORT} user=postgres dbname=postgres",
            address.ip()
        );
        let script = "create temp table t as select i, repeat(md5(i::text), 8) as word\n\
             from generate_series(1, 20000) as i;\n\
             select count(*), sum(length(word)) from t;\n\
             copy t to stdout;\n\
             select inet_client_addr();\n";
        let psql = [
            "psql",
            "-X",
            "-q",
            "-A",
            "-t",
            "-v",
            "ON_ERROR_STOP=1",
            "-d",
            &to,
        ];
        let said = pair
            .client
            .command(psql)
            .input(script)
            .run()
            .unwrap()
            .stdout;
        let lines: Vec<&str> = said.lines().collect();
        assert_eq!((lines.len(), lines[0]), (20_002, "20000|5120000"));
        assert!(lines[20_000].starts_with("20000\t"), "{}", lines[20_000]);
        let client: std::net::IpAddr = lines[20_001].parse().unwrap();
        assert!(
            pair.client.addresses().contains(&client),
            "the client is {client}"
        );
    }
}

fn start_postgres(pair: &Pair) -> Process {
    let postgres = User::from_name("postgres").unwrap().unwrap();
    let folder = new_folder(pair, "postgres");
    chown(
        &folder,
        Some(postgres.uid.as_raw()),
        Some(postgres.gid.as_raw()),
    )
    .unwrap();
    let versions = fs::read_dir("/usr/lib/postgresql").unwrap();
    let programs = versions
        .map(|version| version.unwrap().path().join("bin"))
        .max()
        .unwrap();
    let data = folder.join("data").display().to_string();
    let initdb = programs.join("initdb").display().to_string();
    let made = pair.server.command([
        &*initdb,
        "-D",
        &data,
        "--no-sync",
        "--auth=trust",
        "-E",
        "UTF8",
    ]);
    made.user("postgres").run().unwrap();
    fs::write(folder.join("data/pg_hba.conf"), "host all all all trust\n").unwrap();
    let (program, port) = (programs.join("postgres"), format!("port={PORT}"));
    let program = program.display().to_string();
    let settings = [
        &*port,
        "listen_addresses=*",
        "unix_socket_directories=",
        "fsync=off",
    ];
    let arguments = settings.iter().flat_map(|setting| ["-c", setting]);
    let command = [&*program, "-D", &data].into_iter().chain(arguments);
    let postgres = pair
        .server
        .command(command)
        .user("postgres")
        .spawn()
        .unwrap();
    wait_listening(pair, &postgres);
    let ready = "ready to accept connections";
    postgres.wait_for_log(ready, PATIENCE).unwrap();
    postgres
}

fn redis_cli_reads_what_it_wrote_to_redis(pair: &Pair) {
    let (port, folder) = (PORT.to_string(), new_folder(pair, "redis"));
    let folder = folder.display().to_string();
    let redis = [
        "redis-server",
        "--port",
        &port,
        "--bind",
        "*",
        "-::*",
        "--protected-mode",
        "no",
        "--save",
        "",
        "--dir",
        &folder,
    ];
    let redis = pair.server.spawn(redis).unwrap();
    wait_listening(pair, &redis);
    let value: String = ('a'..='z').cycle().take(3_000_000).collect();
    for address in pair.addresses(PORT) {
        let to = address.ip().to_string();
        let cli = |words: &[&str]| {
            let arguments = ["redis-cli", "-h", &to, "-p", &port].into_iter();
            pair.client.command(arguments.chain(words.iter().copied()))
        };
        let said = cli(&["-x", "set", "key"])
            .input(value.clone())
            .run()
            .unwrap();
        assert_eq!(said.stdout, "OK\n");
        let said = cli(&["get", "key"]).run().unwrap().stdout;
        assert!(said.trim_end() == value, "{} bytes", said.len());
        let commands: Vec<String> = (0..1_000)
            .map(|turn| format!("SET key{turn} {turn}\r\n"))
            .collect();
        let said = cli(&["--pipe"])
            .input(commands.concat())
            .run()
            .unwrap()
            .stdout;
        assert!(said.contains("errors: 0, replies: 1000"), "{said}");
    }
}

fn ssh_keyscan_gets_the_key_of_sshd(pair: &Pair) {
    let folder = new_folder(pair, "ssh");
    let (key, port) = (folder.join("key").display().to_string(), PORT.to_string());
    pair.server
        .run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", &key])
        .unwrap();
    fs::create_dir_all("/run/sshd").unwrap();
    let sshd = [
        "/usr/sbin/sshd",
        "-D",
        "-e",
        "-f",
        "/dev/null",
        "-h",
        &key,
        "-p",
        &port,
    ];
    let sshd = pair.server.spawn(sshd).unwrap();
    wait_listening(pair, &sshd);
    let public = fs::read_to_string(format!("{key}.pub")).unwrap();
    let public = public.split(' ').nth(1).unwrap();
    for address in pair.addresses(PORT) {
        let to = address.ip().to_string();
        let scan = ["ssh-keyscan", "-t", "ed25519", "-p", &port, &to];
        let said = pair.client.run(scan).unwrap().stdout;
        assert!(said.contains(public), "{said}\n{}", sshd.log());
    }
}

/// As linkerd/linkerd2#13364 has it, where the proxy waited for the client's first bytes.
fn a_server_that_speaks_first_is_heard_before_its_client_speaks(pair: &Pair) {
    let banner = [b'N'; 200];
    let listener = listen(&pair.server, PORT).unwrap();
    let mut client = pair.dial(pair.address(PORT)).unwrap();
    let (mut server, dialled) = (accept(&listener).unwrap(), Instant::now());
    server.write_all(&banner).unwrap();
    let mut received = [0; 200];
    client.read_exact(&mut received).unwrap();
    assert_eq!(received, banner);
    // Far less than any wait for a client's first bytes would be, even with a lost packet.
    let late = dialled.elapsed();
    assert!(late < Duration::from_secs(3), "{late:?}");
    server.set_nonblocking(true).unwrap();
    assert_eq!(
        server.read(&mut [0]).unwrap_err().kind(),
        ErrorKind::WouldBlock
    );
    server.set_nonblocking(false).unwrap();

    // What a TLS handshake begins with passes as any other bytes do.
    let hello: Vec<u8> = [0x16, 3, 1, 7, 0xfc, 1]
        .into_iter()
        .chain(0..=255)
        .cycle()
        .take(1_800)
        .collect();
    thread::scope(|scope| {
        scope.spawn(|| client.write_all(&hello).unwrap());
        let mut received = vec![0; hello.len()];
        server.read_exact(&mut received).unwrap();
        assert!(received == hello);
    });
}
