"""A proxy before an S3 server that misbehaves as the test says, request by request, over real sockets."""

from __future__ import annotations

import http.client
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

ANSWERS = {
    "500": (500, "InternalError"),
    "slow down": (503, "SlowDown"),
    "expired": (403, "ExpiredToken"),
    "unknown key": (403, "InvalidAccessKeyId"),
}


@dataclass
class Fault:
    """What happens to requests of a `method` whose target holds `part`: the first `after` pass, the next `times` fail.

    `kind`: one of ANSWERS, or "cut" (closed without an answer), "reset" (in the middle of the request's body), "lost"
    (done, but the connection closes without an answer), "truncate" (half of the answer's body), "stall" (not done, no
    answer, connection open), "hang" (done, no answer, connection open).
    """

    kind: str
    method: str = ""
    part: str = ""
    after: int = 0
    times: int = 1_000_000


@dataclass
class FaultyProxy:
    url: str
    faults: list[Fault] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    """Method and target of everything that was asked."""
    lock: threading.Lock = field(default_factory=threading.Lock)
    over: threading.Event = field(default_factory=threading.Event)

    def next_fault(self, method: str, target: str) -> str:
        with self.lock:
            self.requests.append(f"{method} {target}")
            for fault in self.faults:
                if fault.method not in ("", method) or fault.part not in target:
                    continue
                if fault.after > 0:
                    fault.after -= 1
                elif fault.times > 0:
                    fault.times -= 1
                    return fault.kind
        return ""

    def count(self, method: str, part: str = "") -> int:
        with self.lock:
            return sum(request.startswith(f"{method} ") and part in request for request in self.requests)


@contextmanager
def faulty_proxy(upstream: str) -> Iterator[FaultyProxy]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    server.block_on_close = False
    proxy = FaultyProxy(f"http://127.0.0.1:{server.server_address[1]}")
    server.proxy, server.upstream = proxy, urlsplit(upstream).netloc  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.over.set()
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def _proxy(self) -> FaultyProxy:
        return self.server.proxy  # type: ignore[attr-defined,no-any-return]

    def _serve(self) -> None:
        proxy = self._proxy
        fault = proxy.next_fault(self.command, self.path)
        length = int(self.headers.get("Content-Length") or 0)
        if fault == "reset":
            self.rfile.read(length // 2)
            self._reset()
            return
        body = self.rfile.read(length)
        if fault == "stall":
            proxy.over.wait(60)
        if fault in {"cut", "stall"}:
            self.close_connection = True
        elif fault in ANSWERS:
            status, code = ANSWERS[fault]
            text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>said the proxy</Message></Error>".encode()
            self._answer(status, {"Content-Type": "application/xml", "Content-Length": str(len(text))}, text)
        else:
            self._forward(fault, body)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _serve  # noqa: N815

    def _forward(self, fault: str, body: bytes) -> None:
        connection = http.client.HTTPConnection(self.server.upstream, timeout=60)  # type: ignore[attr-defined]
        try:
            # The signature covers the Host header, so it goes on as it came.
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in {"connection", "expect"}:
                    connection.putheader(name, value)
            connection.endheaders(body)
            answer = connection.getresponse()
            content = answer.read()
        finally:
            connection.close()
        if fault == "hang":
            self._proxy.over.wait(60)
        if fault in {"lost", "hang"}:
            self.close_connection = True
            return
        headers = {name: value for name, value in answer.getheaders() if name.lower() != "transfer-encoding"}
        if self.command != "HEAD":
            headers["Content-Length"] = str(len(content))
        if fault == "truncate":
            content = content[: len(content) // 2]
            self.close_connection = True
        self._answer(answer.status, headers, content)

    def _answer(self, status: int, headers: dict[str, str], content: bytes) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()

    def log_message(self, *_: object) -> None:
        pass

    def handle(self) -> None:
        try:
            super().handle()
        except (ConnectionError, ValueError):  # the client hung up, or we did
            self.close_connection = True

    def finish(self) -> None:
        with suppress(ConnectionError, ValueError):
            super().finish()
