"""The catalogue of defects: what can be wrong with a 4-bit checkpoint that loads all the same.

Each is a name and a function that damages a fresh copy of a good output.  test_defects.py runs
verify on every one, and docs/verify.md has the table of what it takes to notice it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from damage import (
    INDEX,
    STATE,
    config,
    content,
    edit_json,
    flip,
    floats,
    forge,
    header,
    manifest,
    patch,
    quantization,
    read_header,
    resave,
    shard_of,
    state,
    swap,
)

from nf4cli.checkpoint.discovery import MANIFEST

LAYER, OTHER_LAYER = "model.layers.0.", "model.layers.1."
UP, OTHER_UP = LAYER + "mlp.up_proj.weight", OTHER_LAYER + "mlp.up_proj.weight"
DOWN, QUERY = LAYER + "mlp.down_proj.weight", LAYER + "self_attn.q_proj.weight"
NORM, EMBED, HEAD = "model.norm.weight", "model.embed_tokens.weight", "lm_head.weight"
EXPERT = "model.layers.0.block_sparse_moe.experts.1.w1.weight"
COMPANIONS = (".absmax", ".nested_absmax", STATE)


@dataclass(frozen=True, slots=True)
class Kit:
    """Attributes:
    good: good outputs by name: "nested" (sharded, the default recipe), "plain" (no double
        quantization), "experts" (a mixture of experts for vLLM), "stacks" (the same for unsloth).
    other: the output of a model of the same shapes with other weights.
    half: the output of the same source with layer 1 kept in 16 bit.
    kept_experts: the output of the source of "experts" with the experts kept in 16 bit.
    sources: of `good`, by the same names.
    """

    good: dict[str, Path]
    other: Path
    half: Path
    kept_experts: Path
    sources: dict[str, Path]


@dataclass(frozen=True, slots=True)
class Defect:
    """Attributes:
    what: in words, for the table.
    damage: what is done to a copy of a good output.
    base: which good output.
    only_source: nothing but the source can tell: the manifest was made to agree.
    """

    what: str
    damage: Callable[[Path, Kit], object]
    base: str = "nested"
    only_source: bool = False


DEFECTS: list[Defect] = []


def defect(
    what: str, base: str = "nested", only_source: bool = False
) -> Callable[[Callable[[Path, Kit], object]], None]:
    def add(damage: Callable[[Path, Kit], object]) -> None:
        DEFECTS.append(Defect(what, damage, base, only_source))

    return add


def simple(what: str, damage: Callable[[Path], object], base: str = "nested") -> None:
    """A defect that needs no more than the copy."""
    DEFECTS.append(Defect(what, lambda root, _: damage(root), base))


def forged(what: str, damage: Callable[[Path], object], base: str = "nested") -> None:
    """The same, with every digest of the manifest rewritten to match."""
    DEFECTS.append(Defect(f"{what}; manifest forged", _and_forge(damage), base, only_source=True))


def _and_forge(damage: Callable[[Path], object]) -> Callable[[Path, Kit], object]:
    def both(root: Path, _: Kit) -> None:
        damage(root)
        forge(root)

    return both


def edited(what: str, change: Callable[[dict], object]) -> None:
    """An edit of the manifest that only the source contradicts."""
    DEFECTS.append(
        Defect(f"manifest: {what}", lambda root, _: manifest(root, change), only_source=True)
    )


def zeros(data: bytearray) -> bytes:
    return bytes(len(data))


def set_first(value: float) -> Callable[[np.ndarray], object]:
    def change(values: np.ndarray) -> None:
        values[0] = value

    return change


# -- flipped bits -------------------------------------------------------------------------------


def _digit_of_offset(root: Path) -> None:
    offset = json.loads(content(root, UP + STATE))["nested_offset"]
    state(root, UP, nested_offset=float(np.nextafter(np.float32(offset), np.float32(1))))


simple("one bit of a packed weight", lambda d: flip(d, UP, 1000, 6))
simple("one bit of a double-quantized absmax", lambda d: flip(d, UP + ".absmax", 5, 4))
simple("one bit of a float32 absmax", lambda d: flip(d, UP + ".absmax", 21, 3), "plain")
simple("one bit of nested_absmax", lambda d: flip(d, UP + ".nested_absmax", 1, 2))
simple("one bit of quant_map", lambda d: flip(d, UP + ".quant_map", 4, 0))
simple("one bit of nested_quant_map", lambda d: flip(d, UP + ".nested_quant_map", 100, 0))
simple("one digit of nested_offset in quant_state", _digit_of_offset)
simple("one bit of a kept norm", lambda d: flip(d, NORM, 7, 1))
simple("one bit of the embedding", lambda d: flip(d, EMBED, 4242, 2))
forged("one bit of a packed weight", lambda d: flip(d, UP, 1000, 6))
forged("one bit of a kept norm", lambda d: flip(d, NORM, 7, 1))


# -- statistics ---------------------------------------------------------------------------------

simple("absmax all zero", lambda d: patch(d, UP + ".absmax", zeros), "plain")
simple("nested_absmax all zero", lambda d: patch(d, UP + ".nested_absmax", zeros))
simple("one absmax is NaN", lambda d: floats(d, UP + ".absmax", set_first(np.nan)), "plain")
simple("one absmax is negative", lambda d: floats(d, UP + ".absmax", set_first(-0.1)), "plain")
simple("nested_absmax is infinite", lambda d: floats(d, UP + ".nested_absmax", set_first(np.inf)))
simple("absmax doubled", lambda d: floats(d, UP + ".absmax", lambda v: v.__imul__(2)), "plain")
simple("nested_absmax dropped", lambda d: resave(d, UP, lambda t: t.pop(UP + ".nested_absmax")))
simple("quant_state dropped", lambda d: resave(d, UP, lambda t: t.pop(UP + STATE)))
simple("packed weight dropped", lambda d: resave(d, UP, lambda t: t.pop(UP)))
simple("quant_map in another order", lambda d: floats(d, UP + ".quant_map", np.ndarray.sort), "fp4")


# -- quant_state --------------------------------------------------------------------------------

simple("quant_state: another blocksize, statistics unchanged", lambda d: state(d, UP, blocksize=32))
simple("quant_state: shape transposed", lambda d: state(d, UP, shape=[64, 128]))
simple("quant_state: shape flattened", lambda d: state(d, UP, shape=[1, 8192]))
simple("quant_state: another dtype", lambda d: state(d, UP, dtype="float16"))
simple("quant_state: nested_offset zero", lambda d: state(d, UP, nested_offset=0.0))
simple("quant_state: another nested_blocksize", lambda d: state(d, UP, nested_blocksize=512))
simple("quant_state: quant_type fp4 under the key of nf4", lambda d: state(d, UP, quant_type="fp4"))
simple("quant_state: not JSON", lambda d: patch(d, UP + STATE, zeros))
forged("quant_state: shape transposed", lambda d: state(d, UP, shape=[64, 128]))
forged("one digit of nested_offset in quant_state", _digit_of_offset)


# -- tensors that changed places ------------------------------------------------------------------


def _swap_companions(root: Path) -> None:
    for suffix in COMPANIONS:
        swap(root, UP + suffix, OTHER_UP + suffix)


def _swap_weights(root: Path) -> None:
    for suffix in ("", *COMPANIONS):
        swap(root, UP + suffix, OTHER_UP + suffix)


def _swap_norms(root: Path) -> None:
    patch(root, NORM, lambda b: np.full(len(b) // 2, 0x4000, "<u2").tobytes())  # all 2.0
    swap(root, NORM, LAYER + "input_layernorm.weight")


simple("companions of two equal layers swapped", _swap_companions)
simple("two equal layers swapped as a whole", _swap_weights)
simple("two kept norms swapped", _swap_norms)
forged("two equal layers swapped as a whole", _swap_weights)
simple(
    "a kept tensor transposed",
    lambda d: patch(d, EMBED, lambda b: np.frombuffer(b, "<u2").reshape(-1, 64).T.tobytes()),
)


@defect("a tensor of another model, equal in shape")
def _(root: Path, kit: Kit) -> None:
    new = content(kit.other, UP)
    patch(root, UP, lambda _: new)


@defect("a tensor of another model, equal in shape; manifest forged", only_source=True)
def _(root: Path, kit: Kit) -> None:
    for suffix in ("", *COMPANIONS):
        new = content(kit.other, UP + suffix)
        patch(root, UP + suffix, lambda _, new=new: new)
    forge(root)


simple("a packed run zeroed", lambda d: patch(d, UP, lambda b: b[:100] + b"\x77" * 900 + b[1000:]))
simple(
    "a tensor renamed",
    lambda d: resave(d, NORM, lambda t: t.update({"model.norm2.weight": t.pop(NORM)})),
)


def _float(tensors: dict) -> None:
    tensors[NORM] = tensors[NORM].float()


def _unpack(tensors: dict) -> None:
    norm = tensors[next(k for k in tensors if k.endswith("norm.weight") or ".absmax" not in k)]
    for key in [k for k in tensors if k.startswith(UP)]:
        del tensors[key]
    tensors[UP] = norm.new_zeros(128, 64).bfloat16()


simple("a kept tensor cast to float32", lambda d: resave(d, NORM, _float))
simple("a kept tensor missing", lambda d: resave(d, NORM, lambda t: t.pop(NORM)))
simple("an extra tensor", lambda d: resave(d, NORM, lambda t: t.update(extra=t[NORM].clone())))
forged("an extra tensor", lambda d: resave(d, NORM, lambda t: t.update(extra=t[NORM].clone())))
simple(
    "a weight left in 16 bit, in no skip list",
    lambda d: resave(d, UP, _unpack),
)


@defect("half of the layers left in 16 bit, config.json agreeing")
def _(root: Path, kit: Kit) -> None:
    _replace(root, kit.half, keep_manifest=True)


@defect("half of the layers left in 16 bit, config.json and manifest agreeing", only_source=True)
def _(root: Path, kit: Kit) -> None:
    _replace(root, kit.half)
    manifest(root, lambda m: m["recipe"].update(keep=[]))


@defect("the experts left in 16 bit, in no skip list", "experts")
def _(root: Path, kit: Kit) -> None:
    _replace(root, kit.kept_experts, keep_manifest=True)
    quantization(root, lambda q: q.update(llm_int8_skip_modules=["lm_head", "gate"]))


@defect("the experts left in 16 bit, config.json agreeing", "experts")
def _(root: Path, kit: Kit) -> None:
    _replace(root, kit.kept_experts, keep_manifest=True)


def _swap_experts(root: Path) -> None:
    for suffix in ("", ".absmax", ".nested_absmax"):
        swap(root, EXPERT + suffix, EXPERT.replace("experts.1", "experts.2") + suffix)


simple("one expert swapped with another", _swap_experts, "experts")


def _replace(root: Path, by: Path, keep_manifest: bool = False) -> None:
    """The files of another output, but maybe for the manifest."""
    text = (root / MANIFEST).read_text()
    shutil.rmtree(root)
    shutil.copytree(by, root)
    if keep_manifest:
        (root / MANIFEST).write_text(text)


# -- files ----------------------------------------------------------------------------------------


def _shard(root: Path) -> Path:
    return shard_of(root, UP)


def _zero_shard(root: Path) -> None:
    start = read_header(_shard(root))[1]
    data = _shard(root).read_bytes()
    _shard(root).write_bytes(data[:start] + bytes(len(data) - start))


def _stale_shard(root: Path, kit: Kit) -> None:
    name = _shard(root).name
    shutil.copy(kit.other / name, root / name)


simple("a shard of zeros under a good header", _zero_shard)
simple("the head all zero under a good header", lambda d: patch(d, HEAD, zeros))
DEFECTS.append(Defect("a stale shard of an earlier run", _stale_shard))
simple("a shard missing", lambda d: _shard(d).unlink())
simple(
    "an extra shard that no index names",
    lambda d: shutil.copy(_shard(d), d / "model-00009-of-00009.safetensors"),
)
simple("the index missing", lambda d: (d / INDEX).unlink())
simple(
    "an entry of the index missing",
    lambda d: edit_json(d / INDEX, lambda i: i["weight_map"].pop(NORM)),
)
simple(
    "an entry of the index naming another shard",
    lambda d: edit_json(
        d / INDEX, lambda i: i["weight_map"].update({NORM: shard_of(d, HEAD).name})
    ),
)
simple(
    "a tensor in two shards",
    lambda d: resave(d, HEAD, lambda t: t.update({NORM: _norm_of(d)}), index=False),
)


def _norm_of(root: Path):
    from safetensors.torch import load_file

    return load_file(shard_of(root, NORM))[NORM]


simple("a shard truncated", lambda d: _shard(d).write_bytes(_shard(d).read_bytes()[:-100]))
simple("bytes behind the end of a shard", lambda d: _shard(d).open("ab").write(b"\0" * 8))
simple(
    "a header with the shape of a packed weight swapped",
    lambda d: header(d, UP, shape=[1, 4096]),
)
simple("a header with BF16 relabelled as F16", lambda d: header(d, NORM, dtype="F16"))
forged("a header with BF16 relabelled as F16", lambda d: header(d, NORM, dtype="F16"))
simple("the tokenizer edited", lambda d: (d / "tokenizer.json").write_text('{"a": 1}'))
forged("the tokenizer edited", lambda d: (d / "tokenizer.json").write_text('{"a": 1}'))
simple("the tokenizer missing", lambda d: (d / "tokenizer.json").unlink())
simple("code added", lambda d: (d / "modeling_x.py").write_text("import os\n"))


# -- config.json ----------------------------------------------------------------------------------

simple(
    "config.json loads as FP4", lambda d: quantization(d, lambda q: q.pop("bnb_4bit_quant_type"))
)
simple(
    "config.json loads without double quantization",
    lambda d: quantization(d, lambda q: q.pop("bnb_4bit_use_double_quant")),
)
simple(
    "config.json without quantization_config",
    lambda d: config(d, lambda c: c.pop("quantization_config")),
)
simple("config.json missing", lambda d: (d / "config.json").unlink())
simple(
    "config.json also loads in 8 bit", lambda d: quantization(d, lambda q: q.update(load_in_8bit=1))
)
simple(
    "config.json of another method",
    lambda d: quantization(d, lambda q: q.update(quant_method="gptq")),
)
simple(
    "config.json with another quant_storage",
    lambda d: quantization(d, lambda q: q.update(bnb_4bit_quant_storage="bfloat16")),
)
simple(
    "config.json with another compute dtype",
    lambda d: quantization(d, lambda q: q.update(bnb_4bit_compute_dtype="float16")),
)
simple(
    "config.json with a compute dtype that there is not",
    lambda d: quantization(d, lambda q: q.update(bnb_4bit_compute_dtype="bf16")),
)
simple(
    "skip list without the head",
    lambda d: quantization(d, lambda q: q["llm_int8_skip_modules"].remove("lm_head")),
)
simple("skip list empty", lambda d: quantization(d, lambda q: q.update(llm_int8_skip_modules=[])))
simple(
    "skip list over a packed module",
    lambda d: quantization(d, lambda q: q["llm_int8_skip_modules"].append("up_proj")),
)
simple(
    "skip list absent: each loader derives its own",
    lambda d: quantization(d, lambda q: q.update(llm_int8_skip_modules=None)),
)
simple(
    "skip list of the default target on packed experts",
    lambda d: quantization(d, lambda q: q["llm_int8_skip_modules"].append("block_sparse_moe")),
    "experts",
)
simple("rope_theta edited", lambda d: config(d, lambda c: c.update(rope_theta=1e6)))
forged("rope_theta edited", lambda d: config(d, lambda c: c.update(rope_theta=1e6)))


# -- the manifest ---------------------------------------------------------------------------------


@defect("manifest: of another output")
def _(root: Path, kit: Kit) -> None:
    shutil.copy(kit.other / MANIFEST, root / MANIFEST)


def _half_forged(root: Path) -> None:
    before = json.loads((root / MANIFEST).read_text())["tensors"]
    flip(root, UP, 1000, 6)
    forge(root)
    manifest(root, lambda m: m.update(tensors=before))


simple("manifest: not JSON", lambda d: (d / MANIFEST).write_text("{"))
DEFECTS.append(
    Defect(
        "manifest: a file's digest replaced to match a damaged shard, a tensor's not",
        lambda root, _: _half_forged(root),
        only_source=True,
    )
)
simple("manifest: a tensor's record removed", lambda d: manifest(d, lambda m: m["tensors"].pop(UP)))
simple(
    "manifest: the list of files emptied",
    lambda d: manifest(d, lambda m: m["output"].update(files=[])),
)
simple(
    "manifest: blocksize of the recipe changed",
    lambda d: manifest(d, lambda m: m["recipe"].update(blocksize=128)),
)


edited("a source digest changed", lambda m: m["source"]["files"][0].update(digest="0" * 64))
edited("the source's files emptied", lambda m: m["source"].update(files=[]))
edited("a source tensor's digest changed", lambda m: m["tensors"][UP]["source"].update(digest="0"))
edited("an error figure changed", lambda m: m["tensors"][UP]["error"].update(rel_rmse=0.001))
edited("the recipe's kept modules changed", lambda m: m["recipe"].update(keep=["mlp"]))
edited("the recipe's shard size changed", lambda m: m["recipe"].update(max_shard_size=10**9))
edited("the number of weights changed", lambda m: m["output"].update(parameters=7 * 10**9))
edited("bits a weight changed", lambda m: m["output"].update(bits_per_weight=4.0))
edited("a reason changed", lambda m: m["tensors"][NORM].update(reason="because"))
edited("a statement added", lambda m: m.update(certified_by="somebody"))
