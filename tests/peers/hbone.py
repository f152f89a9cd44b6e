"""HBONE on OpenSSL and the HTTP/2 stack `h2`: what the client and the server here have in common.

Written from the protocol's description, not from the agent, so that an agent that agrees with
itself alone is found out. One thread drives one tunnel, and nothing here decides what to say.
"""

import socket
import ssl

import h2.config
import h2.connection
import h2.errors
import h2.events
import h2.exceptions
from cryptography import x509

PORT = 15008
READ = 65536
PATIENCE = 15.0


class Refused(Exception):
    """The other end closed the tunnel, and why as far as it said."""


class Stream:
    """One connection in a tunnel, as this end sees it."""

    def __init__(self):
        self.headers = None
        self.received = bytearray()
        self.ended = False
        self.reset = None
        self.holds = False
        self.held = 0
        self.queue = bytearray()
        self.ends = False
        self.sent_end = False

    def header(self, name):
        return dict(self.headers or []).get(name, "")

    @property
    def is_over(self):
        return self.ended or self.reset is not None


class Tunnel:
    """An HTTP/2 connection whose windows are given and respected by hand."""

    def __init__(self, tls, is_client, stream_limit=None, mute=False):
        config = h2.config.H2Configuration(
            client_side=is_client,
            header_encoding="utf-8",
            # It knows no CONNECT without `:path` and `:scheme`.
            validate_outbound_headers=False,
            validate_inbound_headers=False,
        )
        self.tls = tls
        if tls.family in (socket.AF_INET, socket.AF_INET6):
            tls.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.h2 = h2.connection.H2Connection(config)
        self.streams = {}
        self.pongs = 0
        self.has_settings = False
        self.goaway = None
        self.mute = mute
        self.h2.initiate_connection()
        if stream_limit is not None:
            code = h2.settings.SettingCodes.MAX_CONCURRENT_STREAMS
            self.h2.update_settings({code: stream_limit})
        self.write()

    def stream(self, number):
        return self.streams.setdefault(number, Stream())

    def send(self, number, data=b"", end=False):
        """Sends as soon as the windows allow it."""
        stream = self.stream(number)
        stream.queue += data
        stream.ends |= end
        self.flush(number)

    def flush(self, number):
        stream = self.streams[number]
        try:
            while stream.queue:
                window = self.h2.local_flow_control_window(number)
                size = min(window, self.h2.max_outbound_frame_size, len(stream.queue))
                if size <= 0:
                    break
                self.h2.send_data(number, bytes(stream.queue[:size]))
                del stream.queue[:size]
            if stream.ends and not stream.queue and not stream.sent_end:
                stream.sent_end = True
                self.h2.end_stream(number)
        except h2.exceptions.StreamClosedError:
            stream.queue.clear()

    def reset(self, number, code):
        self.stream(number).queue.clear()
        self.h2.reset_stream(number, code)
        self.write()

    def release(self, number):
        """Gives a stream the window that was withheld from it."""
        stream = self.streams[number]
        stream.holds = False
        if stream.held and not stream.is_over:
            self.h2.increment_flow_control_window(stream.held, number)
        stream.held = 0
        self.write()

    def write(self):
        if not self.mute:
            self.tls.sendall(self.h2.data_to_send())

    def step(self):
        """Waits for bytes, and returns the events that they make."""
        try:
            data = self.tls.recv(READ)
        except socket.timeout as error:
            raise Refused("silence") from error
        except (ssl.SSLError, ConnectionError) as error:
            raise Refused(reason(error)) from error
        if not data:
            raise Refused(f"GOAWAY {self.goaway}" if self.goaway else "end of file")
        try:
            events = self.h2.receive_data(data)
        except h2.exceptions.ProtocolError as error:
            self.write()
            raise Refused(f"protocol error: {error!r}") from error
        for event in events:
            self.note(event)
        self.write()
        return events

    def note(self, event):
        if isinstance(event, h2.events.RemoteSettingsChanged):
            self.has_settings = True
        elif isinstance(event, h2.events.PingAckReceived):
            self.pongs += 1
        elif isinstance(event, (h2.events.ResponseReceived, h2.events.RequestReceived)):
            self.stream(event.stream_id).headers = event.headers
        elif isinstance(event, h2.events.DataReceived):
            self.take(event)
        elif isinstance(event, h2.events.StreamEnded):
            self.stream(event.stream_id).ended = True
        elif isinstance(event, h2.events.StreamReset):
            self.stream(event.stream_id).reset = code_name(event.error_code)
        elif isinstance(event, h2.events.ConnectionTerminated):
            self.goaway = code_name(event.error_code)
        if isinstance(event, (h2.events.WindowUpdated, h2.events.RemoteSettingsChanged)):
            for number in self.streams:
                self.flush(number)

    def take(self, event):
        stream = self.stream(event.stream_id)
        stream.received += event.data
        size = event.flow_controlled_length
        if size == 0:
            return
        self.h2.increment_flow_control_window(size)
        if stream.holds:
            stream.held += size
            return
        try:
            self.h2.increment_flow_control_window(size, event.stream_id)
        except h2.exceptions.StreamClosedError:
            pass


def code_name(code):
    try:
        return h2.errors.ErrorCodes(code).name
    except ValueError:
        return str(code)


def reason(error):
    """One line without the interpreter's own words."""
    return getattr(error, "reason", None) or type(error).__name__


def context(is_client, anchors, certificate=None, alpn=("h2",)):
    """TLS 1.3, mutual, checked against `anchors`; `certificate` is the path of chain and key."""
    purpose = ssl.PROTOCOL_TLS_CLIENT if is_client else ssl.PROTOCOL_TLS_SERVER
    tls = ssl.SSLContext(purpose)
    tls.check_hostname = False
    tls.minimum_version = ssl.TLSVersion.TLSv1_3
    tls.verify_mode = ssl.CERT_REQUIRED
    tls.load_verify_locations(anchors)
    if certificate:
        tls.load_cert_chain(f"{certificate}.crt", f"{certificate}.key")
    if alpn:
        tls.set_alpn_protocols(list(alpn))
    return tls


def peer_certificate(tls):
    return x509.load_der_x509_certificate(tls.getpeercert(binary_form=True))


def names(certificate):
    """The URIs of a certificate."""
    extension = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    return extension.value.get_values_for_type(x509.UniformResourceIdentifier)
