"""The server: the Hub itself on one port, on another what large files are redirected to, and on a
third the Xet store."""

from __future__ import annotations

import hashlib
import re
import threading
import time
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from urllib.parse import parse_qs, unquote

from .api import Api
from .faults import Faults
from .handling import Handler, Request, Server
from .store import Repo, Store, environment_of
from .xet import Xet, XetStore


class Hub:
    """A Hub on this machine; a context manager.

    Args:
        root: where uploads are kept.

    Attributes:
        faults: what goes wrong.
        log: every request that was answered.
        rate: bytes a second of every body, None for no limit.
        xet: files that came by the newer way of uploads, for clients that take it.
        url, cdn, cas: of the Hub, of large files, of the Xet store.
        part_size: bytes of the parts that an upload comes in, None for one whole.
    """

    def __init__(self, root: Path, port: int = 0) -> None:
        self.store = Store(root)
        self.xet = XetStore(root / "xorbs")
        self.faults = Faults()
        self.log: list[Request] = []
        self.rate: float | None = None
        self.part_size: int | None = None
        self.lock = threading.RLock()
        self._servers = [_serve(self, kind, n) for kind, n in ((Api, port), (Cdn, 0), (Xet, 0))]
        self.url, self.cdn, self.cas = (f"http://127.0.0.1:{s.server_port}" for s in self._servers)

    def __enter__(self) -> Hub:
        return self

    def __exit__(self, *_: object) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def add(self, name: str, source: Path | dict[str, bytes | Path], **options: bool) -> Repo:
        return self.store.add(name, source, **options)

    def environment(
        self, home: Path, token: str | None = "hf_write", xet: bool = False
    ) -> dict[str, str]:
        """For a process that speaks to this Hub and to nothing else.

        Args:
            xet: with the store that huggingface_hub 2.x sends every upload to, where it may.
        """
        found = environment_of(self.url, home, token)
        if xet:
            del found["HF_HUB_DISABLE_XET"]
        return found

    def requests(self, pattern: str) -> list[Request]:
        """Those whose "METHOD /path" the pattern is found in."""
        return [r for r in self.log if re.search(pattern, f"{r.method} {r.path}")]

    def sent(self, pattern: str = "") -> int:
        """Bytes of the bodies of those."""
        return sum(r.sent for r in self.requests(pattern))


def _serve(hub: Hub, kind: type[BaseHTTPRequestHandler], port: int) -> Server:
    server = Server(("127.0.0.1", port), kind)
    server.hub = hub
    threading.Thread(
        target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
    ).start()
    return server


class Cdn(Handler):
    """Where large files are, behind addresses that are good for a minute."""

    cdn = True

    def answer(self) -> None:
        query = parse_qs(self.address.query)
        if float(query.get("expires", ["0"])[0]) < time.time():
            self.reply(403, b"<Error><Code>AccessDenied</Code>Request has expired</Error>")
            return
        if self.command == "PUT":
            self._take(self.address.path.rpartition("/")[2], query)
            return
        _, _, name, commit, path = self.address.path.split("/", 4)
        repo = self.hub.store.repos[unquote(name)]
        file = repo.commits[commit][unquote(path)]
        self.send_file(file, {"ETag": f'"{file.etag}"'})

    def _take(self, oid: str, query: dict[str, list[str]]) -> None:
        """The bytes of an upload, all of them or a part."""
        place = self.hub.store.object(oid)
        if "part" in query:
            place = place.with_name(f"{oid}.{query['part'][0]}")
        elif hashlib.sha256(self.body_bytes).hexdigest() != oid:
            self.reply(400, b"these bytes have another digest")
            return
        place.write_bytes(self.body_bytes)
        self.reply(200, headers={"ETag": f'"{len(self.body_bytes)}"'})
