"""Stacks of experts: the experts of a layer, packed as transformers 5 holds them."""

from __future__ import annotations

import json
from pathlib import Path

import encoded_models
import jsonschema
import pytest
import torch
from encoded_models import compressed, packed, unpacked, weights
from float8_models import FP8, spread
from helpers import (
    INPUT,
    LLAMA,
    USAGE,
    bnb_nested,
    bnb_quantize,
    carry_out,
    llama_tensors,
    nf4_ok,
    nightly_but,
    read_all,
    refused,
    same_files,
    write_checkpoint_dir,
)
from safetensors.torch import save_file

from nf4cli import engines
from nf4cli.checkpoint.discovery import open_checkpoint
from nf4cli.convert import conversion
from nf4cli.format.config import QuantConfig
from nf4cli.planning.make_plan import make_plan
from nf4cli.planning.resources import Resources, bytes_beside_shards
from nf4cli.planning.stacks import FAMILIES

SCHEMA = Path(__file__).parent.parent.parent / "docs" / "manifest.schema.json"
STATE = ".quant_state.bitsandbytes__nf4"
EXPERTS, HIDDEN, WIDTH = 12, 64, 32
PATH = "model.layers.{}.mlp.experts"
UNSLOTH = ("--target", "unsloth")


def matrix(*shape: int, seed: int = 0) -> torch.Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.1).bfloat16()


def tensors_of(width: int = WIDTH) -> dict[str, torch.Tensor]:
    """A mixture: no two experts are alike, and expert 10 is stored before expert 2."""
    tensors = {n: t for n, t in llama_tensors().items() if ".mlp." not in n}
    for layer in range(2):
        tensors[f"model.layers.{layer}.mlp.gate.weight"] = matrix(EXPERTS, HIDDEN)
        for expert in range(EXPERTS):
            for i, (leaf, shape) in enumerate(
                (("gate", (width, HIDDEN)), ("up", (width, HIDDEN)), ("down", (HIDDEN, width)))
            ):
                name = f"{PATH.format(layer)}.{expert}.{leaf}_proj.weight"
                tensors[name] = matrix(*shape, seed=100 * layer + 3 * expert + i)
    return dict(sorted(tensors.items()))


CONFIG = {**LLAMA, "model_type": "qwen3_moe", "num_experts": EXPERTS}


def mixture(root: Path, shards: int = 1, **changed: torch.Tensor | None) -> Path:
    tensors = {n: t for n, t in {**tensors_of(), **changed}.items() if t is not None}
    return write_checkpoint_dir(root, tensors, CONFIG, shards=shards)


def stacks_of(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What torch makes of the matrices, by the name of the parameter."""
    found = {}
    for layer in range(2):
        path = PATH.format(layer)
        of = {
            leaf: [tensors[f"{path}.{e}.{leaf}_proj.weight"] for e in range(EXPERTS)]
            for leaf in ("gate", "up", "down")
        }
        both = zip(of["gate"], of["up"], strict=True)
        found[f"{path}.gate_up_proj"] = torch.stack([torch.cat(pair) for pair in both])
        found[f"{path}.down_proj"] = torch.stack(of["down"])
    return found


def check_bytes(written: dict[str, torch.Tensor], stacks: dict[str, torch.Tensor]) -> None:
    """Every byte is what bitsandbytes gives for the whole stack."""
    for name, value in stacks.items():
        packed, absmax = bnb_quantize(value, 64, "nf4")
        assert written[name].flatten().tolist() == packed.tolist(), name
        state = json.loads(written[name + STATE].numpy().tobytes())
        assert state["shape"] == list(value.shape)
        codes, nested = bnb_nested(absmax, state["nested_offset"])
        assert written[name + ".absmax"].tolist() == codes.tolist()
        assert written[name + ".nested_absmax"].tolist() == nested.tolist()


def test_a_stack_has_the_bytes_that_bitsandbytes_gives(tmp_path):
    source = mixture(tmp_path / "src")
    nf4_ok("quantize", source, tmp_path / "out", *UNSLOTH)
    written = read_all(tmp_path / "out")
    check_bytes(written, stacks_of(read_all(source)))
    assert not [name for name in written if ".experts.0." in name]
    record = json.loads((tmp_path / "out" / "nf4_manifest.json").read_text())
    jsonschema.validate(record, json.loads(SCHEMA.read_text()))
    entry = record["tensors"][PATH.format(0) + ".gate_up_proj"]
    assert [s["tensor"].split(".")[-3:-1] for s in entry["sources"][:3]] == [
        ["0", "gate_proj"], ["0", "up_proj"], ["1", "gate_proj"],
    ]  # fmt: skip
    assert "is good" in nf4_ok("verify", tmp_path / "out", "--source", source)
    seen = json.loads(nf4_ok("inspect", tmp_path / "out", PATH.format(1) + ".down_proj", "--json"))
    assert seen["state"]["shape"] == [EXPERTS, HIDDEN, WIDTH]


SEARCHED = ("--scale", "search", "--blocksize", "32")


@pytest.mark.parametrize("options", nightly_but([SEARCHED], [(), SEARCHED]))
def test_the_order_of_reading_changes_no_byte(tmp_path, all_engines, options):
    """In many small chunks, by any number of threads, from files that hold parts of each stack."""
    wide = {**tensors_of(128), **{n: t for n, t in tensors_of().items() if "experts" not in n}}
    one = write_checkpoint_dir(tmp_path / "one", wide, CONFIG)
    three = write_checkpoint_dir(tmp_path / "three", dict(reversed(wide.items())), CONFIG, shards=3)
    recipe = QuantConfig(target="unsloth", blocksize=32, scale="search" if options else "absmax")
    written = {}
    for name, engine in all_engines.items():
        for source, resources in (
            (one, Resources(1, 8 << 20, 0)),
            (three, Resources(3, 1 << 19, 0)),
        ):
            plan = make_plan(open_checkpoint(source), recipe)
            out = tmp_path / f"{name}-{source.name}"
            carry_out(plan, out, engine, resources)
            written[out.name] = read_all(out)
    first, *others = written.values()
    for other in others:
        assert first.keys() == other.keys()
        assert all(torch.equal(first[key], other[key]) for key in first)


def test_the_way_back_is_the_source_s_own_layout(tmp_path):
    source = mixture(tmp_path / "src", shards=3)
    nf4_ok("quantize", source, tmp_path / "out", *UNSLOTH, "--no-double-quant")
    nf4_ok("dequantize", tmp_path / "out", tmp_path / "back")
    stored, back, written = (
        read_all(source),
        read_all(tmp_path / "back"),
        read_all(tmp_path / "out"),
    )
    assert {n: t.shape for n, t in back.items()} == {n: t.shape for n, t in stored.items()}
    for name, value in stacks_of(back).items():
        packed, absmax = bnb_quantize(value, 64, "nf4")  # what was rounded rounds to itself
        assert packed.tolist() == written[name].flatten().tolist()
        assert absmax.tolist() == pytest.approx(written[name + ".absmax"].tolist(), rel=0.01)
    (tmp_path / "out" / "nf4_manifest.json").unlink()
    nf4_ok("dequantize", tmp_path / "out", tmp_path / "stacks")
    alone = read_all(tmp_path / "stacks")
    for name, value in stacks_of(back).items():
        assert torch.equal(alone[name], value), name


def test_stacks_in_the_source_are_packed_as_they_are(tmp_path):
    tensors = tensors_of()
    stacks = stacks_of(tensors)
    rest = {n: t for n, t in tensors.items() if "experts" not in n}
    stored = write_checkpoint_dir(tmp_path / "stored", {**rest, **stacks}, CONFIG)
    nf4_ok("quantize", stored, tmp_path / "a", *UNSLOTH)
    nf4_ok("quantize", mixture(tmp_path / "src"), tmp_path / "b", *UNSLOTH)
    a, b = read_all(tmp_path / "a"), read_all(tmp_path / "b")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert "is good" in nf4_ok("verify", tmp_path / "a", "--source", stored)
    nf4_ok("dequantize", tmp_path / "a", tmp_path / "back")
    back = read_all(tmp_path / "back")
    assert {n: t.shape for n, t in back.items()} == {
        n: t.shape for n, t in {**rest, **stacks}.items()
    }


def test_float8_experts(tmp_path):
    """Each expert has scales of its own."""
    tensors = tensors_of(64)
    decoded = dict(tensors)
    for name, value in list(tensors.items()):
        if "experts" in name:
            grid = (-(-value.shape[0] // 24), -(-value.shape[1] // 40))
            scale = torch.rand(grid, generator=torch.Generator().manual_seed(len(name))) * 0.01
            factors = spread(scale + 1e-4, tuple(value.shape), (24, 40))
            bits = (value.float() / factors).clamp(-448, 448).to(torch.float8_e4m3fn)
            decoded[name] = (bits.float() * factors).bfloat16()
            tensors |= {name: bits, name + "_scale_inv": scale + 1e-4}
    config = {**CONFIG, "quantization_config": FP8}
    source = write_checkpoint_dir(tmp_path / "src", tensors, config, shards=2)
    nf4_ok("quantize", source, tmp_path / "out", *UNSLOTH)
    check_bytes(read_all(tmp_path / "out"), stacks_of(decoded))
    assert "is good" in nf4_ok("verify", tmp_path / "out", "--source", source)


def test_stacks_in_float8_in_the_source(tmp_path):
    tensors = tensors_of()
    rest = {n: t for n, t in tensors.items() if "experts" not in n}
    stored, decoded = dict(rest), dict(rest)
    for number, (name, value) in enumerate(stacks_of(tensors).items()):
        generator = torch.Generator().manual_seed(number)
        scale = torch.rand((EXPERTS, value.shape[1], 1), generator=generator) * 0.01
        stored[name] = (value.float() / 0.01).to(torch.float8_e4m3fn)
        stored[name + "_scale"] = scale
        decoded[name] = (stored[name].float() * scale).bfloat16()
    config = {**CONFIG, "quantization_config": compressed(experts=CHANNEL)}
    write_checkpoint_dir(tmp_path / "src", stored, config)
    write_checkpoint_dir(tmp_path / "plain", decoded, CONFIG)
    both_give_the_same(tmp_path, "unsloth")
    stacks = {name: value for name, value in decoded.items() if "experts" in name}
    check_bytes(read_all(tmp_path / "src-nf4"), stacks)


def test_kept_experts_are_written_as_they_are_stored(tmp_path):
    source = mixture(tmp_path / "src")
    nf4_ok("quantize", source, tmp_path / "out", *UNSLOTH, "--keep", "layers.0.mlp.experts")
    written, stored = read_all(tmp_path / "out"), read_all(source)
    assert [n for n in written if n.endswith(STATE) and "experts" in n] == [
        PATH.format(1) + f".{leaf}_proj{STATE}" for leaf in ("down", "gate_up")
    ]
    kept = [name for name in stored if name.startswith(PATH.format(0))]
    assert all(torch.equal(written[name], stored[name]) for name in kept)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    skip = config["quantization_config"]["llm_int8_skip_modules"]
    assert PATH.format(0) in skip
    assert PATH.format(1) not in skip
    assert "is good" in nf4_ok("verify", tmp_path / "out", "--source", source)


def test_a_nan_keeps_all_experts_of_its_layer(tmp_path):
    name = PATH.format(1) + ".7.up_proj.weight"
    poisoned = tensors_of()[name].clone()
    poisoned[3, 5] = torch.nan
    source = mixture(tmp_path / "src", **{name: poisoned})
    refused(INPUT, "quantize", source, "out", *UNSLOTH,
            says=(f"{name}[3, 5]", f"--keep {PATH.format(1)}"), cwd=tmp_path)  # fmt: skip
    nf4_ok("quantize", source, tmp_path / "out", *UNSLOTH, "--on-nonfinite", "keep")
    written = read_all(tmp_path / "out")
    assert {n.split(".")[2] for n in written if "experts" in n and n.endswith(STATE)} == {"0"}
    assert written[name].isnan().nonzero().tolist() == [[3, 5]]
    assert "is good" in nf4_ok("verify", tmp_path / "out", "--source", source)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({".3.up_proj.weight": None}, ("experts.3.up_proj.weight is missing", "Download")),
        ({".3.up_proj.weight": matrix(16, HIDDEN)}, ("[16, 64]", "[32, 64]")),
        ({".3.up_proj.weight": matrix(WIDTH, HIDDEN).float()}, ("F32", "one dtype")),
        ({".900000.up_proj.weight": matrix(WIDTH, HIDDEN)}, ("experts.12.gate_proj", "missing")),
    ],
)
def test_what_makes_no_stack_is_refused(tmp_path, changed, says):
    named = {PATH.format(1) + name: value for name, value in changed.items()}
    source = mixture(tmp_path / "src", **named)
    refused(INPUT, "quantize", source, "out", *UNSLOTH, says=says, cwd=tmp_path)
    assert not (tmp_path / "out").exists()


def test_scales_of_two_experts_are_not_searched_together(tmp_path):
    source = mixture(tmp_path / "src")
    options = (*UNSLOTH, "--scale", "search")
    says = ("2,048 weights", "16,384", "256 blocks of 64", "--target transformers")
    refused(USAGE, "quantize", source, "out", *options, says=says, cwd=tmp_path)
    nf4_ok("quantize", source, tmp_path / "out", *options, "--no-double-quant")
    assert "is good" in nf4_ok("verify", tmp_path / "out", "--source", source)


def test_experts_with_tensors_of_their_own_stay_matrices(tmp_path):
    """A class with biases is none that this package knows."""
    bias = {PATH.format(0) + ".0.up_proj.bias": matrix(WIDTH)}
    nf4_ok("quantize", mixture(tmp_path / "src", **bias), tmp_path / "out", *UNSLOTH)
    written = read_all(tmp_path / "out")
    assert PATH.format(0) + ".0.up_proj.weight" + STATE in written
    assert PATH.format(1) + ".gate_up_proj" + STATE in written


def test_layers_that_loaders_ignore_stay_as_they_are(tmp_path):
    source = write_checkpoint_dir(
        tmp_path / "src",
        tensors_of(),
        {**CONFIG, "num_hidden_layers": 1, "num_nextn_predict_layers": 1},
    )
    nf4_ok("quantize", source, tmp_path / "out", *UNSLOTH)
    written = read_all(tmp_path / "out")
    assert PATH.format(0) + ".gate_up_proj" + STATE in written
    assert written[PATH.format(1) + ".0.up_proj.weight"].shape == (WIDTH, HIDDEN)


def test_outputs_of_matrices_are_proved_as_they_were_made(tmp_path):
    """nf4 0.2 wrote matrices for unsloth; its manifests know no expert_layout."""
    source = mixture(tmp_path / "src")
    nf4_ok("quantize", source, tmp_path / "out", "--target", "vllm")
    for path in (tmp_path / "out" / "nf4_manifest.json",):
        path.write_text(path.read_text().replace('"target": "vllm"', '"target": "unsloth"'))
    assert "is good" in nf4_ok("verify", tmp_path / "out", "--source", source)


def test_a_stopped_run_goes_on(tmp_path, all_engines):
    from nf4cli.convert import shard_files

    source = mixture(tmp_path / "src", shards=2)
    plan = make_plan(open_checkpoint(source), QuantConfig(target="unsloth"))
    engine, resources = next(iter(all_engines.values())), Resources(2, 1 << 19, 0)
    carry_out(plan, tmp_path / "whole", engine, resources)
    finished: list[str] = []
    finish = shard_files.ShardFiles.finish

    def stop_after_some(self, tensor, result):
        finish(self, tensor, result)
        finished.append(tensor.name)
        if PATH.format(0) + ".gate_up_proj" in finished and len(finished) > 8:
            raise OSError(28, "no room")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard_files.ShardFiles, "finish", stop_after_some)
        with pytest.raises(Exception, match="continue with the same command"):
            carry_out(plan, tmp_path / "out", engine, resources)
    done: list[str] = []
    carry_out(plan, tmp_path / "out", engine, resources, resume=True,
              progress=lambda name, _: done.append(name))  # fmt: skip
    assert same_files(tmp_path / "whole", tmp_path / "out")


def test_room_for_the_scales_of_all_stacks_that_are_open(tmp_path):
    """Where the files hold some experts of every layer, every stack is open to the end."""
    tensors = tensors_of()
    by_layer = write_checkpoint_dir(tmp_path / "a", tensors, CONFIG)
    by_expert = write_checkpoint_dir(tmp_path / "b", tensors, CONFIG, shards=2)
    plans = [
        make_plan(open_checkpoint(p), QuantConfig(target="unsloth")) for p in (by_layer, by_expert)
    ]
    of_a_layer = 4 * EXPERTS * 3 * WIDTH * HIDDEN // 64
    assert plans[0].scattered_scratch_bytes == of_a_layer
    assert plans[1].scattered_scratch_bytes == 2 * of_a_layer
    matrices = make_plan(open_checkpoint(by_expert), QuantConfig(target="vllm"))
    assert matrices.scattered_scratch_bytes == 0
    assert bytes_beside_shards(plans[1], 1) > plans[1].scattered_scratch_bytes


def gpt_oss(root: Path) -> Path:
    tensors = {n: t for n, t in llama_tensors().items() if ".mlp." not in n}
    for layer in range(2):
        path = f"model.layers.{layer}.mlp."
        tensors |= {
            path + "router.weight": matrix(4, HIDDEN), path + "router.bias": matrix(4),
            path + "experts.gate_up_proj": matrix(4, HIDDEN, 2 * WIDTH, seed=layer),
            path + "experts.gate_up_proj_bias": matrix(4, 2 * WIDTH, seed=layer + 2),
            path + "experts.down_proj": matrix(4, WIDTH, HIDDEN, seed=layer + 4),
            path + "experts.down_proj_bias": matrix(4, HIDDEN, seed=layer + 6),
        }  # fmt: skip
    return write_checkpoint_dir(root, tensors, {**LLAMA, "model_type": "gpt_oss"}, shards=2)


def test_gpt_oss_has_unsloth_s_own_names(tmp_path):
    source = gpt_oss(tmp_path / "src")
    said = nf4_ok("quantize", source, tmp_path / "out", *UNSLOTH)
    assert "wrapper" not in said
    written, stored = read_all(tmp_path / "out"), read_all(source)
    path = "model.layers.1.mlp."
    for kind in ("gate_up", "down"):
        for expert in range(4):
            value = stored[f"{path}experts.{kind}_proj"][expert].T.contiguous()
            packed, _ = bnb_quantize(value, 64, "nf4")
            name = f"{path}experts.{kind}_projs.{expert}."
            assert written[name + "weight"].flatten().tolist() == packed.tolist()
            bias = stored[f"{path}experts.{kind}_proj_bias"][expert]
            assert torch.equal(written[name + "bias"], bias)
    assert torch.equal(written[path + "router.linear.weight"], stored[path + "router.weight"])
    assert not [n for n in written if "_proj." not in n and "_proj" in n and "projs" not in n]
    assert "is good" in nf4_ok("verify", tmp_path / "out", "--source", source)
    nf4_ok("dequantize", tmp_path / "out", tmp_path / "back")
    back = read_all(tmp_path / "back")
    assert {n: t.shape for n, t in back.items()} == {n: t.shape for n, t in stored.items()}
    same = [n for n in stored if "bias" in n or "router" in n]
    assert all(torch.equal(back[n], stored[n]) for n in same)
    assert max((back[n] - stored[n]).abs().max() for n in stored if "experts" in n) < 0.1
    (tmp_path / "out" / "nf4_manifest.json").unlink()
    nf4_ok("dequantize", tmp_path / "out", tmp_path / "alone")
    assert same_files(tmp_path / "back", tmp_path / "alone")


def test_gpt_oss_in_mxfp4_gives_what_the_decoded_one_gives(tmp_path):
    """Its experts are stored as unsloth holds them: nothing is transposed."""
    decoded = encoded_models.gpt_oss(tmp_path / "src", hidden=128)
    write_checkpoint_dir(tmp_path / "plain", decoded, encoded_models.GPT_OSS | {"hidden_size": 128})
    both_give_the_same(tmp_path, "unsloth")
    name = "model.layers.1.mlp.experts.gate_up_projs.2.weight"
    value = decoded["model.layers.1.mlp.experts.gate_up_proj"][2].T.contiguous()
    written = read_all(tmp_path / "src-nf4")
    assert written[name].flatten().tolist() == bnb_quantize(value, 64, "nf4")[0].tolist()
    assert len([key for key in written if key.endswith(STATE) and "experts" in key]) == 2 * 2 * 3
    back = read_all(tmp_path / "src-nf4-back")
    assert {n: t.shape for n, t in back.items()} == {n: t.shape for n, t in decoded.items()}


@pytest.mark.parametrize("held", [0, 1 << 20])
def test_mxfp4_experts_in_many_pieces(tmp_path, monkeypatch, held):
    """Pieces begin in the middle of rows; factors come from the file, or from memory."""
    monkeypatch.setattr(conversion, "_HELD", held)
    sizes = {"hidden_size": 608, "intermediate_size": 736}
    decoded = encoded_models.gpt_oss(tmp_path / "src", hidden=608, middle=736)
    write_checkpoint_dir(tmp_path / "plain", decoded, encoded_models.GPT_OSS | sizes, shards=2)
    engine = engines.load("cpu")
    for scale, keep in (("absmax", ("layers.0.mlp.experts",)), ("search", ())):
        recipe = QuantConfig(target="unsloth", blocksize=32, scale=scale, keep=keep)
        outs = {}
        for source, workers in (("src", 1), ("src", 3), ("plain", 2)):
            plan = make_plan(open_checkpoint(tmp_path / source), recipe)
            out = outs[source, workers] = tmp_path / f"{scale}-{source}-{workers}"
            carry_out(plan, out, engine, Resources(workers, 1 << 19, 0))
        assert same_files(outs["src", 1], outs["src", 3])
        ours, plain = read_all(outs["src", 1]), read_all(outs["plain", 2])
        assert ours.keys() == plain.keys()
        assert all(torch.equal(ours[key], plain[key]) for key in plain)


def test_a_damaged_factor_of_an_mxfp4_expert_is_named(tmp_path):
    encoded_models.gpt_oss(tmp_path / "src", shards=1)
    stored = read_all(tmp_path / "src")
    stored["model.layers.0.mlp.experts.down_proj_scales"][2, 5, 1] = 255
    stored["model.layers.0.mlp.experts.down_proj_blocks"][2, 5, 1] = 0x22
    config = json.loads((tmp_path / "src" / "config.json").read_text())
    write_checkpoint_dir(tmp_path / "bad", stored, config)
    says = ("experts.down_projs.2.weight[5, 32]", "down_proj_scales[2, 5, 1]", "MXFP4")
    refused(INPUT, "quantize", "bad", "out", *UNSLOTH, says=says, cwd=tmp_path)


@pytest.mark.parametrize("shards", [1, 2])
def test_factors_of_all_experts_are_read_once(tmp_path, monkeypatch, shards):
    """They lie in one tensor of the layer, 66 MB of gpt-oss-120b, in the file of the codes or in
    another."""
    encoded_models.gpt_oss(tmp_path / "src", shards=shards)
    read: list[str] = []
    digest, read_tensor = conversion.digest_tensor, conversion.LocalShards.read_tensor
    monkeypatch.setattr(conversion, "_HELD", 0)
    monkeypatch.setattr(
        conversion, "digest_tensor", lambda r, tensor: read.append(tensor.name) or digest(r, tensor)
    )
    monkeypatch.setattr(
        conversion.LocalShards, "read_tensor",
        lambda self, shard, tensor: read.append(tensor.name) or read_tensor(self, shard, tensor),
    )  # fmt: skip
    plan = make_plan(open_checkpoint(tmp_path / "src"), QuantConfig(target="unsloth"))
    carry_out(plan, tmp_path / "out", engines.load("cpu"), Resources(1, 8 << 20, 0))
    layers = [f"model.layers.{layer}.mlp.experts." for layer in range(2)]
    assert sorted(read) == sorted(
        f"{path}{kind}_proj_scales" for path in layers for kind in ("gate_up", "down")
    )


INT4 = weights(4, "int", "group", group_size=32)  # Kimi K2
CHANNEL = weights(8, "float", "channel")
NVFP4 = weights(4, "float", "tensor_group", group_size=16)


@pytest.mark.parametrize("target", ["unsloth", "vllm", "transformers"])
@pytest.mark.parametrize("scheme", [INT4, NVFP4])
def test_experts_that_are_stored_as_codes(tmp_path, scheme, target):
    """Expert by expert, each with scales of its own, in files that hold parts of each stack."""
    stored, decoded = {}, tensors_of()
    for number, (name, value) in enumerate(tensors_of().items()):
        stored[name] = value
        if "experts" in name:
            parts = packed(scheme, stored.pop(name), torch.bfloat16, number)
            decoded[name] = unpacked(scheme, parts).bfloat16()
            stored |= {name.removesuffix("weight") + part: t for part, t in parts.items()}
    config = {**CONFIG, "quantization_config": compressed(experts=scheme)}
    write_checkpoint_dir(tmp_path / "src", stored, config, shards=3)
    write_checkpoint_dir(tmp_path / "plain", decoded, CONFIG)
    both_give_the_same(tmp_path, target)
    written = read_all(tmp_path / "src-nf4")
    if target == "unsloth":
        check_bytes(written, stacks_of(decoded))
    name = PATH.format(1) + ".7.up_proj.weight"
    assert (name + STATE in written) == (target == "vllm")


def both_give_the_same(root: Path, target: str) -> None:
    """`src` and `plain` have one output, which is proved from `src` and decoded."""
    for name in ("src", "plain"):
        nf4_ok("quantize", root / name, root / f"{name}-nf4", "--target", target)
        nf4_ok("dequantize", root / f"{name}-nf4", root / f"{name}-nf4-back")
    for end in ("nf4", "nf4-back"):
        ours, plain = read_all(root / f"src-{end}"), read_all(root / f"plain-{end}")
        assert ours.keys() == plain.keys()
        assert all(torch.equal(ours[key], plain[key]) for key in plain)
    skips = [
        set(json.loads((root / f"{name}-nf4" / "config.json").read_text())
            ["quantization_config"]["llm_int8_skip_modules"])
        for name in ("src", "plain")
    ]  # fmt: skip
    assert skips[0] == skips[1]
    for options in ((), ("--sample", "40%")):
        said = nf4_ok("verify", root / "src-nf4", "--source", root / "src", *options)
        assert "is good" in said


def test_entries_of_a_list_that_are_missing(tmp_path):
    nf4_ok("quantize", gpt_oss(tmp_path / "src"), tmp_path / "out", *UNSLOTH)
    written = read_all(tmp_path / "out")
    rest = {n: t for n, t in written.items() if ".layers.0.mlp.experts.down_projs.1." not in n}
    save_file(rest, tmp_path / "out" / "model.safetensors", {"format": "pt"})
    refused(INPUT, "dequantize", "out", "back", cwd=tmp_path,
            says=("experts.down_proj", "not all there"))  # fmt: skip


def test_the_families_are_those_that_transformers_stacks_so():
    """From transformers' own table of what it does to a checkpoint's matrices."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    from transformers.core_model_loading import Concatenate, MergeModulelist

    for family, parts in FAMILIES.items():
        found = {}
        for entry in get_checkpoint_conversion_mapping(family) or ():
            operations = getattr(entry, "operations", ())
            if not any(isinstance(operation, MergeModulelist) for operation in operations):
                continue
            assert [op.dim for op in operations] == [0, 1][: len(operations)], family
            assert isinstance(operations[-1], (MergeModulelist, Concatenate))
            (target,) = entry.target_patterns
            found[target.rpartition(".")[2]] = tuple(
                pattern.split(".")[-2] for pattern in entry.source_patterns
            )
        assert found == parts, family
