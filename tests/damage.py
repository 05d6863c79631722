"""Tools to damage a finished output: bytes, headers, JSON, and manifests forged to match."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import blake3
import numpy as np
import torch
import xxhash
from safetensors.torch import load_file, save_file

from nf4cli.checkpoint.discovery import MANIFEST

INDEX = "model.safetensors.index.json"
STATE = ".quant_state.bitsandbytes__nf4"
Tensors = dict[str, torch.Tensor]


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a JSON file in place."""
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document, indent=1) + "\n")


def config(root: Path, change: Callable[[dict[str, Any]], object]) -> None:
    edit_json(root / "config.json", change)


def quantization(root: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the quantization_config of config.json."""
    config(root, lambda c: change(c["quantization_config"]))


def manifest(root: Path, change: Callable[[dict[str, Any]], object]) -> None:
    edit_json(root / MANIFEST, change)


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file, and the offset of its first tensor byte."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return json.loads(file.read(length)), 8 + length


def shard_of(root: Path, key: str) -> Path:
    """The shard that holds a tensor."""
    for path in sorted(root.glob("model*.safetensors")):
        if key in read_header(path)[0]:
            return path
    raise KeyError(key)


def patch(root: Path, key: str, change: Callable[[bytearray], bytes | bytearray]) -> None:
    """Replace a tensor's bytes by as many others."""
    path = shard_of(root, key)
    header, start = read_header(path)
    first, last = header[key]["data_offsets"]
    data = bytearray(path.read_bytes())
    old = data[start + first : start + last]
    new = change(bytearray(old))
    assert len(new) == len(old)
    assert bytes(new) != bytes(old), "no damage done"
    data[start + first : start + last] = new
    path.write_bytes(data)


def flip(root: Path, key: str, place: int, bit: int = 0) -> None:
    """Flip one bit of a tensor."""

    def change(data: bytearray) -> bytearray:
        data[place] ^= 1 << bit
        return data

    patch(root, key, change)


def content(root: Path, key: str) -> bytes:
    """A tensor's bytes."""
    path = shard_of(root, key)
    header, start = read_header(path)
    first, last = header[key]["data_offsets"]
    return path.read_bytes()[start + first : start + last]


def swap(root: Path, a: str, b: str) -> None:
    """Exchange two tensors of equal size."""
    old_a, old_b = content(root, a), content(root, b)
    patch(root, a, lambda _: old_b)
    patch(root, b, lambda _: old_a)


def floats(root: Path, key: str, change: Callable[[np.ndarray], object]) -> None:
    """Change the values of a float32 tensor."""

    def apply(data: bytearray) -> bytes:
        values = np.frombuffer(data, np.float32).copy()
        change(values)
        return values.tobytes()

    patch(root, key, apply)


def state(root: Path, weight: str, **fields: object) -> None:
    """Change fields of a weight's quant_state, the blob's size unchanged."""

    def apply(blob: bytearray) -> bytes:
        text = json.dumps(json.loads(blob) | fields).encode()
        assert len(text) <= len(blob)
        return text.ljust(len(blob))

    patch(root, weight + STATE, apply)


def header(root: Path, key: str, **fields: object) -> None:
    """Change what a header says of a tensor, the header's length unchanged."""
    path = shard_of(root, key)
    entries, start = read_header(path)
    entries[key] |= fields
    text = json.dumps(entries, separators=(",", ":")).encode()
    assert len(text) <= start - 8
    data = path.read_bytes()
    path.write_bytes(data[:8] + text.ljust(start - 8) + data[start:])


def resave(root: Path, key: str, change: Callable[[Tensors], object], index: bool = True) -> None:
    """Save the shard that holds `key` anew, with other tensors, and (maybe) the index with it."""
    path = shard_of(root, key)
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})
    if index and (root / INDEX).is_file():

        def update(document: dict[str, Any]) -> None:
            weight_map = document["weight_map"]
            others = {k: f for k, f in weight_map.items() if f != path.name}
            document["weight_map"] = others | dict.fromkeys(tensors, path.name)

        edit_json(root / INDEX, update)


def forge(root: Path) -> None:
    """Rewrite every digest, size and state of the manifest, so that the files match it again."""
    found: dict[str, str] = {}
    states: dict[str, Any] = {}
    for path in root.glob("*.safetensors"):
        entries, start = read_header(path)
        data = path.read_bytes()[start:]
        for key, entry in entries.items():
            if key != "__metadata__":
                blob = data[slice(*entry["data_offsets"])]
                found[key] = xxhash.xxh3_128(blob).hexdigest()
                if key.endswith(STATE):
                    states[key.removesuffix(STATE)] = json.loads(blob)

    def change(document: dict[str, Any]) -> None:
        known = {k for r in document["tensors"].values() for k in r["output"]["digests"]}
        last = list(document["tensors"].values())[-1]  # a tensor of no record gets into this one
        last["output"]["digests"] |= {key: found[key] for key in found.keys() - known}
        for record in document["output"]["files"]:
            data = (root / record["name"]).read_bytes()
            record |= {"size": len(data), "digest": blake3.blake3(data).hexdigest()}
        for name, record in document["tensors"].items():
            digests = record.get("output", {}).get("digests", {})
            digests.update({key: found[key] for key in digests})
            if name in states:
                record["quant_state"] |= states[name]

    manifest(root, change)
