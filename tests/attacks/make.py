"""Writes the hostile files of this directory anew: python -m attacks.make (in tests/).

Every file is one attack; its first directory says in whose place it is put: `safetensors/` becomes
a model's model.safetensors, `index/` its index, `config/` its config.json, `state/` the
quantization state of a packed weight, `manifest/` the nf4_manifest.json of an output,
`pipeline/` a model_index.json, `record/` a nf4_pipeline.json.
"""

from __future__ import annotations

import json
from pathlib import Path

HERE = Path(__file__).parent
F32 = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
DEEP = "[" * 60_000


def raw(header: str | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file with whatever header."""
    text = header.encode() if isinstance(header, str) else header
    size = len(text) if length is None else length
    return size.to_bytes(8, "little") + text + data


def one(name: str = "x.weight", dtype: str = "F32", shape: str = "[1]", offsets: str = "[0,4]"):
    """The header of one tensor, its fields as JSON text."""
    return f'{{{json.dumps(name)}:{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}}}'


def tensors(*entries: tuple[str, str, str]) -> str:
    """A header of F32 tensors from (name, shape, offsets)."""
    return (
        "{" + ",".join(
            f'{json.dumps(n)}:{{"dtype":"F32","shape":{s},"data_offsets":{o}}}'
            for n, s, o in entries
        ) + "}"
    )  # fmt: skip


def safetensors() -> dict[str, bytes]:
    four = bytes(4)
    return {
        "empty-file": b"",
        "seven-bytes": b"\x02\0\0\0\0\0\0",
        "no-json": raw("", b""),
        "header-longer-than-file": raw(one(), four, 10_000),
        "header-2-63": raw(one(), four, 2**63),
        "header-2-64-minus-1": raw(one(), four, 2**64 - 1),
        "header-claims-100-mb": raw(one(), four, 100_000_000),
        "header-claims-99-mb": raw(one(), four, 99_999_999),
        "header-shorter-than-json": raw(one(), four, 20),
        "overlap": raw(tensors(("a", "[2]", "[0,8]"), ("b", "[2]", "[4,12]")), bytes(12)),
        "same-bytes-twice": raw(tensors(("a", "[2]", "[0,8]"), ("b", "[2]", "[0,8]")), bytes(8)),
        "hole": raw(tensors(("a", "[1]", "[0,4]"), ("b", "[1]", "[8,12]")), bytes(12)),
        "hole-at-start": raw(one(offsets="[4,8]"), bytes(8)),
        "offsets-reversed": raw(one(offsets="[4,0]"), four),
        "offsets-negative": raw(one(offsets="[-4,0]"), four),
        "offsets-float": raw(one(offsets="[0.0,4.0]"), four),
        "offsets-huge": raw(one(offsets="[0,18446744073709551616]"), four),
        "offsets-three": raw(one(offsets="[0,4,4]"), four),
        "offsets-beyond-file": raw(one(shape="[1000]", offsets="[0,4000]"), four),
        "trailing-bytes": raw(one(), bytes(12)),
        "shape-product-overflows": raw(one(shape="[4294967296,4294967296,4]"), four),
        "shape-times-itemsize-overflows": raw(one(shape="[4611686018427387905]"), four),
        "shape-negative": raw(one(shape="[-1]"), four),
        "shape-float": raw(one(shape="[1.0]"), four),
        "shape-huge-number": raw(one(shape="[" + "9" * 5000 + "]"), four),
        "shape-absurd-but-empty": raw(
            one(shape="[1152921504606846976,0]", offsets="[0,0]"), b""),
        "shape-10000-dimensions": raw(one(shape="[" + ",".join(["1"] * 10_000) + "]"), four),
        "shape-null": raw(one(shape="null"), four),
        "shape-deep": raw(one(shape=DEEP), four),
        "dtype-unknown": raw(one(dtype="F99"), four),
        "dtype-four-bits": raw(one(dtype="F4", shape="[8]"), four),
        "dtype-object": raw(one(dtype="object"), four),
        "duplicate-key": raw(
            '{"x.weight":' + F32 + ',"x.weight":{"dtype":"I32","shape":[1],"data_offsets":[0,4]}}',
            four),
        "duplicate-field": raw(
            '{"x":{"dtype":"F32","dtype":"I32","shape":[1],"data_offsets":[0,4]}}', four),
        "bad-utf-8": raw(one().encode().replace(b"x.w", b"\xff\xfew"), four),
        "lone-surrogate": raw('{"\\ud800":' + F32 + "}", four),
        "bom": raw(b"\xef\xbb\xbf" + one().encode(), four),
        "utf-16": raw(one().encode("utf-16"), four),
        "deep-json": raw('{"__metadata__":{"a":"b"},"x":' + DEEP, four),
        "json-list": raw("[]"),
        "json-null": raw("null"),
        "json-nan": raw(one(shape="[NaN]"), four),
        "no-tensor": raw("{}"),
        "metadata-not-strings": raw('{"__metadata__":{"a":1},"x":' + F32 + "}", four),
        "metadata-is-a-list": raw('{"__metadata__":[],"x":' + F32 + "}", four),
        "metadata-is-a-tensor": raw('{"__metadata__":' + F32 + "}", four),
        "name-too-long": raw(one("x" * 5000 + ".weight"), four),
        "name-with-nul": raw(one("x\0y.weight"), four),
        "name-with-newline": raw(one("x\nerror: all is well\n.weight"), four),
        "name-with-escapes": raw(one("\x1b[2J\x1b]0;owned\x07\x9b31m.weight"), four),
        "name-turns-direction": raw(one("\u202egnp.\u2066weight\u200b"), four),
        "name-is-a-path": raw(one("../../../../etc/passwd"), four),
        "name-is-a-regex": raw(tensors(
            ("(a+)+$.lm_head.weight", "[4,4]", "[0,64]"),
            ("aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa!.q.weight", "[4,4]", "[64,128]"),
        ), bytes(128)),
        "name-is-python": raw(one("__import__('os').system('touch pwned').weight"), four),
        "name-empty": raw(one(""), four),
        "pickle": b"\x80\x04cposix\nsystem\n(S'touch pwned'\ntR.",
        "zip": b"PK\x03\x04" + bytes(26),
        "git-lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n",
        "keys-of-state-without-weight": raw(
            '{"x.weight.quant_state.bits' + 'andbytes__nf4":'
            '{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}', four),
    }  # fmt: skip


def index() -> dict[str, bytes]:
    good = '"lm_head.weight": "a.safetensors"'

    def mapped(name: str) -> str:
        return '{"weight_map": {' + good + ', "x": ' + json.dumps(name) + "}}"

    return {
        name: text if isinstance(text, bytes) else text.encode()
        for name, text in {
            "parent": mapped("../outside/secret.safetensors"),
            "absolute": mapped("/etc/passwd"),
            "backslash": mapped("..\\outside\\secret.safetensors"),
            "dot": mapped("."),
            "dots": mapped(".."),
            "empty-name": mapped(""),
            "nul": mapped("a\0.safetensors"),
            "a-directory": mapped("directory.safetensors"),
            "a-fifo": mapped("fifo.safetensors"),
            "a-loop": mapped("loop.safetensors"),
            "long-name": mapped("x" * 300 + ".safetensors"),
            "escapes": mapped("\x1b[2J.safetensors"),
            "surrogate": mapped("\ud800.safetensors"),
            "missing": mapped("b.safetensors"),
            "not-strings": '{"weight_map": {"lm_head.weight": 1}}',
            "a-list": '{"weight_map": ["a.safetensors"]}',
            "no-map": '{"metadata": {}}',
            "duplicate-key": '{"weight_map": {' + good + ', "lm_head.weight": "b.safetensors"}}',
            "deep": '{"weight_map": ' + DEEP,
            "huge-number": '{"metadata": {"total_size": ' + "9" * 5000 + '}, "weight_map": 1}',
            "nan": '{"metadata": {"total_size": NaN}, "weight_map": {"x": NaN}}',
            "bad-utf-8": b'{"weight_map": {"\xff": "a.safetensors"}}',
            "bom": b'\xef\xbb\xbf{"weight_map": {' + good.encode() + b"}}",
            "garbage": "\0\0\0",
        }.items()
    }


def config() -> dict[str, bytes]:
    def llama(**changes: object) -> bytes:
        return json.dumps({"model_type": "llama", **changes}).encode()

    return {
        "deep": b'{"model_type": "llama", "a": ' + DEEP.encode(),
        "a-list": b"[]",
        "bad-utf-8": b'{"model_type": "\xff"}',
        "duplicate-key": b'{"model_type": "llama", "model_type": "gpt2"}',
        "huge-number": b'{"model_type": "llama", "vocab_size": ' + b"9" * 5000 + b"}",
        "model-type-list": llama(model_type=["llama"]),
        "model-type-escape": llama(model_type="\x1b[2J\nerror: fine"),
        "quantized-with-a-list": llama(quantization_config=[["bitsandbytes"]]),
        "quantized-by-a-number": llama(quantization_config={"quant_method": 1e308}),
        "fp8-of-nothing": llama(quantization_config={
            "quant_method": "fp8", "weight_block_size": [[1], {}], "fmt": {}}),
        "compressed-of-nothing": llama(quantization_config={
            "quant_method": "compressed-tensors", "config_groups": {"a": {"weights": []}}}),
        "fp8-with-groups": llama(quantization_config={
            "quant_method": "fp8", "config_groups": {"a": {"x": 1}}}),
        "layers-absurd": llama(num_hidden_layers=10**18),
    }  # fmt: skip


GOOD_STATE = {
    "quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [64, 4],
    "nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.25,
}  # fmt: skip


def state() -> dict[str, bytes]:
    changes: dict[str, dict[str, object]] = {
        "blocksize-0": {"blocksize": 0},
        "blocksize-negative": {"blocksize": -64},
        "blocksize-huge": {"blocksize": 2**62},
        "blocksize-string": {"blocksize": "64"},
        "blocksize-true": {"blocksize": True},
        "shape-overflows": {"shape": [2**32, 2**32]},
        "shape-absurd": {"shape": [2**47]},
        "shape-zero": {"shape": [0, 4]},
        "shape-negative": {"shape": [-64, -4]},
        "shape-floats": {"shape": [64.0, 4.0]},
        "shape-string": {"shape": "64"},
        "shape-long": {"shape": [1] * 5000},
        "dtype-code": {"dtype": "__import__('os').system('touch pwned')"},
        "dtype-list": {"dtype": ["bfloat16"]},
        "type-of-another": {"quant_type": "fp4"},
        "offset-nan": {"nested_offset": float("nan")},
        "offset-infinite": {"nested_offset": float("inf")},
        "offset-string": {"nested_offset": "0"},
        "offset-huge": {"nested_offset": 10**400},
        "nested-blocksize-0": {"nested_blocksize": 0},
        "nested-blocksize-huge": {"nested_blocksize": 2**40},
        "nested-dtype": {"nested_dtype": "float64"},
    }
    made = {name: json.dumps({**GOOD_STATE, **change}) for name, change in changes.items()}
    return {
        **{name: text.encode() for name, text in made.items()},
        "duplicate-key": json.dumps(GOOD_STATE)[:-1].encode() + b', "blocksize": 128}',
        "deep": DEEP[:30_000].encode(),
        "a-list": b"[1, 2]",
        "bad-utf-8": b"\xff" * 100,
        "empty": b"",
        "pickle": b"\x80\x04cposix\nsystem\n(S'touch pwned'\ntR.",
    }


def manifest() -> dict[str, bytes]:
    record = {
        "action": "copy", "rule": "head", "reason": "a head",
        "source": {"file": "a", "dtype": "BF16", "shape": [64, 4], "digest": "00"},
        "output": {"file": "a", "digests": {"lm_head.weight": "00"}},
    }  # fmt: skip
    whole = {
        "nf4_manifest": 1, "tool": {"name": "nf4cli", "version": "1"},
        "digests": {"files": "blake3", "tensors": "xxh3_128"},
        "recipe": {"quant_type": "nf4", "blocksize": 64, "keep": []},
        "source": {"name": "m", "files": []},
        "output": {"files": [], "parameters": 1, "quantized_parameters": 1, "bits_per_weight": 4.5},
        "tensors": {"lm_head.weight": record},
    }  # fmt: skip

    def output(**changes: object) -> bytes:
        return json.dumps({**whole, "output": {**whole["output"], **changes}}).encode()  # type: ignore[dict-item]

    def file(name: object, size: object = 1, digest: object = "00") -> bytes:
        return output(files=[{"name": name, "size": size, "digest": digest}])

    return {
        "file-outside": file("../outside/secret.safetensors"),
        "file-absolute": file("/etc/passwd"),
        "file-nul": file("a\0b"),
        "file-fifo": file("fifo"),
        "file-directory": file("."),
        "file-long": file("x" * 300),
        "file-escapes": file("\x1b[2J\nok: all is well"),
        "file-number": file(1),
        "size-negative": file("config.json", -1),
        "size-string": file("config.json", "1"),
        "digest-list": file("config.json", 1, ["00"]),
        "parameters-string": output(parameters="many"),
        "bits-nan": output(bits_per_weight=float("nan")),
        "version-list": json.dumps({**whole, "nf4_manifest": [1]}).encode(),
        "version-true": json.dumps({**whole, "nf4_manifest": True}).encode(),
        "algorithm": json.dumps({**whole, "digests": {"files": "md5"}}).encode(),
        "recipe-unknown": json.dumps({**whole, "recipe": {"keep": [], "__class__": 1}}).encode(),
        "recipe-blocksize": json.dumps({**whole, "recipe": {"blocksize": 0, "keep": []}}).encode(),
        "recipe-keep": json.dumps({**whole, "recipe": {"keep": [{}]}}).encode(),
        "action-unknown": json.dumps({**whole, "tensors": {"lm_head.weight": {
            **record, "action": "steal"}}}).encode(),
        "no-digests": json.dumps({**whole, "tensors": {"lm_head.weight": {
            **record, "output": {"file": "a", "digests": {}}}}}).encode(),
        "tensors-list": json.dumps({**whole, "tensors": []}).encode(),
        "state-absurd": json.dumps({**whole, "tensors": {"lm_head.weight": {
            **record, "quant_state": {**GOOD_STATE, "nested": True, "blocksize": -1}}}}).encode(),
        "deep": DEEP.encode(),
        "a-list": b"[]",
    }  # fmt: skip


def pipeline() -> dict[str, bytes]:
    def of(name: str) -> bytes:
        return json.dumps({"_class_name": "X", name: ["diffusers", "UNet2DModel"]}).encode()

    return {
        "parent": of("../outside"),
        "absolute": of("/etc"),
        "long": of("x" * 300),
        "nul": of("a\0b"),
        "link-outside": of("link-outside"),
        "loop": of("loop.safetensors"),
        "escapes": of("\x1b[2J"),
        "class-list": b'{"_class_name": {}, "unet": ["diffusers", "UNet2DModel"]}',
        "deep": DEEP.encode(),
        "garbage": b"\xff\xfe",
    }


def record() -> dict[str, bytes]:
    def of(components: object, files: object) -> bytes:
        return json.dumps(
            {"nf4_pipeline": 1, "digest": "blake3", "components": components, "files": files}
        ).encode()

    return {
        "component-outside": of(["../outside"], []),
        "component-number": of([1], []),
        "file-outside": of([], [{"name": "../outside/secret.safetensors", "size": 1,
                                 "digest": "00"}]),
        "size-true": of([], [{"name": "a", "size": True, "digest": "00"}]),
        "files-object": of([], {"a": 1}),
    }  # fmt: skip


KINDS = {
    make.__name__: make
    for make in (safetensors, index, config, state, manifest, pipeline, record)
}  # fmt: skip


def main() -> None:
    for kind, make in KINDS.items():
        (HERE / kind).mkdir(exist_ok=True)
        for old in (HERE / kind).iterdir():
            old.unlink()
        for name, data in make().items():
            (HERE / kind / name).write_bytes(data)


if __name__ == "__main__":
    main()
