"""The Hub itself: models, their files, uploads and commits."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import time
from typing import Any
from urllib.parse import parse_qs, quote, unquote

import yaml

from .handling import Handler
from .store import File, Repo, is_lfs

TOKENS = {"hf_write": "write", "hf_read": "read"}
"""Of the user `me`, who may see every private and gated repository."""


class Api(Handler):
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
        write = verb in ("preupload", "commit", "xet-write-token")
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
        elif verb in ("xet-read-token", "xet-write-token"):
            self._xet_token()
        elif verb == "auth-check":
            self.reply(200)
        else:
            self._info(repo, commit)

    def _xet_token(self) -> None:
        expires = int(time.time()) + 3600
        self.reply(
            200,
            {"casUrl": self.hub.cas, "accessToken": "xet", "exp": expires},
            {
                "X-Xet-Cas-Url": self.hub.cas,
                "X-Xet-Access-Token": "xet",
                "X-Xet-Token-Expiration": str(expires),
            },
        )

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
        if (stored := self.hub.xet.hashes.get(file.sha256)) is not None:
            token = f"{self.hub.url}/api/models/{name}/xet-read-token/{commit}"
            headers["X-Xet-Hash"] = stored
            headers["Link"] = f'<{token}>; rel="xet-auth"'
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
        body = json.loads(self.body_bytes)
        if "xet" in body["transfers"]:  # as huggingface_hub 0.36 asks; 2.x has no need to
            self.reply(200, {"transfer": "xet", "objects": body["objects"]})
            return
        for asked in body["objects"]:
            found = {"oid": asked["oid"], "size": asked["size"]}
            if not self.hub.store.object(asked["oid"]).exists():
                href = f"{self.hub.cdn}/upload/{asked['oid']}?expires={time.time() + 60}"
                header = {}
                if self.hub.part_size:
                    count = -(-asked["size"] // self.hub.part_size)
                    header = {str(n): f"{href}&part={n}" for n in range(1, count + 1)}
                    header["chunk_size"] = str(self.hub.part_size)
                    href = f"{self.hub.url}/complete/{asked['oid']}"
                found["actions"] = {"upload": {"href": href, "header": header}}
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
