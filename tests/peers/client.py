#!/usr/bin/python3
"""An HBONE client that does what the lines of its input say, and tells what came of it.

    connect N AUTHORITY      opens connection N with a CONNECT
    within N AUTHORITY MS    a CONNECT that another server is tried after
    request N METHOD AUTHORITY   another method
    padded N AUTHORITY SIZE  a CONNECT with SIZE bytes in a header
    batch AUTHORITY...       opens connections 1, 2, ... with CONNECTs in one write
    churn AUTHORITY COUNT BATCH  opens COUNT connections, BATCH at a time, each reset at once
    send N TEXT, end N, reset N CODE
    queue N SIZE             sends SIZE bytes as the windows allow, meanwhile the next steps go on
    fill N SIZE              the same, and waits until they are sent
    opening N AUTHORITY SIZE  a CONNECT with SIZE bytes of data in one write
    hold N, release N        withholds N's receive window, gives it
    trickle N SIZE COUNT MS  gives it SIZE bytes at a time, COUNT times, MS milliseconds apart
    ping                     waits for the answer
    certificate              what the server's certificate says
    raw TEXT                 bytes that aren't HTTP/2
    status N, finish N, tell N   wait for the answer, for the end; tell what came so far
    header N NAME            that of the answer
    until N SIZE             waits until SIZE bytes have come
    settle N                 reads until N is given no more bytes for half a second

The last line is `closed REASON` where the tunnel ended before the steps did.
"""

import argparse
import datetime
import hashlib
import socket
import sys
import threading
import time

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

import hbone

PURPOSES = {ExtendedKeyUsageOID.CLIENT_AUTH: "client", ExtendedKeyUsageOID.SERVER_AUTH: "server"}
BASE = {"baggage": "k8s.pod.name=stranger", "forwarded": 'for="192.0.2.1:4000"'}
QUIET = 0.5
RESET = hbone.h2.errors.ErrorCodes.CANCEL


class Client:
    def __init__(self, tls):
        self.tls = tls
        self.tunnel = hbone.Tunnel(tls, is_client=True)
        self.numbers = {}
        while not self.tunnel.has_settings:
            self.tunnel.step()

    def open(self, name, method, authority, extra=None, write=True):
        number = self.tunnel.h2.get_next_available_stream_id()
        self.numbers[name] = number
        self.tunnel.stream(number)
        headers = [(":method", method), (":authority", authority)]
        if method != "CONNECT":
            headers += [(":scheme", "https"), (":path", "/")]
        headers += [*BASE.items(), *(extra or {}).items()]
        self.tunnel.h2.send_headers(number, headers, end_stream=method != "CONNECT")
        if write:
            self.tunnel.write()

    def do(self, words):
        step, *rest = words
        getattr(self, f"do_{step}")(*rest)

    def of(self, name):
        number = self.numbers[name]
        return number, self.tunnel.stream(number)

    def wait(self, condition):
        while not condition():
            self.tunnel.step()

    def do_connect(self, name, authority):
        self.open(name, "CONNECT", authority)

    def do_opening(self, name, authority, size):
        self.open(name, "CONNECT", authority, write=False)
        self.do_queue(name, size)

    def do_within(self, name, authority, limit):
        self.open(name, "CONNECT", authority, {"malla-connect-within": limit})

    def do_request(self, name, method, authority):
        self.open(name, method, authority)

    def do_padded(self, name, authority, size):
        # Spread over several headers: what is limited is their sum.
        step = 8000
        extra = {f"x-padding-{at}": "p" * step for at in range(0, int(size), step)}
        self.open(name, "CONNECT", authority, extra)

    def do_send(self, name, *text):
        self.tunnel.send(self.of(name)[0], " ".join(text).encode())
        self.tunnel.write()

    def do_batch(self, *authorities):
        for number, authority in enumerate(authorities, start=1):
            self.open(str(number), "CONNECT", authority, write=False)
        self.tunnel.write()

    def do_churn(self, authority, count, batch):
        for _ in range(int(count) // int(batch)):
            for _ in range(int(batch)):
                self.open("churn", "CONNECT", authority, write=False)
                self.tunnel.h2.reset_stream(self.numbers["churn"], RESET)
            self.tunnel.write()
            # The server may want to say that it is enough.
            self.do_ping(tell=False)
        print("churned")

    def do_queue(self, name, size):
        self.tunnel.send(self.of(name)[0], b"x" * int(size))
        self.tunnel.write()

    def do_fill(self, name, size):
        _, stream = self.of(name)
        self.do_queue(name, size)
        self.wait(lambda: not stream.queue or stream.is_over)

    def do_end(self, name):
        self.tunnel.send(self.of(name)[0], end=True)
        self.tunnel.write()

    def do_reset(self, name, code):
        self.tunnel.reset(self.of(name)[0], getattr(hbone.h2.errors.ErrorCodes, code))

    def do_hold(self, name):
        self.of(name)[1].holds = True

    def do_release(self, name):
        self.tunnel.release(self.of(name)[0])

    def do_trickle(self, name, size, count, pause):
        number, _ = self.of(name)
        for _ in range(int(count)):
            time.sleep(int(pause) / 1000)
            self.tunnel.h2.increment_flow_control_window(int(size), number)
            self.tunnel.write()

    def do_ping(self, tell=True):
        before = self.tunnel.pongs
        self.tunnel.h2.ping(b"12345678")
        self.tunnel.write()
        self.wait(lambda: self.tunnel.pongs > before)
        if tell:
            print("pong")

    def do_raw(self, *text):
        self.tls.sendall(" ".join(text).encode())
        while True:
            self.tunnel.step()

    def do_certificate(self):
        describe(hbone.peer_certificate(self.tls))

    def do_status(self, name):
        _, stream = self.of(name)
        self.wait(lambda: stream.headers is not None or stream.is_over)
        print(name, stream.header(":status") or f"reset {stream.reset}")

    def do_header(self, name, header):
        _, stream = self.of(name)
        print(name, stream.header(header) or "no header")

    def do_finish(self, name):
        _, stream = self.of(name)
        self.wait(lambda: stream.is_over)
        self.do_tell(name)

    def do_until(self, name, size):
        _, stream = self.of(name)
        self.wait(lambda: len(stream.received) >= int(size) or stream.is_over)

    def do_settle(self, name):
        self.tls.settimeout(QUIET)
        try:
            while True:
                self.tunnel.step()
        except hbone.Refused as refused:
            if str(refused) != "silence":
                raise
        finally:
            self.tls.settimeout(hbone.PATIENCE)
        self.do_tell(name)

    def do_tell(self, name):
        _, stream = self.of(name)
        data = bytes(stream.received)
        short = data.decode() if len(data) <= 64 else f"{len(data)} {digest(data)}"
        state = f"reset {stream.reset}" if stream.reset else "end" if stream.ended else "open"
        print(name, state, short)


def dribbling(raw, size):
    """A socket whose bytes go to `raw` in pieces, and come from there."""
    raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    raw.settimeout(None)
    near, far = socket.socketpair()

    def carry(source, sink, size):
        try:
            while data := source.recv(size):
                sink.sendall(data)
        except OSError:
            pass
        sink.close()

    for arguments in ((far, raw, size), (raw, far, hbone.READ)):
        threading.Thread(target=carry, args=arguments, daemon=True).start()
    return near


def answer_of(tls):
    """Takes what the server says to bytes that it doesn't understand, until it closes."""
    while tls.recv(hbone.READ):
        pass
    raise hbone.Refused("end of file")


def digest(data):
    return hashlib.sha256(data).hexdigest()


def describe(certificate):
    of = certificate.extensions.get_extension_for_class
    purposes = of(x509.ExtendedKeyUsage).value
    since, until = (
        int(moment.replace(tzinfo=datetime.timezone.utc).timestamp())
        for moment in (certificate.not_valid_before, certificate.not_valid_after)
    )
    key = certificate.public_key()
    print("uri", *hbone.names(certificate))
    print("critical", of(x509.SubjectAlternativeName).critical)
    print("purposes", *sorted(PURPOSES.get(purpose, purpose.dotted_string) for purpose in purposes))
    print("curve", key.curve.name if isinstance(key, ec.EllipticCurvePublicKey) else "none")
    print("since", since)
    print("until", until)
    print("subject", certificate.subject.rfc4514_string() or "empty")
    print("serial", certificate.serial_number)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--to", required=True, help="the server's address")
    parser.add_argument("--anchors", required=True, help="PEM file of trust anchors")
    parser.add_argument("--certificate", help="path of .crt and .key without the ending")
    parser.add_argument("--alpn", default="h2", help="protocol to offer, `none` for none")
    parser.add_argument("--raw", help="bytes to send inside TLS instead of all HTTP/2")
    parser.add_argument("--dribble", type=int, help="send at most so many bytes a packet")
    options = parser.parse_args()
    alpn = () if options.alpn == "none" else (options.alpn,)
    context = hbone.context(True, options.anchors, options.certificate, alpn)
    raw = socket.create_connection((options.to, hbone.PORT), hbone.PATIENCE)
    if options.dribble:
        raw = dribbling(raw, options.dribble)
    # Each line is told at once: a test may wait for it.
    sys.stdout.reconfigure(line_buffering=True)
    try:
        tls = context.wrap_socket(raw)
        tls.settimeout(hbone.PATIENCE)
        print("tls", tls.version(), tls.selected_alpn_protocol())
        if options.raw:
            tls.sendall(options.raw.encode())
            answer_of(tls)
        client = Client(tls)
        for line in sys.stdin:
            client.do(line.split())
    except hbone.Refused as refused:
        print("closed", refused)
    except (hbone.ssl.SSLError, OSError) as error:
        print("closed", hbone.reason(error))


if __name__ == "__main__":
    main()
