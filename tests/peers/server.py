#!/usr/bin/python3
"""An HBONE server without apps behind it: the port in the authority says what it does.

    7     echoes, and ends when the client has ended
    9     takes bytes but gives no window for more
    10    waits for the client's end, then answers 1 MiB and ends
    11    says `bye`, ends, and takes what the client still sends
    12    resets with CONNECT_ERROR after the first bytes
    13    never answers
    14    cuts the tunnel after the first bytes
    15    says GOAWAY at the first bytes, then echoes as 7
    16    cuts the server's first tunnel in place of an answer, and echoes in later ones
    17    answers only when data has come, then echoes
    18    cuts the tunnel when data comes in place of an answer
    19    refuses the stream when data comes in the server's first tunnel, and echoes in later ones
    20    says GOAWAY without it when data comes in the server's first tunnel, and echoes in later ones
    other  answers with that status and ends

It prints one line for each tunnel, for each request and for each stream that has ended.
"""

import argparse
import itertools
import socket
import sys
import threading

import h2.errors
import h2.events
from hyperframe.frame import GoAwayFrame

import hbone

ECHO, STALL, ANSWER_LAST, END_FIRST, RESET, SILENCE, CUT = 7, 9, 10, 11, 12, 13, 14
LEAVE, CUT_FIRST, ANSWER_DATA, CUT_AT_DATA, REFUSE_DATA, LEAVE_DATA = 15, 16, 17, 18, 19, 20
UNANSWERED = {ANSWER_DATA, CUT_AT_DATA, REFUSE_DATA, LEAVE_DATA}
ECHOED = {ECHO, LEAVE, CUT_FIRST} | UNANSWERED
CARRIED = {STALL, ANSWER_LAST, END_FIRST, RESET, CUT} | ECHOED
ANSWER = b"a" * (1 << 20)


class Cut(Exception):
    """This end cuts the tunnel."""


class Server:
    """One tunnel."""

    def __init__(self, tls, is_first, options):
        self.tls = tls
        self.is_first = is_first
        self.strict_limit = options.streams if options.strict else None
        # A strict end's first word is late: the client doesn't know the limit when it exceeds it.
        mute = options.strict and is_first
        self.tunnel = hbone.Tunnel(tls, is_client=False, stream_limit=options.streams, mute=mute)
        self.optimistic = options.optimistic
        self.answered = set()
        self.ports = {}
        self.leaves = False

    def serve(self):
        identity = " ".join(hbone.names(hbone.peer_certificate(self.tls)))
        say("tunnel", self.tls.version(), self.tls.selected_alpn_protocol(), identity)
        while True:
            for event in self.tunnel.step():
                self.answer(event)
            self.tunnel.write()

    def answer(self, event):
        if isinstance(event, h2.events.RequestReceived):
            self.request(event.stream_id)
        elif isinstance(event, h2.events.DataReceived):
            self.data(event.stream_id, event.data)
        elif isinstance(event, h2.events.StreamEnded):
            self.client_ended(event.stream_id)
        elif isinstance(event, h2.events.StreamReset):
            self.tell_end(event.stream_id)

    def request(self, number):
        stream = self.tunnel.stream(number)
        live = sum(not stream.is_over for stream in self.tunnel.streams.values())
        if self.strict_limit is not None and live > self.strict_limit:
            say("refused", number)
            stream.reset = "REFUSED_STREAM"
            self.tunnel.mute = False
            return self.tunnel.reset(number, h2.errors.ErrorCodes.REFUSED_STREAM)
        authority = stream.header(":authority")
        port = int(authority.rpartition(":")[2])
        self.ports[number] = port
        names = [name for name, _ in stream.headers]
        say("request", stream.header(":method"), authority, ",".join(names))
        say("headers", *(f"{n}={v}" for n, v in stream.headers if not n.startswith(":")))
        if port == SILENCE or self.waits_for_data(port):
            return
        if port == CUT_FIRST and self.is_first:
            raise Cut
        self.answer_request(number)
        if port == END_FIRST:
            self.tunnel.send(number, b"bye", end=True)

    def waits_for_data(self, port):
        return port == ANSWER_DATA or port in UNANSWERED and (self.is_first or port == CUT_AT_DATA)

    def answer_request(self, number):
        port, stream = self.ports[number], self.tunnel.stream(number)
        status = 200 if port in CARRIED else port
        stream.holds = port == STALL
        self.answered.add(number)
        head = [(":status", str(status))]
        if self.optimistic:
            head.append(("malla-optimistic-data", "?1"))
        self.tunnel.h2.send_headers(number, head, end_stream=port not in CARRIED)

    def data_before_answer(self, number):
        port = self.ports[number]
        say("data before the answer", port)
        if port == CUT_AT_DATA:
            raise Cut
        if port == REFUSE_DATA:
            self.tunnel.stream(number).reset = "REFUSED_STREAM"
            self.tunnel.reset(number, h2.errors.ErrorCodes.REFUSED_STREAM)
        elif port == LEAVE_DATA:
            self.leave(before=number)
        else:
            self.answer_request(number)

    def data(self, number, data):
        port = self.ports[number]
        if number not in self.answered:
            self.data_before_answer(number)
        if number not in self.answered:
            return
        if port == LEAVE and not self.leaves:
            self.leave()
        if port in ECHOED:
            self.tunnel.send(number, data)
        elif port == RESET:
            self.tunnel.reset(number, h2.errors.ErrorCodes.CONNECT_ERROR)
        elif port == CUT:
            raise Cut

    def leave(self, before=None):
        # By hand: `h2` would close the connection with it, and the streams that there are go on.
        self.leaves = True
        last = max(self.ports) if before is None else before - 2
        goaway = GoAwayFrame(0, last_stream_id=last)
        self.tls.sendall(goaway.serialize())
        say("leaving")

    def client_ended(self, number):
        if self.ports[number] in ECHOED | {ANSWER_LAST}:
            answer = ANSWER if self.ports[number] == ANSWER_LAST else b""
            self.tunnel.send(number, answer, end=True)
        self.tell_end(number)

    def tell_end(self, number):
        stream = self.tunnel.stream(number)
        how = f"reset {stream.reset}" if stream.reset else "end"
        say("ended", self.ports.get(number), how, len(stream.received))


def say(*words):
    # One write a line, since tunnels have a thread each.
    sys.stdout.write(" ".join(map(str, words)) + "\n")
    sys.stdout.flush()


def serve(raw, context, is_first, options):
    try:
        tls = context.wrap_socket(raw, server_side=True)
        if options.raw:
            tls.sendall(options.raw.encode())
        while options.raw and tls.recv(hbone.READ):
            pass
        Server(tls, is_first, options).serve()
    except hbone.Refused as refused:
        say("closed", refused)
    except Cut:
        raw_close(tls)
    except (hbone.ssl.SSLError, ConnectionError) as error:
        say("closed", hbone.reason(error))


def raw_close(tls):
    """Ends the tunnel without a word of HTTP/2."""
    tls.shutdown(socket.SHUT_RDWR)
    tls.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--anchors", required=True, help="PEM file of trust anchors")
    parser.add_argument("--certificate", required=True, help="path of .crt and .key")
    parser.add_argument("--alpn", default="h2", help="protocol to choose, `none` for none")
    parser.add_argument("--raw", help="bytes to send inside TLS instead of all HTTP/2")
    parser.add_argument("--streams", type=int, help="how many streams a tunnel may have")
    parser.add_argument("--strict", action="store_true", help="refuse streams over that limit")
    parser.add_argument("--optimistic", action="store_true", help="say that data may come first")
    options = parser.parse_args()
    alpn = () if options.alpn == "none" else (options.alpn,)
    context = hbone.context(False, options.anchors, options.certificate, alpn)
    listener = socket.create_server(
        ("::", hbone.PORT), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024
    )
    say("ready")
    for number in itertools.count():
        raw, _ = listener.accept()
        arguments = (raw, context, number == 0, options)
        threading.Thread(target=serve, args=arguments, daemon=True).start()


if __name__ == "__main__":
    main()
