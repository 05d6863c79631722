"""What is fuzzed: each target takes bytes and raises only where nf4 is wrong.

A refusal (`Nf4Error`) is a good answer to bad bytes.  Anything else that is raised, and any answer
that differs from the safetensors library's, is a finding.  Files must exist, since the library
opens paths.
"""

from __future__ import annotations

import atexit
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from math import prod
from pathlib import Path

import safetensors

from nf4cli.checkpoint import bnb_format
from nf4cli.checkpoint.discovery import find_shards, open_checkpoint
from nf4cli.checkpoint.reader import ByteReader, read_shard
from nf4cli.checkpoint.types import TensorInfo
from nf4cli.checkpoint.untrusted import printable
from nf4cli.checkpoint.writer import fill_shards, lay_out
from nf4cli.errors import InputError, Nf4Error
from nf4cli.format.config import QuantConfig
from nf4cli.format.dtypes import ITEMSIZE
from nf4cli.output.manifest import Manifest
from nf4cli.output.pipeline_record import Record
from nf4cli.planning.make_plan import make_plan
from nf4cli.planning.pipeline_plan import components_of, copies_of

HEADER = 8


@cache
def place() -> Path:
    """A directory of this process, with a tiny model in `model`.

    It is NF4_FUZZ_PLACE, an empty directory, or else a temporary one, removed at the end.
    """
    given = os.environ.get("NF4_FUZZ_PLACE")
    root = Path(given or tempfile.mkdtemp(prefix="nf4-fuzz-"))
    if not given:
        atexit.register(shutil.rmtree, root, ignore_errors=True)
    for name in ("model", "float8", "index", "pipeline/unet", "manifest"):
        (root / name).mkdir(parents=True)
        (root / name / "model.safetensors").write_bytes(tiny_model())
    (root / "float8" / "model.safetensors").write_bytes(float8_model())
    (root / "index" / "model.safetensors").rename(root / "index" / "a.safetensors")
    (root / "pipeline" / "unet" / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    return root


@cache
def tiny_model() -> bytes:
    names = ("model.layers.0.mlp.up_proj", "lm_head", "model.layers.0.experts.0.gate", "a.gate")
    layout = lay_out("x", [(f"{name}.weight", "BF16", (64, 4)) for name in names], ())
    return layout.header + bytes(layout.size - len(layout.header))


@cache
def float8_model() -> bytes:
    name = "model.layers.0.mlp.up_proj.weight"
    kept = [("model.norm.weight", "BF16", (64,)), (name, "F8_E4M3", (64, 4))]
    layout = lay_out("x", kept, [(f"{name}_scale_inv", "F32", (1, 1))])
    return layout.header + bytes(layout.size - len(layout.header))


def reader(data: bytes) -> None:
    """We accept nothing that the library refuses, and see the same bytes."""
    path = place() / "reader.safetensors"
    path.write_bytes(data)
    try:
        expected = dict(safetensors.deserialize(data))
    except safetensors.SafetensorError:
        expected = None
    try:
        shard = read_shard(path)
    except InputError as error:
        printable(str(error)).encode()
        return
    assert expected is not None, "the library refuses what we accept"
    assert {t.name for t in shard.tensors} == expected.keys()
    place_now = shard.data_start
    with ByteReader(path, shard.size) as file:
        for tensor in shard.tensors:
            there = expected[tensor.name]
            assert (tensor.dtype, list(tensor.shape)) == (there["dtype"], there["shape"])
            assert tensor.start == place_now
            assert file.read(tensor.start, tensor.nbytes).tobytes() == bytes(there["data"])
            place_now = tensor.stop
    assert place_now == shard.size == len(data)


def reader_text(data: bytes) -> None:
    """The same with a length word that fits: every execution reaches the JSON."""
    header, _, body = data.partition(b"\n\n")
    reader(len(header).to_bytes(HEADER, "little") + header + body)


def writer(data: bytes) -> None:
    """The library and we accept all that we write, and read the layout back."""
    entries: dict[str, tuple[str, str, tuple[int, ...]]] = {}
    dtypes = sorted(ITEMSIZE)
    for line in data.split(b"\n")[:50]:
        key = line[3:].decode("utf-8", "ignore")
        shape = tuple(b % 5 for b in line[1:3][: line[0] % 3]) if line else ()
        if key != "__metadata__":
            entries[key] = (key, dtypes[(line or b"\0")[0] % len(dtypes)], shape)
    for part in fill_shards(entries.values(), lambda entry: [entry], 100):
        layout = lay_out("x", part[::2], part[1::2])
        content = layout.header + bytes(i % 251 for i in range(layout.size - len(layout.header)))
        found = dict(safetensors.deserialize(content))
        assert found.keys() == {key for key, _, _ in part}
        path = place() / "writer.safetensors"
        path.write_bytes(content)
        assert {t.name: t for t in read_shard(path).tensors} == layout.tensors
        for key, dtype, shape in part:
            tensor = layout.tensors[key]
            assert (found[key]["dtype"], found[key]["shape"]) == (dtype, list(shape))
            assert bytes(found[key]["data"]) == content[tensor.start : tensor.stop]
            assert tensor.start % min(8, ITEMSIZE[dtype]) == 0 or not tensor.nbytes


def state(data: bytes) -> None:
    """A state that is accepted is sane, and is itself again when it is written."""
    try:
        found = bnb_format.decode_state(data, "state")
    except InputError:
        return
    assert 0 < prod(found.shape) < 2**48
    assert abs(found.nested_offset) < 3.5e38
    assert bnb_format.decode_state(bnb_format.encode_state(found), "state") == found
    bnb_format.expected_tensors("x.weight", found, "uint8")


def config(data: bytes) -> None:
    """A plan from any config.json beside a good file."""
    for name in ("model", "float8"):
        plan_from(place() / name, data)


def plan_from(root: Path, data: bytes) -> None:
    (root / "config.json").write_bytes(data)
    try:
        plan = make_plan(open_checkpoint(root), QuantConfig(), lambda _: None)
    except Nf4Error as error:
        printable(str(error)).encode()
        return
    json.dumps(plan.output_config, ensure_ascii=True)
    assert plan.shard_bytes > 0


def index(data: bytes) -> None:
    """An index of any content: no file beside the directory is opened."""
    root = place() / "index"
    (root / "model.safetensors.index.json").write_bytes(data)
    try:
        _, files = find_shards(root)
        open_checkpoint(root)
    except InputError:
        return
    assert all(file.parent == root for file in files)


def manifest(data: bytes) -> None:
    """A manifest that is accepted can be written, and read, again."""
    path = place() / "manifest" / "nf4_manifest.json"
    path.write_bytes(data)
    try:
        found = Manifest.from_file(path)
    except InputError:
        return
    path.write_text(found.to_json())
    again = Manifest.from_file(path)
    assert again.tensors.keys() == found.tensors.keys()
    assert again.output_files == found.output_files


def pipeline(data: bytes) -> None:
    """model_index.json and nf4_pipeline.json of any content."""
    root = place() / "pipeline"
    (root / "model_index.json").write_bytes(data)
    (root / "nf4_pipeline.json").write_bytes(data)
    try:
        found = components_of(root)
        copies = copies_of(root, found, ())
        assert all((root / name).resolve().is_relative_to(root) for name in copies.files)
    except InputError:
        pass
    try:
        record = Record.from_file(root / "nf4_pipeline.json")
    except InputError:
        return
    assert all(os.path.basename(name) == name for name in record.components)


TARGETS: dict[str, Callable[[bytes], None]] = {
    target.__name__: target
    for target in (reader, reader_text, writer, state, config, index, manifest, pipeline)
}


def seeds(name: str) -> list[bytes]:
    """Good inputs to begin with."""
    model = tiny_model()
    length = int.from_bytes(model[:HEADER], "little")
    header = model[HEADER : HEADER + length]
    short = lay_out("x", [("a", "F32", (2, 1)), ("b", "I8", (3,)), ("c", "F16", (0,))], ())
    body = bytes(range(short.size - len(short.header)))
    nested = bnb_format.QuantState("nf4", 64, "bfloat16", (64, 4), True, nested_offset=0.25)
    plain = bnb_format.QuantState("fp4", 4096, "float16", (7,), False)
    record = {
        "nf4_pipeline": 1, "tool": {}, "digest": "blake3", "components": ["unet"],
        "files": [{"name": "a", "size": 1, "digest": "00"}],
    }  # fmt: skip
    source = {"file": "a", "dtype": "BF16", "shape": [64, 4], "digest": "00"}
    kept = {"action": "copy", "rule": "head", "reason": "a head", "source": source,
            "output": {"file": "a", "digests": {"lm_head.weight": "00"}}}  # fmt: skip
    packed = {
        **kept, "action": "quantize", "error": {"rel_rmse": 0.1, "max_abs": 1.0},
        "quant_state": {**json.loads(bnb_format.encode_state(nested)), "nested": True},
    }  # fmt: skip
    whole = {
        "nf4_manifest": 1, "tool": {"name": "nf4cli", "version": "1"},
        "digests": {"files": "blake3", "tensors": "xxh3_128"},
        "recipe": {"quant_type": "nf4", "blocksize": 64, "keep": ["a"]},
        "source": {"name": "m", "files": [{"name": "a", "size": 1, "digest": "00"}]},
        "output": {"files": [], "parameters": 1, "quantized_parameters": 1, "bits_per_weight": 4.5},
        "tensors": {"lm_head.weight": kept, "x.weight": packed},
    }  # fmt: skip
    shards = dict.fromkeys((t.name for t in read_model_names(header)), "a.safetensors")
    configs = [
        {"model_type": "llama", "vocab_size": 64, "num_hidden_layers": 1, "hidden_size": 4,
         "dtype": "bfloat16", "architectures": ["LlamaForCausalLM"], "text_config": {}},
        {"_class_name": "WanTransformer3DModel", "in_channels": 4},
        {"model_type": "deepseek_v3", "quantization_config": {
            "quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}},
        {"model_type": "x", "quantization_config": {
            "quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": {
                "type": "float", "num_bits": 8, "strategy": "block",
                "block_structure": [128, 128]}}}, "ignore": ["lm_head"]}},
    ]  # fmt: skip
    made: dict[str, list[bytes]] = {
        "reader": [model, short.header + body],
        "reader_text": [short.header[HEADER:] + b"\n\n" + body, header + b"\n\n" + bytes(2048)],
        "writer": [b"\1\2\3abc\n\4\2\1model.x.weight\n\7\0\0\x00\x1b\n\2\1\3\xf0\x9f\xa4\xa6"],
        "state": [bnb_format.encode_state(s) for s in (nested, plain)],
        "config": [json.dumps(c).encode() for c in configs],
        "index": [json.dumps({"metadata": {"total_size": 9}, "weight_map": shards}).encode()],
        "manifest": [json.dumps(whole).encode()],
        "pipeline": [json.dumps(record).encode(), json.dumps({
            "_class_name": "X", "_diffusers_version": "1", "unet": ["diffusers", "UNet2DModel"],
            "vae": [None, None]}).encode()],
    }  # fmt: skip
    return made[name]


def read_model_names(header: bytes) -> list[TensorInfo]:
    return [TensorInfo(k, "BF16", (64, 4), 0) for k in json.loads(header) if k != "__metadata__"]
