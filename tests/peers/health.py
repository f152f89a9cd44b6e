#!/usr/bin/python3
"""gRPC's health checking protocol over HTTP/2 without TLS: a server, or one question.

    health.py serve PORT                     answers SERVING to each call, and prints a line of it
    health.py ask FROM TO PORT PATH SERVICE  prints the status and what came back, or how it failed
"""

import socket
import sys
import threading

import h2.config
import h2.connection
import h2.events

SERVING = b"\0\0\0\0\2\x08\1"


def main(role, *arguments):
    if role == "serve":
        serve(int(arguments[0]))
    else:
        ask(*arguments)


def connection(is_client):
    config = h2.config.H2Configuration(client_side=is_client, header_encoding="utf-8")
    http = h2.connection.H2Connection(config)
    http.initiate_connection()
    return http


def serve(port):
    listener = socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True)
    print("ready", flush=True)
    while True:
        stream, peer = listener.accept()
        threading.Thread(target=answer, args=(stream, peer), daemon=True).start()


def answer(stream, peer):
    http = connection(is_client=False)
    peer = peer[0].removeprefix("::ffff:")
    paths, bodies = {}, {}
    try:
        while True:
            stream.sendall(http.data_to_send())
            data = stream.recv(65536)
            if not data:
                return
            for event in http.receive_data(data):
                if isinstance(event, h2.events.RequestReceived):
                    paths[event.stream_id] = dict(event.headers)[":path"]
                    bodies[event.stream_id] = b""
                elif isinstance(event, h2.events.DataReceived):
                    bodies[event.stream_id] += event.data
                elif isinstance(event, h2.events.StreamEnded):
                    number = event.stream_id
                    print("called", peer, paths[number], bodies[number].hex(), flush=True)
                    http.send_headers(
                        number, [(":status", "200"), ("content-type", "application/grpc")]
                    )
                    http.send_data(number, SERVING)
                    http.send_headers(number, [("grpc-status", "0")], end_stream=True)
    except OSError:
        pass


def ask(own, to, port, path, service):
    http = connection(is_client=True)
    field = b"\x0a" + bytes([len(service)]) + service.encode() if service else b""
    said = []
    try:
        stream = socket.create_connection((to, int(port)), timeout=10, source_address=(own, 0))
        http.send_headers(
            1,
            [
                (":method", "POST"),
                (":scheme", "http"),
                (":authority", f"[{to}]:{port}" if ":" in to else f"{to}:{port}"),
                (":path", path),
                ("content-type", "application/grpc"),
                ("te", "trailers"),
            ],
        )
        http.send_data(1, b"\0" + len(field).to_bytes(4, "big") + field, end_stream=True)
        stream.sendall(http.data_to_send())
        while True:
            data = stream.recv(65536)
            if not data:
                break
            for event in http.receive_data(data):
                if isinstance(event, h2.events.DataReceived):
                    said.append(event.data.hex())
                elif isinstance(event, h2.events.TrailersReceived):
                    said.append("grpc-status=" + dict(event.headers)["grpc-status"])
                elif isinstance(event, h2.events.StreamReset):
                    said.append(f"reset {event.error_code}")
                elif isinstance(event, h2.events.StreamEnded):
                    print("answered", *said)
                    return
            stream.sendall(http.data_to_send())
    except OSError as error:
        said.append(type(error).__name__)
    print("failed", *said)


main(*sys.argv[1:])
