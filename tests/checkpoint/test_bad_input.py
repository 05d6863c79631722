"""Every bad input: one clear message, its exit code, nothing written, no traceback."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import (
    INPUT,
    LLAMA,
    MACHINE,
    UP,
    USAGE,
    llama_tensors,
    nf4,
    nf4_ok,
    nf4_process,
    refused,
    write_checkpoint_dir,
)
from safetensors.torch import save_file


def test_not_there(work):
    refused(INPUT, "quantize", "nowhere", says=("nowhere does not exist",), cwd=work)


def test_empty_directory(work):
    (work / "empty").mkdir()
    refused(INPUT, "quantize", "empty", says=("not a safetensors checkpoint",), cwd=work)


def test_not_safetensors(work):
    (work / "notes.txt").write_text("hello")
    refused(INPUT, "quantize", "notes.txt", says=("no .safetensors file",), cwd=work)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.ckpt"])
def test_pickles_are_never_opened(work, name):
    (work / "old").mkdir()
    (work / "old" / name).write_bytes(b"\x80\x04cos\nsystem\n(S'touch pwned'\ntR.")
    refused(
        INPUT, "quantize", "old", says=("never opens", "save_pretrained", "safetensors"), cwd=work
    )


def test_gguf_and_adapters_are_named(work):
    (work / "g").mkdir()
    (work / "g" / "m.gguf").write_bytes(b"GGUF")
    refused(INPUT, "quantize", "g", says=("GGUF", "original checkpoint"), cwd=work)
    (work / "a").mkdir()
    (work / "a" / "adapter_config.json").write_text("{}")
    refused(INPUT, "quantize", "a", says=("PEFT adapter", "merge"), cwd=work)
    save_file({"x.lora_A.weight": torch.zeros(4, 4)}, work / "a" / "adapter_model.safetensors")
    refused(INPUT, "quantize", "a", says=("PEFT adapter", "merge"), cwd=work)


def test_one_shard_of_several(work):
    write_checkpoint_dir(work / "split", llama_tensors(), LLAMA, shards=2)
    refused(
        INPUT, "quantize", "split/model-00001-of-00002.safetensors",
        says=("one of 2 shards", "give its directory"), cwd=work,
    )  # fmt: skip


def test_a_hub_id_is_told_apart(work, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    says = ("org/name is no path here", "HF_HUB_OFFLINE")
    refused(MACHINE, "quantize", "org/name", says=says, cwd=work, run=nf4_process)
    refused(INPUT, "quantize", "models/of/mine", says=("does not exist",), cwd=work)


def test_names_with_brackets_are_not_markup(work):
    tensors = {"a.0.[/x].[bold]b.weight": torch.ones(64, 64), "n.weight": torch.ones(3)}
    write_checkpoint_dir(work / "m[v2]", tensors, LLAMA)
    assert "out[/v2]" in nf4_ok("quantize", "m[v2]", "out[/v2]", cwd=work)
    assert "[bold]b.weight" in nf4_ok("inspect", "out[/v2]", cwd=work)
    nf4_ok("inspect", "out[/v2]", "a.0.[/x].[bold]b.weight", cwd=work)
    nf4_ok("verify", "out[/v2]", "--source", "m[v2]", cwd=work)
    nf4_ok("dequantize", "out[/v2]", "back[/]", cwd=work)


def test_a_poorer_locale_and_a_closed_pipe(work):
    nf4_ok("quantize", "model", cwd=work)
    poor = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = nf4_process("inspect", "model-nf4", "model.layers.0.mlp.down_proj", cwd=work, env=poor)
    assert done.returncode == 0, done.stderr
    nf4_command = Path(sys.executable).with_name("nf4")
    line = f"'{nf4_command}' quantize model out | true; echo ${{PIPESTATUS[0]}}"
    piped = subprocess.run(
        ["bash", "-c", line], capture_output=True, text=True, cwd=work, check=True
    )
    assert piped.stdout in ("141\n", "0\n")
    assert "error" not in piped.stderr
    assert "Traceback" not in piped.stderr


def test_git_lfs_pointer(work):
    (work / "model" / "model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
    )
    refused(INPUT, "quantize", "model", says=("Git LFS pointer", "git lfs pull"), cwd=work)


@pytest.mark.parametrize("keep", [0, 4, 8, 100, 0.5, -1])
def test_truncated_shard(work, keep):
    file = work / "model" / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * keep)] if isinstance(keep, float) else data[:keep])
    refused(INPUT, "quantize", "model", says=("model.safetensors",), cwd=work)


def test_trailing_bytes(work):
    with (work / "model" / "model.safetensors").open("ab") as file:
        file.write(b"more")
    refused(INPUT, "quantize", "model", says=("not a complete safetensors file",), cwd=work)


def test_index_names_a_missing_file(work):
    write_checkpoint_dir(work / "split", llama_tensors(), LLAMA, shards=3)
    (work / "split" / "model-00002-of-00003.safetensors").unlink()
    refused(
        INPUT, "quantize", "split",
        says=("model-00002-of-00003.safetensors", "does not exist", "download it again"), cwd=work,
    )  # fmt: skip


def edit_index(root: Path, change) -> None:
    path = root / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


def test_index_names_a_missing_tensor(work):
    root = write_checkpoint_dir(work / "split", llama_tensors(), LLAMA, shards=2)
    edit_index(
        root, lambda i: i["weight_map"].update({"ghost": "model-00001-of-00002.safetensors"})
    )
    refused(INPUT, "quantize", "split", says=("'ghost'", "nor another shard's"), cwd=work)


FIRST_SHARD = "model-00001-of-00002.safetensors"
INV_FREQ = "model.layers.0.self_attn.rotary_emb.inv_freq"
HARMLESS = {
    "a buffer that models compute": (lambda m: m.update({INV_FREQ: FIRST_SHARD}), INV_FREQ),
    "a tensor left out": (lambda m: m.pop(UP), UP),
    "the other shard": (lambda m: m.update({"lm_head.weight": FIRST_SHARD}), "lm_head.weight"),
}


@pytest.mark.parametrize("error", HARMLESS)
def test_what_loaders_pass_over_in_an_index_is_noted(work, error):
    """transformers and vLLM read all tensors of the files that an index names."""
    from transformers import AutoModelForCausalLM

    change, name = HARMLESS[error]
    root = write_checkpoint_dir(work / "split", llama_tensors(), LLAMA, shards=2)
    edit_index(root, lambda index: change(index["weight_map"]))
    _, info = AutoModelForCausalLM.from_pretrained(root, output_loading_info=True)
    assert not info["missing_keys"]
    assert repr(name) in nf4_ok("quantize", "split", "out", cwd=work)
    assert "is good" in nf4_ok("verify", "out", "--source", "split", cwd=work)


def test_an_output_with_such_an_index_is_not_good(work):
    wide = {f"model.layers.{i}.mlp.up_proj.weight": torch.ones(1024, 1024) for i in range(4)}
    config = {**LLAMA, "num_hidden_layers": 4}
    write_checkpoint_dir(work / "wide", llama_tensors() | wide, config)
    nf4_ok("quantize", "wide", "out", "--max-shard-size", "1MB", cwd=work)
    edit_index(work / "out", lambda index: index["weight_map"].pop(UP))
    done = nf4("verify", "out", cwd=work)
    assert done.returncode == 1
    assert "model.safetensors.index.json has no entry for 1 tensors" in done.stdout


@pytest.mark.parametrize(
    "names",
    [
        ("model_rank_0", "model_rank_1"),
        ("mp_rank_00_model", "mp_rank_01_model"),
        ("consolidated.00", "consolidated.01"),
        ("model-tp0", "model-tp1"),
    ],
)
def test_pieces_of_a_model_split_over_devices(work, names):
    root = work / "pieces"
    root.mkdir()
    for name in names:
        save_file(llama_tensors(), root / f"{name}.safetensors")
    for source in ("pieces", f"pieces/{names[1]}.safetensors"):
        refused(INPUT, "quantize", source, says=("split over 2 devices", names[0]), cwd=work)


@pytest.mark.parametrize(
    ("name", "says"),
    [("__0_0.distcp", "merge-weights"), ("zero_to_fp32.py", "--safe_serialization")],
)
def test_a_distributed_checkpoint_is_to_be_merged(work, name, says):
    (work / "pieces").mkdir()
    (work / "pieces" / name).write_bytes(b"")
    (work / "pieces/model.bin").write_bytes(b"")
    refused(INPUT, "quantize", "pieces", says=(says,), cwd=work)


def test_a_model_in_a_subdirectory_that_modules_json_names(work):
    write_checkpoint_dir(work / "sentences/0_Transformer", llama_tensors(), LLAMA)
    modules = [{"idx": 0, "name": "0", "path": "0_Transformer", "type": "x.Transformer"}]
    (work / "sentences/modules.json").write_text(json.dumps(modules))
    refused(INPUT, "quantize", "sentences", says=("convert that directory", "0_Trans"), cwd=work)


@pytest.mark.parametrize(
    "name", ["../model/model.safetensors", "/etc/passwd", "a/b.safetensors", ""]
)
def test_index_leads_out_of_the_directory(work, name):
    root = write_checkpoint_dir(work / "split", llama_tensors(), LLAMA, shards=2)
    edit_index(root, lambda i: i["weight_map"].update({UP: name}))
    refused(INPUT, "quantize", "split", says=("leads out of the directory",), cwd=work)


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"weight_map": 3}', '{"weight_map": {"a": 1}}', "[" * 100_000]
)
def test_index_is_garbage(work, text):
    root = write_checkpoint_dir(work / "split", llama_tensors(), LLAMA, shards=2)
    (root / "model.safetensors.index.json").write_text(text)
    refused(INPUT, "quantize", "split", says=("model.safetensors.index.json",), cwd=work)


def test_duplicate_tensor_across_shards(work):
    root = work / "dup"
    root.mkdir()
    for i in (1, 2):
        save_file({"same": torch.zeros(2)}, root / f"model-{i:05d}-of-00002.safetensors")
    refused(INPUT, "quantize", "dup", says=("'same'", "two shards"), cwd=work)


def test_a_shard_of_a_numbered_set_is_missing(work):
    root = work / "part"
    root.mkdir()
    save_file({"a": torch.zeros(2)}, root / "model-00001-of-00003.safetensors")
    save_file({"b": torch.zeros(2)}, root / "model-00003-of-00003.safetensors")
    refused(INPUT, "quantize", "part", says=("2 of 3 shards", "00002"), cwd=work)
    (root / "model-00003-of-00003.safetensors").unlink()
    refused(INPUT, "quantize", "part", says=("1 of 3 shards", "00002, 00003"), cwd=work)


def test_several_files_and_no_index(work):
    root = work / "many"
    root.mkdir()
    for name in ("a", "b"):
        save_file({name: torch.zeros(2)}, root / f"{name}.safetensors")
    refused(
        INPUT, "quantize", "many", says=("a.safetensors", "b.safetensors", "one file"), cwd=work
    )


def raw_safetensors(path: Path, header: dict, data: bytes) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def test_unsupported_dtype(work):
    raw_safetensors(
        work / "model" / "model.safetensors",
        {"x.weight": {"dtype": "F4", "shape": [4, 4], "data_offsets": [0, 8]}}, bytes(8),
    )  # fmt: skip
    refused(INPUT, "quantize", "model", says=("model.safetensors",), cwd=work)


@pytest.mark.parametrize(
    "header",
    [
        {"x": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}},
        {"x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 8]}},
        {"x": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 8]}},
        {"x": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}},
        {"x": {"dtype": "F99", "shape": [2], "data_offsets": [0, 8]}},
    ],
    ids=["hole", "short", "overflow", "negative", "dtype"],
)
def test_a_header_that_lies(work, header):
    raw_safetensors(work / "model" / "model.safetensors", header, bytes(8))
    refused(INPUT, "quantize", "model", says=("model.safetensors",), cwd=work)


def test_a_header_of_absurd_length(work):
    (work / "model" / "model.safetensors").write_bytes(struct.pack("<Q", 2**60) + b"{}")
    refused(INPUT, "quantize", "model", says=("model.safetensors",), cwd=work)


@pytest.mark.parametrize(
    ("value", "word"), [("nan", "NaN"), ("inf", "infinite"), ("-inf", "infinite")]
)
@pytest.mark.parametrize("workers", [1, 2])
def test_nonfinite_weight(work, value, word, workers):
    tensors = llama_tensors()
    tensors[UP][100, 33] = float(value)
    write_checkpoint_dir(work / "model", tensors, LLAMA)
    refused(
        INPUT, "quantize", "model", "--workers", workers, "-q",
        says=(f"{UP}[100, 33]", word, "--keep model.layers.0.mlp.up_proj"), cwd=work,
    )  # fmt: skip
    nf4_ok("quantize", "model", "--skip-modules", "model.layers.0.mlp.up_proj", cwd=work)


def test_nonfinite_weight_in_a_transposed_layer(work):
    weight = torch.zeros(64, 192)
    weight[5, 77] = float("nan")
    write_checkpoint_dir(work / "gpt2", {"h.0.attn.c_attn.weight": weight}, {"model_type": "gpt2"})
    refused(INPUT, "quantize", "gpt2", "-q", says=("c_attn.weight[5, 77]", "NaN"), cwd=work)


def test_a_kept_value_that_does_not_fit_the_dtype(work):
    tensors = llama_tensors()
    tensors["model.norm.weight"] = torch.full((64,), 1e6)
    write_checkpoint_dir(work / "model", tensors, LLAMA)
    refused(
        INPUT, "quantize", "model", "--dtype", "float16", "-q",
        says=("model.norm.weight[0]", "too large for F16", "--dtype"), cwd=work,
    )  # fmt: skip


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "fbgemm_fp8", "mxfp4"])
def test_already_quantized_config(work, method):
    config = {**LLAMA, "quantization_config": {"quant_method": method}}
    tensors = {**llama_tensors(), UP: torch.zeros(128, 64, dtype=torch.int8)}
    write_checkpoint_dir(work / "model", tensors, config)
    refused(INPUT, "quantize", "model", says=("already quantized", repr(method), UP), cwd=work)


@pytest.mark.parametrize("value", [{}, [], "x", {"load_in_4bit": True}])
def test_any_quantization_config(work, value):
    tensors = {**llama_tensors(), UP: torch.zeros(128, 64, dtype=torch.int8)}
    write_checkpoint_dir(work / "model", tensors, {**LLAMA, "quantization_config": value})
    refused(INPUT, "quantize", "model", says=("already quantized",), cwd=work)


@pytest.mark.parametrize("value", [["a"], {"a": 1}, 3, None, ""])
def test_a_config_without_a_model_type(work, value):
    write_checkpoint_dir(work / "model", llama_tensors(), {**LLAMA, "model_type": value})
    refused(INPUT, "quantize", "model", says=("no model_type", "own repository"), cwd=work)


@pytest.mark.parametrize("value", ["[/x]", "\ud800", "llama9"])
def test_a_model_type_that_nobody_knows(work, value):
    write_checkpoint_dir(work / "model", llama_tensors(), {**LLAMA, "model_type": value})
    refused(INPUT, "quantize", "model", says=("model_type",), cwd=work)


def test_a_part_with_an_odd_model_type(work):
    write_checkpoint_dir(work / "model", llama_tensors(), {**LLAMA, "x": {"model_type": ["a"]}})
    nf4_ok("quantize", "model", cwd=work)


def test_a_config_with_a_number_that_is_none(work):
    write_checkpoint_dir(work / "model", llama_tensors(), {**LLAMA, "x": float("nan")})
    nf4_ok("quantize", "model", cwd=work)
    nf4_ok("verify", "model-nf4", "--source", "model", cwd=work)


def test_a_config_nested_too_deep(work):
    text = json.dumps(LLAMA)[:-1] + ', "x": ' + '{"a": ' * 900 + "1" + "}" * 900 + "}"
    (work / "model" / "config.json").write_text(text)
    refused(INPUT, "quantize", "model", says=("levels deep",), cwd=work)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_hidden_layers": 3}, "num_hidden_layers 3, but the tensors have 2 layers"),
        ({"num_hidden_layers": 1}, "num_hidden_layers 1, but the tensors have 2 layers"),
        ({"hidden_size": 128}, "hidden_size 128, but model.layers.1.input_layernorm.weight has 64"),
    ],
)
def test_a_config_of_another_model(work, change, says):
    write_checkpoint_dir(work / "model", llama_tensors(), {**LLAMA, **change})
    refused(INPUT, "quantize", "model", says=(says,), cwd=work)


def test_a_superscript_is_no_layer_number(work):
    tensors = {**llama_tensors(), "model.layers.\u00b2.x.weight": torch.ones(64, 64).bfloat16()}
    write_checkpoint_dir(work / "model", tensors, LLAMA)
    nf4_ok("quantize", "model", cwd=work)


def test_a_module_that_cannot_be_kept_alone(work):
    tensors = {"proj.weight": torch.ones(64, 64), "x.proj.weight": torch.ones(64, 64)}
    write_checkpoint_dir(work / "model", tensors, LLAMA)
    done = nf4("quantize", "model", "--keep", "[p]roj", cwd=work)
    assert done.returncode == USAGE
    assert "cannot leave proj alone" in done.stderr
    nf4_ok("quantize", "model", "--keep", "x.proj", cwd=work)


def test_few_file_descriptors(work):
    tensors = {
        f"model.layers.{i}.mlp.up_proj.weight": torch.randn(1000, 1024).bfloat16()
        for i in range(30)
    }
    write_checkpoint_dir(work / "big", tensors, {**LLAMA, "num_hidden_layers": 30})
    command = f"'{Path(sys.executable).with_name('nf4')}' quantize big --max-shard-size 1MB -q"
    for enough in (
        "ulimit -S -n 14",
        "ulimit -n 20",
    ):  # 30 files are made, few of them open at once
        line = f"{enough}; {command} && rm -r big-nf4"
        assert subprocess.run(["bash", "-c", line], cwd=work, check=False).returncode == 0
    before = sorted(work.rglob("*"))
    hard = f"ulimit -n 6; {command}"
    done = subprocess.run(
        ["bash", "-c", hard], cwd=work, check=False, capture_output=True, text=True
    )
    assert done.returncode == MACHINE
    assert "Too many open files" in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(work.rglob("*")) == before


def test_already_packed_without_saying_so(work):
    nf4_ok("quantize", "model", cwd=work)
    (work / "model-nf4" / "config.json").write_text(json.dumps(LLAMA))
    refused(INPUT, "quantize", "model-nf4", "again", says=("already holds packed 4-bit",), cwd=work)


@pytest.mark.parametrize("text", ["{", "[1]", "\x00", '{"a": NaN'])
def test_config_is_garbage(work, text):
    (work / "model" / "config.json").write_text(text)
    refused(INPUT, "quantize", "model", says=("config.json",), cwd=work)
