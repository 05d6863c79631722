"""The server: the Hub itself on one port, and on another what large files are redirected to."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

import yaml

from .faults import Fault, Faults
from .store import File, Repo, Store, environment_of, is_lfs

_PIECE = 1 << 16
TOKENS = {"hf_write": "write", "hf_read": "read"}
"""Of the user `me`, who may see every private and gated repository."""


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


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64
    hub: Hub

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is nothing to report."""


class Hub:
    """A Hub on this machine; a context manager.

    Args:
        root: where uploads are kept.

    Attributes:
        faults: what goes wrong.
        log: every request that was answered.
        rate: bytes a second of every body, None for no limit.
    """

    def __init__(self, root: Path, port: int = 0) -> None:
        self.store = Store(root)
        self.faults = Faults()
        self.log: list[Request] = []
        self.rate: float | None = None
        self.lock = threading.RLock()
        self._servers = [_serve(self, kind, port) for kind, port in ((_Api, port), (_Cdn, 0))]
        self.url, self.cdn = (f"http://127.0.0.1:{s.server_port}" for s in self._servers)

    def __enter__(self) -> Hub:
        return self

    def __exit__(self, *_: object) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def add(self, name: str, source: Path | dict[str, bytes | Path], **options: bool) -> Repo:
        return self.store.add(name, source, **options)

    def environment(self, home: Path, token: str | None = "hf_write") -> dict[str, str]:
        """For a process that speaks to this Hub and to nothing else."""
        return environment_of(self.url, home, token)

    def requests(self, pattern: str) -> list[Request]:
        """Those whose "METHOD /path" the pattern is found in."""
        return [r for r in self.log if re.search(pattern, f"{r.method} {r.path}")]

    def sent(self, pattern: str = "") -> int:
        """Bytes of the bodies of those."""
        return sum(r.sent for r in self.requests(pattern))


def _serve(hub: Hub, kind: type[BaseHTTPRequestHandler], port: int) -> _Server:
    server = _Server(("127.0.0.1", port), kind)
    server.hub = hub
    threading.Thread(
        target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
    ).start()
    return server


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server
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
        self.body_bytes = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.fault = self.hub.faults.take(f"{self.command} {self.path}") or Fault("", times=0)
        if self.fault.drop:
            self._close()
        elif self.fault.status:
            self.reply(self.fault.status, self.fault.body, self.fault.headers)
        else:
            self.answer()

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
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
        self._note(status, len(data) if self.command != "HEAD" else 0)

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
        self.send_header("Content-Length", str(stop - start))
        self.end_headers()
        sent = 0
        try:
            if self.command != "HEAD":
                sent = self._send_range(file.place, start, stop)
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


class _Cdn(_Handler):
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


class _Api(_Handler):
    """The Hub itself."""

    def answer(self) -> None:
        parts = [unquote(part) for part in self.address.path.strip("/").split("/")]
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        self.role = TOKENS.get(token)
        if token and self.role is None:
            self.reply(401, {"error": "Invalid username or password."})
        elif parts == ["api", "whoami-v2"]:
            self._whoami()
        elif parts == ["api", "repos", "create"]:
            self._create()
        elif parts == ["api", "validate-yaml"]:
            self._validate_card()
        elif parts[:2] == ["api", "models"] and len(parts) >= 4:
            self._model("/".join(parts[2:4]), parts[4:])
        elif parts[-3:-1] == ["lfs", "objects"] or parts[-2:] == ["objects", "batch"]:
            self._batch("/".join(parts[:2]).removesuffix(".git"))
        elif "complete" in parts:
            self._complete(parts[-1])
        elif len(parts) >= 5 and parts[2] == "resolve":
            self._resolve("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        else:
            self.reply(404, {"error": "no such page"})

    def _error(self, status: int, code: str, message: str) -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": message}
        self.reply(status, {"error": message}, headers)

    def _repo(self, name: str, write: bool = False) -> Repo | None:
        """A repository that the asker may see, or the answer that there is none."""
        repo = self.hub.store.repos.get(name)
        if repo is None or (repo.private and self.role is None):
            status = 404 if self.role else 401
            self._error(status, "RepoNotFound", "Repository not found")
            return None
        if write and self.role != "write":
            status = 403 if self.role else 401
            self.reply(status, {"error": "You need write access to this repository"})
            return None
        return repo

    def _whoami(self) -> None:
        if self.role is None:
            self.reply(401, {"error": "Invalid credentials"})
            return
        token = {"displayName": "test", "role": self.role}
        auth = {"type": "access_token", "accessToken": token}
        self.reply(200, {"type": "user", "name": "me", "orgs": [{"name": "org"}], "auth": auth})

    def _validate_card(self) -> None:
        """The head of a README.md, of which the Hub takes fields of some types only."""
        content = json.loads(self.body_bytes)["content"]
        head = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
        try:
            fields = yaml.safe_load(head[1]) if head else {}
            wrong = [
                f'"{name}" must be a string'
                for name in ("license", "base_model_relation", "library_name", "pipeline_tag")
                if not isinstance(fields.get(name, ""), str)
            ]
        except yaml.YAMLError as error:
            wrong = [str(error)]
        errors = [{"message": message} for message in wrong]
        self.reply(400 if errors else 200, {"errors": errors, "warnings": []})

    def _create(self) -> None:
        asked = json.loads(self.body_bytes)
        if self.role != "write":
            self.reply(403 if self.role else 401, {"error": "You need a token that may write"})
            return
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        url = f"{self.hub.url}/{name}"
        with self.hub.lock:
            if name in self.hub.store.repos:
                self.reply(409, {"error": "You already created this model repo", "url": url})
                return
            private = asked.get("private") is True or asked.get("visibility") == "private"
            self.hub.store.repos[name] = Repo(name, private=private)
        self.reply(200, {"url": url, "name": name, "id": name})

    def _model(self, name: str, rest: list[str]) -> None:
        verb = rest[0] if rest else "info"
        write = verb in ("preupload", "commit")
        repo = self._repo(name, write)
        if repo is None:
            return
        revision = rest[1] if len(rest) > 1 else "main"
        commit = repo.resolve(revision)
        if commit is None:
            self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        elif verb == "commit":
            self._commit(repo, revision)
        elif verb == "preupload":
            self._preupload(repo)
        elif verb in ("tree", "paths-info"):
            self._tree(repo.commits[commit], verb, "/".join(rest[2:]))
        elif verb == "refs":
            branches = [
                {"name": n, "ref": f"refs/heads/{n}", "targetCommit": c}
                for n, c in repo.branches.items()
            ]
            self.reply(200, {"branches": branches, "tags": [], "converts": []})
        elif verb == "auth-check":
            self.reply(200)
        else:
            self._info(repo, commit)

    def _info(self, repo: Repo, commit: str) -> None:
        siblings = [
            {"rfilename": name, "size": f.size, "blobId": f.blob, **_lfs(f)}
            for name, f in repo.commits[commit].items()
        ]
        gated = "manual" if repo.gated else False
        self.reply(
            200,
            {
                "_id": "1", "id": repo.name, "modelId": repo.name, "sha": commit,
                "private": repo.private, "gated": gated, "disabled": False, "tags": [],
                "downloads": 0, "likes": 0, "siblings": siblings,
            },
        )  # fmt: skip

    def _tree(self, files: dict[str, File], verb: str, directory: str) -> None:
        if verb == "paths-info":
            asked = parse_qs(self.body_bytes.decode()).get("paths") or []
            if self.headers.get("Content-Type", "").startswith("application/json"):
                asked = json.loads(self.body_bytes)["paths"]
            names = [name for name in asked if name in files]
        else:
            names = [name for name in files if name.startswith(directory and f"{directory}/")]
        self.reply(
            200,
            [
                {"type": "file", "path": n, "size": files[n].size, "oid": files[n].blob,
                 **_lfs(files[n], "oid")}
                for n in names
            ],
        )  # fmt: skip

    def _resolve(self, name: str, revision: str, path: str) -> None:
        repo = self._repo(name)
        if repo is None:
            return
        if repo.gated and self.role is None:
            self._error(401, "GatedRepo", "Access to this model is restricted")
            return
        commit = repo.resolve(revision)
        if commit is None:
            self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return
        file = repo.commits[commit].get(path)
        if file is None:
            headers = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}
            self.reply(404, {"error": "Entry not found"}, headers)
            return
        headers = {"X-Repo-Commit": commit, "ETag": f'"{file.etag}"'}
        if file.sha256 is None:
            self.send_file(file, headers)
            return
        place = f"/files/{quote(name, '')}/{commit}/{quote(path)}"
        self.reply(
            302,
            headers={
                **headers,
                "X-Linked-ETag": f'"{file.sha256}"',
                "X-Linked-Size": str(file.size),
                "Location": f"{self.hub.cdn}{place}?expires={time.time() + 60}&signature=s",
            },
        )

    def _preupload(self, repo: Repo) -> None:
        files = [
            {
                "path": f["path"],
                "uploadMode": "lfs" if is_lfs(f["path"], f["size"]) else "regular",
                "shouldIgnore": False,
                "oid": repo.head[f["path"]].etag if f["path"] in repo.head else None,
            }
            for f in json.loads(self.body_bytes)["files"]
        ]
        self.reply(200, {"files": files})

    def _batch(self, name: str) -> None:
        if self._repo(name, write=True) is None:
            return
        objects = []
        for asked in json.loads(self.body_bytes)["objects"]:
            found = {"oid": asked["oid"], "size": asked["size"]}
            if not self.hub.store.object(asked["oid"]).exists():
                href = f"{self.hub.cdn}/upload/{asked['oid']}?expires={time.time() + 60}"
                found["actions"] = {"upload": {"href": href, "header": {}}}
            objects.append(found)
        self.reply(200, {"transfer": "basic", "objects": objects})

    def _complete(self, oid: str) -> None:
        parts = sorted(self.hub.store.objects.glob(f"{oid}.*"), key=lambda p: int(p.suffix[1:]))
        data = b"".join(part.read_bytes() for part in parts)
        if hashlib.sha256(data).hexdigest() != oid:
            self.reply(400, b"these bytes have another digest")
            return
        self.hub.store.put(data)
        self.reply(200)

    def _commit(self, repo: Repo, branch: str) -> None:
        lines = [json.loads(line) for line in self.body_bytes.splitlines() if line]
        header = lines[0]["value"]
        with self.hub.lock:
            head = repo.branches[branch]
            if header.get("parentCommit") not in (None, head):
                self.reply(412, {"error": "A commit has happened since. Please refresh"})
                return
            files = dict(repo.commits[head])
            for line in lines[1:]:
                value = line["value"]
                if line["key"] == "file":
                    data = base64.b64decode(value["content"])
                    files[value["path"]] = self.hub.store.file(value["path"], data)
                elif line["key"] == "lfsFile":
                    place = self.hub.store.object(value["oid"])
                    if not place.exists():
                        error = (
                            f"LFS pointer pointed to a file that does not exist: {value['path']}"
                        )
                        self.reply(400, {"error": error})
                        return
                    files[value["path"]] = self.hub.store.file(value["path"], place)
                elif line["key"] == "deletedFile":
                    del files[value["path"]]
            commit = repo.commit(files, header["summary"], branch)
        url = f"{self.hub.url}/{repo.name}/commit/{commit}"
        self.reply(200, {"success": True, "commitUrl": url, "commitOid": commit})


def _lfs(file: File, key: str = "sha256") -> dict[str, Any]:
    if file.sha256 is None:
        return {}
    return {"lfs": {key: file.sha256, "size": file.size, "pointerSize": 130}}
