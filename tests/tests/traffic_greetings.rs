//! Real servers that speak first, whose clients wait for their greeting: nothing on the way may
//! wait for the client's first bytes.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail like the tests")]

use std::fs;

use malla_testbed::{PATIENCE, Pair, SERVICE_PORT, on_each_way};

const PORT: u16 = SERVICE_PORT;

/// Takes mail on a port of both families, and prints it.
const SMTP_SERVER: &str = "
import asyncio, sys
from aiosmtpd.handlers import Debugging
from aiosmtpd.smtp import SMTP

async def main():
    new = lambda: SMTP(Debugging(sys.stdout), hostname='server')
    server = await asyncio.get_running_loop().create_server(new, None, int(sys.argv[1]))
    await server.serve_forever()

asyncio.run(main())
";

on_each_way!(
    [ToService, ToUnmeshed]
    a_mysql_client_reads_what_it_wrote_to_mariadb,
    a_mail_that_curl_sends_is_delivered_by_smtp,
);

fn a_mysql_client_reads_what_it_wrote_to_mariadb(pair: &Pair) {
    let folder = pair.bed.folder().join("mariadb");
    fs::create_dir(&folder).unwrap();
    let server = [
        "mariadbd".to_owned(),
        "--no-defaults".to_owned(),
        // There are no tables of its own, not even of users: an empty folder is all that it needs.
        "--skip-grant-tables".to_owned(),
        "--skip-innodb".to_owned(),
        "--default-storage-engine=Aria".to_owned(),
        "--skip-networking=0".to_owned(),
        "--skip-name-resolve".to_owned(),
        "--user=root".to_owned(),
        "--bind-address=*".to_owned(),
        format!("--port={PORT}"),
        format!("--datadir={}", folder.display()),
        format!("--socket={}/socket", folder.display()),
        format!("--pid-file={}/pid", folder.display()),
    ];
    let server = pair.server.spawn(&server).unwrap();
    let ready = "ready for connections";
    server.wait_for_log(ready, PATIENCE).unwrap();
    for (turn, address) in pair.addresses(PORT).into_iter().enumerate() {
        let script = format!(
            "create database d{turn}; use d{turn};\n\
             create table t as select seq, repeat(md5(seq), 8) as word from seq_1_to_20000;\n\
             select count(*), sum(length(word)) from t;\n\
             select word from t order by seq;\n"
        );
        let (host, port) = (address.ip().to_string(), PORT.to_string());
        let client = ["mariadb", "--no-defaults", "-N", "-h", &host, "-P", &port];
        let client = pair.client.command(client).input(script);
        let said = client.run().unwrap().stdout;
        let lines: Vec<&str> = said.lines().collect();
        assert_eq!((lines.len(), lines[0]), (20_001, "20000\t5120000"));
        assert!(lines[1].starts_with("c4ca4238a0b9"), "{}", lines[1]);
    }
}

fn a_mail_that_curl_sends_is_delivered_by_smtp(pair: &Pair) {
    let port = PORT.to_string();
    let server = ["/usr/bin/python3", "-u", "-B", "-c", SMTP_SERVER, &port];
    let server = pair.server.spawn(server).unwrap();
    let listening = pair.server.wait_listening(PORT);
    listening.unwrap_or_else(|error| panic!("{error}\n{}", server.log()));
    for (turn, address) in pair.addresses(PORT).into_iter().enumerate() {
        let line = format!("{turn}: {}\r\n", "a line of a mail ".repeat(4));
        let (to, body) = (format!("smtp://{address}"), line.repeat(5_000));
        let client = [
            "curl",
            "-sS",
            "-g",
            "--mail-from",
            "client@example.com",
            "--mail-rcpt",
            "server@example.com",
            "--upload-file",
            "-",
            &to,
        ];
        let mail = format!("Subject: mail {turn}\r\n\r\n{body}");
        pair.client.command(client).input(mail).run().unwrap();
        let end = "END MESSAGE";
        let delivered = || (server.log().matches(end).count() > turn).then(|| server.log());
        let log = malla_testbed::until("the mail", PATIENCE, delivered).unwrap();
        assert!(log.contains(&format!("Subject: mail {turn}")), "{log}");
        assert_eq!(log.matches(line.trim_end()).count(), 5_000);
    }
}
