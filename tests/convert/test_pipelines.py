"""Diffusers pipelines: components converted one by one, loaded by diffusers itself, proved."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    INPUT,
    USAGE,
    bnb_quantize,
    carry_out,
    nf4,
    nf4_ok,
    read_all,
    refused,
    same_files,
    write_checkpoint_dir,
)
from safetensors.torch import load_file, save_file
from small_pipelines import BLOCK, WEIGHTS, component, denoiser

from nf4cli import engines
from nf4cli.checkpoint.discovery import MANIFEST, PIPELINE_RECORD
from nf4cli.errors import InterruptedRunError, UnfinishedRunError
from nf4cli.format.config import QuantConfig
from nf4cli.planning.pipeline_plan import make_pipeline_plan
from nf4cli.planning.resources import make_resources


def change_index(pipe: Path, **entries: Any) -> None:
    path = pipe / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def test_components_become_checkpoints_and_the_rest_is_copied(pipe, tmp_path):
    out = tmp_path / "out"
    nf4_ok("quantize", pipe, out)
    tensors, made = load_file(pipe / "transformer" / WEIGHTS), read_all(out / "transformer")
    for name in (BLOCK, "single_transformer_blocks.0.proj_out.weight", "proj_out.weight"):
        packed, _ = bnb_quantize(tensors[name], 64, "nf4")
        assert np.array_equal(made[name].reshape(-1).numpy(), packed)
    kept = [n for n in tensors if torch.equal(made[n], tensors[n])]
    assert kept == [
        "conv_in.weight", "time_text_embed.timestep_embedder.linear_1.weight",
        "transformer_blocks.0.norm1.linear.bias", "x_embedder.weight",
    ]  # fmt: skip
    config = json.loads((out / "transformer" / "config.json").read_text())
    assert set(config) == {"_class_name", "quantization_config"}
    skip = config["quantization_config"]["llm_int8_skip_modules"]
    assert {"x_embedder", "time_text_embed.timestep_embedder.linear_1"} <= set(skip)
    assert "proj_out" not in skip
    assert (out / "text_encoder" / "model.safetensors").is_file()
    for name in ("model_index.json", "scheduler/scheduler_config.json",
                 "tokenizer/vocab.json", f"vae/{WEIGHTS}", "vae/config.json"):  # fmt: skip
        assert (out / name).read_bytes() == (pipe / name).read_bytes()
    text = nf4_ok("verify", out, "--source", pipe)
    assert "copied files are those of the source" in text
    assert "not checked" not in text
    assert "--source" in nf4_ok("verify", out)


def test_dequantize_gives_a_pipeline_back(pipe, tmp_path):
    out, back = tmp_path / "out", tmp_path / "back"
    nf4_ok("quantize", pipe, out)
    nf4_ok("dequantize", out, back)
    here = {p.relative_to(back) for p in back.rglob("*")}
    assert here == {p.relative_to(pipe) for p in pipe.rglob("*")} - {Path("README.md")}
    for part in ("transformer", "text_encoder"):
        assert (
            json.loads((back / part / "config.json").read_text()).items()
            >= json.loads((pipe / part / "config.json").read_text()).items()
        )
        before, after = read_all(pipe / part), read_all(back / part)
        for name, tensor in before.items():
            assert after[name].shape == tensor.shape
            assert after[name].dtype == tensor.dtype
            assert (after[name] - tensor).float().norm() < 0.15 * tensor.float().norm()
    document = json.loads(nf4_ok("dequantize", out, tmp_path / "b2", "--json"))
    assert document["components"]["transformer"]["decoded"] == 4


def test_plan_json_and_inspect_have_a_section_for_each_component(pipe, tmp_path):
    plan = json.loads(nf4_ok("quantize", pipe, tmp_path / "out", "--plan", "--json"))
    assert not (tmp_path / "out").exists()
    assert set(plan["components"]) == {"transformer", "text_encoder"}
    assert "transformer" in nf4_ok("quantize", pipe, tmp_path / "out", "--plan")
    done = json.loads(nf4_ok("quantize", pipe, tmp_path / "out", "--json"))
    assert done["output_bytes"] == plan["output_bytes"] == sum(
        (tmp_path / "out" / name).stat().st_size
        for name in ("text_encoder/model.safetensors", f"transformer/{WEIGHTS}")
    )  # fmt: skip
    assert done["components"]["transformer"]["errors"][BLOCK]["rel_rmse"] > 0
    report = json.loads(nf4_ok("verify", tmp_path / "out", "--json"))
    assert report["ok"]
    assert set(report["components"]) == {"transformer", "text_encoder"}
    seen = json.loads(nf4_ok("inspect", tmp_path / "out", "--json"))
    assert seen["components"]["transformer"]["model_type"] == "FluxTransformer2DModel"
    assert seen["components"]["transformer"]["quantized_parameters"] == 128 * 64 + 384 * 64 + (
        64 * 192 + 32 * 64
    )
    assert "codes" in nf4_ok("inspect", tmp_path / "out", f"transformer.{BLOCK}")
    refused(USAGE, "inspect", tmp_path / "out", BLOCK, says=("COMPONENT.TENSOR",), cwd=tmp_path)


def test_a_component_and_a_bare_file_alone(pipe, tmp_path):
    nf4_ok("quantize", pipe, tmp_path / "whole")
    nf4_ok("quantize", pipe / "transformer", tmp_path / "part")
    assert same_files(
        tmp_path / "part", tmp_path / "whole" / "transformer", but=(MANIFEST, "README.md")
    )
    nf4_ok("verify", tmp_path / "part", "--source", pipe / "transformer")
    shutil.copy(pipe / "transformer" / WEIGHTS, tmp_path / WEIGHTS)
    nf4_ok("quantize", tmp_path / WEIGHTS, tmp_path / "bare")
    bare, part = read_all(tmp_path / "bare"), read_all(tmp_path / "part")
    assert bare.keys() == part.keys()
    assert (tmp_path / "bare" / WEIGHTS).is_file()
    nf4_ok("verify", tmp_path / "bare", "--source", tmp_path / WEIGHTS)


def test_shards_are_named_as_diffusers_expects(pipe, tmp_path):
    tensors = {f"blocks.{i}.a.weight": torch.randn(1000, 1024).bfloat16() for i in range(4)}
    save_file(tensors, pipe / "transformer" / WEIGHTS, {"format": "pt"})
    out = tmp_path / "out"
    nf4_ok("quantize", pipe, out, "--max-shard-size", "1.2MB")
    names = sorted(p.name for p in (out / "transformer").iterdir() if MANIFEST not in p.name)
    stem = "diffusion_pytorch_model"
    assert names == [
        "config.json", f"{stem}-00001-of-00002.safetensors", f"{stem}-00002-of-00002.safetensors",
        f"{stem}.safetensors.index.json",
    ]  # fmt: skip
    nf4_ok("verify", out, "--source", pipe)
    nf4_ok("dequantize", out, tmp_path / "back", "--max-shard-size", "5MB")
    assert (tmp_path / "back" / "transformer" / f"{stem}.safetensors.index.json").is_file()
    (out / "transformer" / f"{stem}.safetensors.index.json").unlink()
    assert "index.json is missing" in nf4("verify", out).stdout


def test_variants_are_left_beside_full_weights(pipe, tmp_path):
    for part, name in (("transformer", "diffusion_pytorch_model"), ("text_encoder", "model"),
                       ("vae", "diffusion_pytorch_model")):  # fmt: skip
        save_file({"x.weight": torch.zeros(4, 4)}, pipe / part / f"{name}.fp16.safetensors")
        (pipe / part / f"{name}.bin").write_bytes(b"pickle")
    (pipe / "flux1-dev.safetensors").write_bytes(b"all of it again")
    plan = json.loads(nf4_ok("quantize", pipe, tmp_path / "out", "--plan", "--json"))
    assert plan["left_files"] == sorted((
        "README.md", "flux1-dev.safetensors", "text_encoder/model.bin",
        "text_encoder/model.fp16.safetensors",
        "transformer/diffusion_pytorch_model.bin", "vae/diffusion_pytorch_model.bin",
        "transformer/diffusion_pytorch_model.fp16.safetensors",
        "vae/diffusion_pytorch_model.fp16.safetensors",
    ))  # fmt: skip
    nf4_ok("quantize", pipe, tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").rglob("*.safetensors")} == {
        WEIGHTS, "model.safetensors"
    }  # fmt: skip
    nf4_ok("verify", tmp_path / "out", "--source", pipe)


@pytest.mark.parametrize("legacy", [False, True])
def test_variants_alone_are_used_under_plain_names(pipe, tmp_path, legacy):
    stem = "diffusion_pytorch_model"
    (pipe / "transformer" / WEIGHTS).rename(pipe / "transformer" / f"{stem}.fp16.safetensors")
    (pipe / "text_encoder/model.safetensors").rename(pipe / "text_encoder/model.fp16.safetensors")
    (pipe / "vae" / WEIGHTS).unlink()
    names = [f"-0000{i}-of-00002.fp16" if legacy else f".fp16-0000{i}-of-00002" for i in (1, 2)]
    for name in names:
        save_file({f"{name[-1]}.weight": torch.ones(2)}, pipe / f"vae/{stem}{name}.safetensors")
    index = {"weight_map": {f"{name[-1]}.weight": f"{stem}{name}.safetensors" for name in names}}
    if legacy:
        index["weight_map"] = {"6.weight": f"{stem}{names[1]}.safetensors"}
    dotted = ".fp16.index.json" if legacy else ".index.fp16.json"
    (pipe / f"vae/{stem}.safetensors{dotted}").write_text(json.dumps(index))
    out = tmp_path / "out"
    nf4_ok("quantize", pipe, out)
    assert (out / "transformer" / WEIGHTS).is_file()
    assert (out / "text_encoder/model.safetensors").is_file()
    assert not list(out.rglob("*fp16*"))
    renamed = json.loads((out / f"vae/{stem}.safetensors.index.json").read_text())
    assert all((out / "vae" / file).is_file() for file in renamed["weight_map"].values())
    nf4_ok("verify", out, "--source", pipe)


def test_keep_speaks_of_components_and_of_their_modules(pipe, tmp_path):
    out = tmp_path / "out"
    text = nf4_ok("quantize", pipe, out, "--keep", "text_encoder", "--keep", "transformer.proj_out")
    assert "text_encoder is kept as it is" in text
    assert "in full precision stays vae (AutoencoderKL, " in text
    assert same_files(out / "text_encoder", pipe / "text_encoder")
    assert "single_transformer_blocks.0.proj_out.weight.absmax" not in read_all(out / "transformer")
    nf4_ok("verify", out, "--source", pipe)
    nf4_ok("quantize", pipe, tmp_path / "o2", "--keep", "*.fc1")  # leaves nothing of one part
    assert same_files(tmp_path / "o2" / "text_encoder", pipe / "text_encoder")
    refused(
        USAGE, "quantize", pipe, tmp_path / "o3", "--keep", "vae.a",
        says=("--keep 'vae.a' matches no module of",), cwd=tmp_path,
    )  # fmt: skip


def test_weights_that_are_not_finite_are_kept_in_any_component(pipe, tmp_path):
    tensors = denoiser()
    tensors[BLOCK][3, 5] = torch.nan
    save_file(tensors, pipe / "transformer" / WEIGHTS, {"format": "pt"})
    refused(INPUT, "quantize", "pipe", says=("--on-nonfinite keep",), cwd=tmp_path)
    keep = ("--on-nonfinite", "keep")
    refused(USAGE, "quantize", "pipe", "pipe", *keep, says=("source directory",), cwd=tmp_path)
    text = nf4_ok("quantize", pipe, tmp_path / "out", *keep)
    assert f"transformer: {BLOCK} holds a NaN or an infinity and stays in bfloat16" in text
    found = load_file(tmp_path / "out" / "transformer" / WEIGHTS)[BLOCK]
    assert torch.isnan(found).nonzero().tolist() == [[3, 5]]
    assert "is good" in nf4_ok("verify", tmp_path / "out", "--source", pipe)


def test_what_has_no_linear_layer_is_copied(pipe, tmp_path):
    component(pipe / "controlnet", {"conv.weight": torch.zeros(4, 4, 3, 3)},
              {"_class_name": "ControlNetModel"})  # fmt: skip
    change_index(pipe, controlnet=["diffusers", "ControlNetModel"])
    text = nf4_ok("quantize", pipe, tmp_path / "out")
    assert "controlnet is copied as it is" in text
    assert same_files(tmp_path / "out" / "controlnet", pipe / "controlnet")
    nf4_ok("verify", tmp_path / "out", "--source", pipe)


def test_float32_modules_of_diffusers_keep_their_precision(pipe, tmp_path):
    tensors = {
        "blocks.0.ffn.net.0.proj.weight": torch.randn(64, 64).bfloat16(),
        "blocks.0.scale_shift_table": torch.randn(1, 6, 64),
        "blocks.0.norm2.weight": torch.randn(64),
        "condition_embedder.time_embedder.linear_1.weight": torch.randn(64, 32),
        "blocks.0.ffn.net.2.bias": torch.randn(64),
    }
    root = component(
        tmp_path / "wan", {k: v.contiguous() for k, v in tensors.items()},
        {"_class_name": "WanTransformer3DModel"},
    )  # fmt: skip
    nf4_ok("quantize", root, tmp_path / "out", "--dtype", "bfloat16")
    dtypes = {name: tensor.dtype for name, tensor in read_all(tmp_path / "out").items()}
    assert dtypes["blocks.0.ffn.net.2.bias"] == torch.bfloat16
    for name in list(tensors)[1:4]:
        assert dtypes[name] == torch.float32
    nf4_ok("verify", tmp_path / "out", "--source", root)


# -- what is wrong is refused, or found -----------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "is not valid JSON"), ("[]", "holds a JSON list"), ("{}", 'no "_class_name"'),
        ('{"_class_name": "X"}', "no denoiser and no text encoder"),
        ('{"_class_name": "X", "unet": ["diffusers", "UNet2DConditionModel"]}', "no directory"),
        ('{"_class_name": "X", "../vae": ["diffusers", "UNet2DModel"]}', "leads out"),
        ('{"_class_name": "X", "/etc": ["diffusers", "UNet2DModel"]}', "leads out"),
        ('{"_class_name": "X", "..": ["diffusers", "UNet2DModel"]}', "leads out"),
        ('{"_class_name": "X", "a\\u0000b": ["diffusers", "UNet2DModel"]}', "leads out"),
    ],
)  # fmt: skip
def test_a_bad_index_is_refused(pipe, tmp_path, text, says):
    (pipe / "model_index.json").write_text(text)
    refused(INPUT, "quantize", pipe, tmp_path / "out", says=(says,), cwd=tmp_path)


def test_a_component_that_cannot_be_converted_is_refused(pipe, tmp_path):
    weights = pipe / "transformer" / WEIGHTS
    data = weights.read_bytes()
    weights.write_bytes(data[:-10])
    refused(INPUT, "quantize", pipe, tmp_path / "o", says=(WEIGHTS,), cwd=tmp_path)
    weights.unlink()
    refused(INPUT, "quantize", pipe, tmp_path / "o", says=("no .safetensors file",), cwd=tmp_path)
    (weights.parent / "diffusion_pytorch_model.bin").write_bytes(b"pickle")
    refused(INPUT, "quantize", pipe, tmp_path / "o", says=("from diffusers",), cwd=tmp_path)
    weights.write_bytes(data)
    nf4_ok("quantize", pipe, tmp_path / "once")
    refused(
        INPUT, "quantize", tmp_path / "once", tmp_path / "o", says=("already",), cwd=tmp_path
    )  # fmt: skip
    refused(USAGE, "quantize", pipe, pipe / "inside", says=("inside it",), cwd=tmp_path)
    refused(USAGE, "quantize", pipe, tmp_path / "once", says=("exists",), cwd=tmp_path)
    refused(
        USAGE, "quantize", pipe, tmp_path / "o", "--target", "vllm", says=("vllm",), cwd=tmp_path
    )  # fmt: skip
    refused(
        USAGE, "quantize", pipe, tmp_path / "o", "--quant-storage", "bfloat16",
        says=("uint8 only",), cwd=tmp_path,
    )  # fmt: skip
    refused(INPUT, "dequantize", pipe, tmp_path / "o", says=("nothing to decode",), cwd=tmp_path)
    refused(INPUT, "verify", pipe, says=("nothing to verify",), cwd=tmp_path)


def test_a_run_that_ends_early_leaves_nothing_or_is_continued(pipe, tmp_path):
    tensors = denoiser()
    tensors[BLOCK][3, 4] = float("nan")  # in the component that comes last
    save_file(tensors, pipe / "transformer" / WEIGHTS, {"format": "pt"})
    refused(INPUT, "quantize", pipe, tmp_path / "out", says=(BLOCK, "NaN"), cwd=tmp_path)
    save_file(denoiser(), pipe / "transformer" / WEIGHTS, {"format": "pt"})

    def interrupt(what: str, _: int) -> None:
        if what == BLOCK:
            raise InterruptedRunError("enough")

    plan, engine = make_pipeline_plan(pipe, QuantConfig()), engines.load("cpu")
    with pytest.raises(UnfinishedRunError, match="weights are done and kept"):
        carry_out(
            plan, tmp_path / "out", engine, make_resources(engine, 2, None, 2),
            progress=interrupt,
        )  # fmt: skip
    assert not (tmp_path / "out").exists()
    (tmp_path / ".out.partial" / "files" / "stale.json").write_text("{}")
    done = nf4("quantize", pipe, tmp_path / "out", "--resume")
    assert done.returncode == 0, done.stderr
    assert "continuing an earlier run" in done.stderr
    nf4_ok("quantize", pipe, tmp_path / "other")
    assert same_files(tmp_path / "other", tmp_path / "out")
    assert not (tmp_path / ".out.partial").exists()
    nf4_ok("quantize", pipe, tmp_path / "out", "--resume")  # it is there
    for _ in range(2):
        nf4_ok("quantize", pipe, tmp_path / "out2", "--on-nonfinite", "keep", "--resume")
    (tmp_path / "out" / "vae" / WEIGHTS).write_bytes(b"garbage")
    refused(
        USAGE, "quantize", pipe, tmp_path / "out", "--resume", cwd=tmp_path,
        says=("is not what this would write", "vae"),
    )  # fmt: skip


@pytest.mark.parametrize("proof", [False, True])
@pytest.mark.parametrize(
    ("name", "change"),
    [
        (f"vae/{WEIGHTS}", lambda p: p.write_bytes(p.read_bytes()[:-1] + b"\x55")),
        (f"transformer/{WEIGHTS}", lambda p: p.write_bytes(p.read_bytes()[:-9] + b"123456789")),
        ("transformer/config.json", lambda p: p.write_text('{"_class_name": "Other"}')),
        ("transformer/config.json", lambda p: p.write_text("{")),
        (f"transformer/{WEIGHTS}", lambda p: p.unlink()),
        (f"transformer/{MANIFEST}", lambda p: p.unlink()),
        (
            f"transformer/{MANIFEST}",
            lambda p: p.write_text(p.read_text().replace('"config.json"', '"a\\u0000b"')),
        ),
        ("scheduler/scheduler_config.json", lambda p: p.unlink()),
        ("model_index.json", lambda p: p.write_text("{}")),
        (PIPELINE_RECORD, lambda p: p.write_text("{}")),
        (PIPELINE_RECORD, lambda p: p.write_text('{"nf4_pipeline": 1, "files": [1]}')),
        (PIPELINE_RECORD, lambda p: p.write_text(p.read_text().replace("vae/", "../vae/"))),
        (PIPELINE_RECORD, lambda p: p.write_text(p.read_text().replace("vae/", "a\\u0000"))),
        (PIPELINE_RECORD, lambda p: p.write_text(p.read_text().replace('"transf', '"../transf'))),
        ("vae/diffusion_pytorch_model.bin", lambda p: p.write_text("from elsewhere")),
        ("transformer", shutil.rmtree),
    ],
)
def test_verify_finds_what_was_changed(pipe, tmp_path, name, change, proof):
    out = tmp_path / "out"
    nf4_ok("quantize", pipe, out)
    change(out / name)
    done = nf4("verify", out, *(["--source", pipe] if proof else []))
    assert done.returncode == 1, f"{done.stdout}{done.stderr}"
    assert "Traceback" not in done.stderr
    assert "NOT good" in done.stdout


def test_without_a_record_only_the_source_tells_of_the_copies(pipe, tmp_path):
    out = tmp_path / "out"
    nf4_ok("quantize", pipe, out)
    (out / PIPELINE_RECORD).unlink()
    (out / "vae" / "config.json").write_text("{}")
    assert f"there is no {PIPELINE_RECORD}" in nf4_ok("verify", out)
    assert "vae/config.json is not the file" in nf4("verify", out, "--source", pipe).stdout
    elsewhere = write_checkpoint_dir(tmp_path / "else", {"a.weight": torch.zeros(2, 2)})
    refused(INPUT, "verify", out, "--source", elsewhere, says=("no diffusers",), cwd=tmp_path)
