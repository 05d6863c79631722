"""What both ports have in common: requests, their log, files in ranges, faults."""

from __future__ import annotations

import json
import re
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from .faults import Fault
from .store import File

_PIECE = 1 << 16


@dataclass(frozen=True)
class Request:
    """What was asked, and how it was answered.

    Attributes:
        sent: bytes of the body that went out.
        authorized: it carried a token.
        cdn: it went to the second port.
    """

    method: str
    path: str
    range: str | None
    status: int
    sent: int
    authorized: bool
    cdn: bool


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64
    hub: Any

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is nothing to report."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Server
    cdn = False

    def setup(self) -> None:
        super().setup()
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def log_message(self, *_: object) -> None: ...

    def answer(self) -> None:
        raise NotImplementedError

    def _handle(self) -> None:
        self.hub = self.server.hub
        self.address = urlsplit(self.path)
        self.body_bytes = self._body()
        self.fault = self.hub.faults.take(f"{self.command} {self.path}") or Fault("", times=0)
        if self.fault.drop:
            self._close()
        elif self.fault.status:
            self.reply(self.fault.status, self.fault.body, self.fault.headers)
        else:
            self.answer()

    def _body(self) -> bytes:
        """What the client sends, no faster than the link is."""
        size, rate = int(self.headers.get("Content-Length") or 0), self.hub.rate
        if rate is None:
            return self.rfile.read(size)
        data, begun = bytearray(), time.monotonic()
        while len(data) < size:
            data += self.rfile.read(min(_PIECE, size - len(data)))
            time.sleep(max(0.0, len(data) / rate - (time.monotonic() - begun)))
        return bytes(data)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _handle  # noqa: N815 - their names

    def _close(self) -> None:
        self.close_connection = True
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)
        self._note(0, 0)

    def _note(self, status: int, sent: int) -> None:
        authorized = "Authorization" in self.headers
        self.hub.log.append(
            Request(
                self.command,
                self.path,
                self.headers.get("Range"),
                status,
                sent,
                authorized,
                self.cdn,
            )
        )

    def reply(
        self, status: int, body: bytes | dict[str, Any] | list[Any] = b"", headers: Any = None
    ) -> None:
        if self.fault.lose:
            self._close()
            return
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        if not isinstance(body, bytes):
            self.send_header("Content-Type", "application/json")
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if not self.fault.endless:
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        time.sleep(self.fault.stall)
        if self.command != "HEAD":
            self.wfile.write(data)
            self._go_on()
        self._note(status, len(data) if self.command != "HEAD" else 0)

    def _go_on(self) -> None:
        """A body without an end, where that is the fault."""
        self.close_connection |= self.fault.endless
        with suppress(OSError):
            while self.fault.endless:
                self.wfile.write(bytes(_PIECE))

    def send_file(self, file: File, headers: dict[str, str]) -> None:
        """A file or the part of it that was asked for, with whatever is to go wrong."""
        start, stop, status = 0, file.size, 200
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range") or "")
        if asked and not self.fault.whole:
            if not asked[1]:
                start = max(0, file.size - int(asked[2]))
            else:
                start = int(asked[1])
                stop = min(file.size, int(asked[2]) + 1) if asked[2] else file.size
            if start >= file.size:
                self.reply(416, headers={"Content-Range": f"bytes */{file.size}"})
                return
            status = 206
            headers = {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{file.size}"}
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Accept-Ranges", "bytes")
        if not self.fault.endless:
            self.send_header("Content-Length", str(stop - start))
        self.end_headers()
        sent = 0
        try:
            if self.command != "HEAD":
                sent = self._send_range(file.place, start, stop)
                self._go_on()
        finally:
            self._note(status, sent)

    def _send_range(self, place: Path, start: int, stop: int) -> int:
        rate, begun = self.fault.rate or self.hub.rate, time.monotonic()
        time.sleep(self.fault.stall)
        sent = 0
        with place.open("rb") as file:
            file.seek(start)
            while start + sent < stop:
                data = bytearray(file.read(min(_PIECE, stop - start - sent)))
                flip = self.fault.flip
                if flip is not None and 0 <= flip - start - sent < len(data):
                    data[flip - start - sent] ^= 1
                if self.fault.cut is not None and sent + len(data) > self.fault.cut:
                    data = data[: self.fault.cut - sent]
                    self.wfile.write(data)
                    self.close_connection = True
                    self.connection.shutdown(socket.SHUT_RDWR)
                    return sent + len(data)
                self.wfile.write(data)
                sent += len(data)
                if rate is not None:
                    time.sleep(max(0.0, sent / rate - (time.monotonic() - begun)))
        return sent
