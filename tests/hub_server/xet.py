"""A store of the Hub's newer kind (Xet): files as runs of chunks, and chunks in blocks (xorbs).

Speaks what hf_xet 1.x asks: xorbs and shards are posted, a file is read as ranges of xorbs.  The
layout of both is in Xet's public specification: a xorb is chunks, each behind a head of 8 bytes; a
shard is records of 48 bytes, where each file has its terms (a range of chunks of a xorb), a proof
of each, and its SHA-256.
"""

from __future__ import annotations

import hashlib
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lz4.frame

from .handling import Handler
from .store import File

RECORD = 48  # bytes
_PROOFS, _METADATA = 1 << 31, 1 << 30
_END = b"\xff" * 32


@dataclass(frozen=True)
class Term:
    """Attributes:
    xorb: its hash, hexadecimal.
    size: bytes of the file.
    first, end: chunks of the xorb.
    """

    xorb: str
    size: int
    first: int
    end: int


class XetStore:
    """Args:
    root: for xorbs.

    Attributes:
        files: terms of each file, by its hash.
        hashes: the hash of a file by its SHA-256.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.root.mkdir()
        self.files: dict[str, list[Term]] = {}
        self.hashes: dict[str, str] = {}

    def xorb(self, name: str) -> Path:
        return self.root / name

    def take_shard(self, data: bytes) -> list[tuple[str, str, list[Term]]]:
        """Hash, SHA-256 and terms of each file that a shard describes."""
        at, found = RECORD, []
        while (name := data[at : at + 32]) != _END:
            flags, count = struct.unpack_from("<II", data, at + 32)
            terms = []
            for number in range(count):
                record = at + RECORD * (1 + number)
                _, size, first, end = struct.unpack_from("<IIII", data, record + 32)
                terms.append(Term(_text(data[record : record + 32]), size, first, end))
            at += RECORD * (1 + count * (2 if flags & _PROOFS else 1))
            assert flags & _METADATA, "a shard without the SHA-256 of its file"
            found.append((_text(name), _text(data[at : at + 32]), terms))
            at += RECORD
        return found

    def bytes_of(self, terms: list[Term]) -> bytes:
        """A file, put together."""
        parts = []
        for term in terms:
            data = self.xorb(term.xorb).read_bytes()
            chunks = [_chunk(data, at) for at in offsets(data)[term.first : term.end]]
            parts.append(b"".join(chunks))
            assert len(parts[-1]) == term.size
        return b"".join(parts)


def _text(name: bytes) -> str:
    """A hash as Xet writes it: four numbers of 64 bits."""
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", name))


def offsets(xorb: bytes) -> list[int]:
    """Where its chunks begin."""
    found, at = [], 0
    while at < len(xorb):
        found.append(at)
        at += 8 + int.from_bytes(xorb[at + 1 : at + 4], "little")
    return found


def _chunk(xorb: bytes, at: int) -> bytes:
    """Its bytes: as they are (0), LZ4 (1), or LZ4 of every fourth byte, from the first, ... (2)."""
    packed, scheme = int.from_bytes(xorb[at + 1 : at + 4], "little"), xorb[at + 4]
    size = int.from_bytes(xorb[at + 5 : at + 8], "little")
    data = xorb[at + 8 : at + 8 + packed]
    if scheme:
        data = lz4.frame.decompress(data)
    if scheme == 2:
        whole, start = bytearray(size), 0
        for lane in range(4):
            count = (size + 3 - lane) // 4
            whole[lane::4] = data[start : start + count]
            start += count
        data = bytes(whole)
    return data


class Xet(Handler):
    """The store's own port; its tokens come from the Hub."""

    cdn = True

    def answer(self) -> None:
        self.store: XetStore = self.hub.xet
        asked = re.fullmatch(r"/v1/(\w+)(?:/default)?(?:/(\w+))?", self.address.path)
        verb, name = (asked[1], asked[2]) if asked else ("", "")
        if verb != "data" and self.headers.get("Authorization") != "Bearer xet":
            self.reply(401, {"error": "no token of this store"})
        elif verb == "xorbs" and self.command == "POST":
            new = not self.store.xorb(name).exists()
            self.store.xorb(name).write_bytes(self.body_bytes)
            self.reply(200, {"was_inserted": new})
        elif verb == "shards":
            self._take_shard()
        elif verb == "reconstructions" and name in self.store.files:
            self._reconstruct(self.store.files[name])
        elif verb == "data":
            place = self.store.xorb(name)
            self.send_file(File(place, place.stat().st_size, None, name), {})
        else:  # also chunks that another file may have, and the second version of some questions
            self.reply(404, {"error": "not found"})

    def _take_shard(self) -> None:
        """Files whose chunks are here; what they are is looked at, as a careful store would."""
        for name, sha256, terms in self.store.take_shard(self.body_bytes):
            data = self.store.bytes_of(terms)
            if hashlib.sha256(data).hexdigest() != sha256:
                self.reply(400, {"error": f"these bytes are not those of {sha256}"})
                return
            self.hub.store.put(data)
            self.store.files[name] = terms
            self.store.hashes[sha256] = name
        self.reply(200, {"result": 1})

    def _reconstruct(self, terms: list[Term]) -> None:
        """All of a file, or the answer that a range of it begins behind its end."""
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
        size = sum(term.size for term in terms)
        if asked and int(asked[1]) >= size:
            self.reply(416)
            return
        start, stop = (int(asked[1]), min(int(asked[2]) + 1, size)) if asked else (0, size)
        parts: list[dict[str, Any]] = []
        fetch: dict[str, list[dict[str, Any]]] = {}
        position = into = 0
        for term in terms:
            if position < stop and position + term.size > start:
                if not parts:
                    into = start - position
                parts.append(
                    {"hash": term.xorb, "unpacked_length": term.size, "range": _range(term)}
                )
                fetch.setdefault(term.xorb, []).append(self._fetch(term))
            position += term.size
        answer = {"offset_into_first_range": into, "terms": parts, "fetch_info": fetch}
        self.reply(200, answer)

    def _fetch(self, term: Term) -> dict[str, Any]:
        data = self.store.xorb(term.xorb).read_bytes()
        places = [*offsets(data), len(data)]
        return {
            "range": _range(term),
            "url": f"{self.hub.cas}/v1/data/{term.xorb}",
            "url_range": {"start": places[term.first], "end": places[term.end] - 1},
        }


def _range(term: Term) -> dict[str, int]:
    return {"start": term.first, "end": term.end}
