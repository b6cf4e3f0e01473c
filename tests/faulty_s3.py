"""A proxy between a client and an S3 server that spoils some requests as networks and busy servers do."""

from __future__ import annotations

import http.client
import random
import socket
import struct
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

SLOW_DOWN = (b'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>SlowDown</Code><Message>Please reduce your request rate.'
             b"</Message></Error>")
FAULTS = ("slow_down", "reset", "stall", "truncate")
HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "date", "server"}


class FaultyS3(ThreadingHTTPServer):
    """Hands requests on to `upstream` ("host:port") and spoils a share of them; which ones depends on `seed` and on their
    number alone. A context manager; `url` is what clients are given.

    slow_down: 503 without the server being asked. reset: the connection is reset, before the server is asked, in the middle
    of what is sent to it, or after it has done it. stall: the answer stops half-way for `stall_seconds` and the connection is
    closed. truncate: the answer ends half-way.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, upstream: str, share: float = 0.05, seed: int = 0, stall_seconds: float = 600.0,
                 kinds: tuple[str, ...] = FAULTS) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream, self.share, self.kinds, self.stall_seconds = upstream, share, kinds, stall_seconds
        self.requests, self.faults = 0, Counter[str]()
        self.away = False
        """Reset every connection, as if there were no server."""
        self.spoil_after: int | None = None
        """Number of requests after which that begins by itself."""
        self.refuse_writes = 0.0
        """Number of writes that are refused (503) from now on."""
        self.closed = threading.Event()
        self._random, self._lock = random.Random(seed), threading.Lock()
        self._thread = threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self) -> FaultyS3:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closed.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients go away; that is what this is for."""

    def draw(self, writes: bool) -> tuple[str | None, float]:
        """The fault of the next request, if any, and a number in [0, 1) to choose its variant by."""
        with self._lock:
            self.requests += 1
            spoil, kind, variant = self._random.random() < self.share, self._random.choice(self.kinds), self._random.random()
            if self.away or (self.spoil_after is not None and self.requests > self.spoil_after):
                spoil, kind, variant = True, "reset", 0.0
            if writes and self.refuse_writes > 0:
                self.refuse_writes -= 1
                spoil, kind = True, "slow_down"
            if spoil:
                self.faults[kind] += 1
        return (kind if spoil else None), variant


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultyS3

    def setup(self) -> None:
        super().setup()
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault, variant = self.server.draw(self.command in ("PUT", "POST", "DELETE"))
        if fault == "slow_down":
            self._answer(503, [("Content-Type", "application/xml")], SLOW_DOWN)
        elif fault == "reset" and variant < 2 / 3:
            if variant > 1 / 3 and body:
                self._ask(body, half=True)
            self._reset()
        else:
            status, headers, data = self._ask(body)
            if fault == "reset":
                self._reset()
            else:
                self._answer(status, headers, data, fault)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _serve

    def _ask(self, body: bytes, half: bool = False) -> tuple[int, list[tuple[str, str]], bytes]:
        """The server's answer; with `half` it gets half of the body and no more."""
        host, _, port = self.server.upstream.partition(":")
        upstream = http.client.HTTPConnection(host, int(port), timeout=60)
        try:
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in ("connection", "expect"):
                    upstream.putheader(name, value)
            upstream.endheaders()
            upstream.send(body[:len(body) // 2] if half else body)
            if half:
                return 0, [], b""
            response = upstream.getresponse()
            return response.status, response.getheaders(), response.read()
        finally:
            upstream.close()

    def _answer(self, status: int, headers: list[tuple[str, str]], data: bytes, fault: str | None = None) -> None:
        length = str(len(data))
        if self.command == "HEAD":
            length = next((value for name, value in headers if name.lower() == "content-length"), "0")
        self.send_response(status)
        for name, value in headers:
            if name.lower() not in HOP_BY_HOP:
                self.send_header(name, value)
        if status != 204:
            self.send_header("Content-Length", length)
        head = b"".join(self._headers_buffer) + b"\r\n"
        self._headers_buffer = []
        answer = head + (data if self.command != "HEAD" else b"")
        if fault is None:
            self.wfile.write(answer)
            return
        self.wfile.write(answer[:len(answer) // 2 if len(data) < len(head) else len(head) + len(data) // 2])
        self.wfile.flush()
        if fault == "stall":
            self.server.closed.wait(self.server.stall_seconds)
        self.close_connection = True

    def _reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 (the name is the base class's)
        pass
