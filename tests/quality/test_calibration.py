"""Calibration: what is measured, what error feedback does with it, and the command around it."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import text_models
import torch
import transformers
from elsewhere import RESOURCES, Elsewhere
from helpers import nf4, nf4_ok, nf4_process, nightly_but, same_files
from safetensors.torch import load_file, save_file
from tiny_models import V

from nf4cli.checkpoint.discovery import IMPORTANCE, MANIFEST, open_checkpoint
from nf4cli.checkpoint.importance_file import load
from nf4cli.engines.cpu import CpuEngine
from nf4cli.format.codebook import codebook
from nf4cli.format.config import QuantConfig
from nf4cli.output.manifest import Manifest
from nf4cli.proof.verify import verify
from nf4cli.quality.calibration.defaults import DAMPING
from nf4cli.quality.calibration.gptq import feed_back, relative_loss
from nf4cli.quality.calibration.passes import Calibration, Settings
from nf4cli.quality.calibration.rounding import pack, round_matrix
from nf4cli.quality.calibration.text import torch_device
from nf4cli.quality.calibration.walk import Walk

RECIPE = QuantConfig(scale="search")
VALUES, MIDPOINTS = (
    torch.from_numpy(t) for t in (codebook("nf4").values, codebook("nf4").midpoints)
)
TEXT = ("--calibration", "text.txt", "--calibration-tokens", "512", "--calibration-length", "32")


def tokens(count=6, length=16):
    return torch.randint(
        5, V - 5, (count, length), generator=torch.Generator().manual_seed(2)
    ).numpy()


def measured(root, scratch, names, seen, fixed=None, **settings):
    how = Settings(**settings)
    found = Calibration(root, seen, scratch, names, RECIPE, CpuEngine(), how, {}, fixed=fixed)
    found.run()
    return found


def unrounded(root):
    """Give every layer its own weights back: then every block has the inputs of the whole model."""
    kinds = torch.nn.Linear, transformers.pytorch_utils.Conv1D
    matrices = {
        f"{name}.weight": (module.weight if isinstance(module, kinds[0]) else module.weight.T)
        for name, module in whole_model(root).named_modules()
        if isinstance(module, kinds)
    }
    return lambda name: matrices[name].detach().numpy()


def whole_model(root):
    config = transformers.AutoConfig.from_pretrained(root)
    kind = getattr(transformers, config.architectures[0])
    return kind.from_pretrained(root, dtype=torch.float32).eval()


def hooked(root, seen):
    """The mean squares of every linear layer's inputs, from the whole model in memory."""
    model = whole_model(root)
    sums, kinds = {}, (torch.nn.Linear, transformers.pytorch_utils.Conv1D)
    for name, module in model.named_modules():
        if isinstance(module, kinds):
            module.register_forward_pre_hook(
                lambda m, args, name=name: sums.setdefault(f"{name}.weight", []).append(
                    args[0].detach().double().reshape(-1, args[0].shape[-1]).square()
                )
            )
    with torch.no_grad():
        for window in seen:
            model(input_ids=torch.from_numpy(window[None]))
    return {name: torch.cat(parts).mean(0).numpy() for name, parts in sums.items()}


@pytest.mark.parametrize(
    "name",
    ["llama", "gpt2", "opt", "bloom", "gemma3_text", "qwen3", "gpt_neox", "phi3", "bert_mlm"],
)
def test_importance_is_what_the_whole_model_gives(name, tmp_path):
    root, seen = text_models.make(name, tmp_path / "model"), tokens()
    expected = hooked(root, seen)
    found = measured(root, tmp_path / "scratch", expected, seen, unrounded(root)).importance
    assert len(found) >= 8
    for key, values in found.items():
        np.testing.assert_allclose(values, expected[key], rtol=2e-3, atol=1e-6, err_msg=key)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gemma3_text", "qwen3", "phi3"])
def test_a_block_computes_on_the_device_that_is_asked_for(name, tmp_path):
    """torch's device "meta" stands in for a GPU: it refuses what lies on the CPU, as that does."""
    walk = Walk(text_models.make(name, tmp_path / "model"), tmp_path / "offload", "meta")
    walk.record(tokens()[0])
    call = walk._calls[0]
    with walk.block(0) as block:
        assert {p.device.type for p in block.parameters()} == {"meta"}
        width = walk._model.config.get_text_config().hidden_size
        given = torch.empty(1, 16, width, device="meta")
        out = block(given, *call.args, **call.kwargs)
    out = out[0] if isinstance(out, tuple) else out
    assert out.device.type == "meta"


@pytest.mark.parametrize(
    ("asked", "there", "expected"),
    [(None, True, "cuda"), ("cuda", True, "cuda"), ("cuda:1", True, "cuda:1"),
     ("cuda:2,0", True, "cuda:2"), ("cpu", True, "cpu"), (None, False, "cpu")],
)  # fmt: skip
def test_the_device_that_is_asked_for_computes(monkeypatch, asked, there, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    assert torch_device(asked) == expected


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_experts_are_measured_each_by_its_own_tokens(name, tmp_path, monkeypatch):
    """Under the names that the checkpoint has, from the tokens that the router sends."""
    from nf4cli.quality.calibration import experts

    root, seen = text_models.make(name, tmp_path / "model"), tokens(12, 16)
    model = transformers.AutoModelForCausalLM.from_pretrained(root, dtype=torch.float32).eval()
    inputs: dict[int, list[torch.Tensor]] = {}
    block = model.model.layers[1].mlp

    def look(module, args):
        for expert in range(4):
            chosen = (args[1] == expert).any(-1)
            inputs.setdefault(expert, []).append(args[0][chosen].double())

    block.experts.register_forward_pre_hook(look)
    with torch.no_grad():
        for window in seen:
            model(torch.from_numpy(window[None]))
    stored = [t.name for s in open_checkpoint(root).shards for t in s.tensors if "proj" in t.name
              or ".w" in t.name]  # fmt: skip
    found = measured(root, tmp_path / "a", stored, seen, unrounded(root)).importance
    up = "w3" if name == "mixtral" else "up_proj"
    counts = []
    for expert in range(4):
        rows = torch.cat(inputs[expert])
        (key,) = (n for n in found if ".layers.1." in n and f".experts.{expert}.{up}." in n)
        counts.append(len(rows))
        pooled = torch.cat([torch.cat(p) for p in inputs.values()]).square().mean(0)
        expected = rows.square().mean(0) if len(rows) >= experts.FEWEST else pooled
        np.testing.assert_allclose(found[key], expected.numpy(), rtol=2e-3)
    assert sum(counts) == 2 * seen.size
    down = [n for n in found if ".experts." in n and (".down_proj." in n or ".w2." in n)]
    assert len(down) == 8
    assert all(found[n].size == (128 if name == "mixtral" else 64) for n in down)
    monkeypatch.setattr(experts, "FEWEST", 10**6)
    notes: list[str] = []
    pooled_only = Calibration(
        root, seen, tmp_path / "b", stored, RECIPE, CpuEngine(), Settings(), {}, notify=notes.append
    )
    pooled_only.run()
    assert len(notes) == 2
    assert "4 of model.layers.0" in notes[0]
    one = [v for n, v in pooled_only.importance.items() if f".{up}." in n and "layers.0" in n]
    assert all(np.array_equal(one[0], other) for other in one)


def test_experts_of_four_bits_are_calibrated_by_the_command(tmp_path):
    text_models.make("mixtral", tmp_path / "model", torch.bfloat16)
    (tmp_path / "text.txt").write_text(text_models.text(600))
    for method, *options in (
        ("rtn", "--target", "vllm"), ("gptq", "--target", "vllm"), ("yaqa", "--target", "vllm"),
        ("gptq", "--target", "unsloth", "--blocksize", "32"),
    ):  # fmt: skip
        output = "-".join((method, *options))
        done = nf4("quantize", "model", output, *TEXT, "--method", method, *options, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "nothing is known" not in done.stdout
        nf4_ok("verify", output, "--source", "model", "--calibration", "text.txt", cwd=tmp_path)


def problem(rows=24, columns=160, seed=0, samples=400):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5
    inputs = torch.randn(samples, columns, generator=generator) @ mix
    inputs *= torch.rand(columns, generator=generator) * 4
    weight = torch.randn(rows, columns, generator=generator) * 0.1
    hessian = inputs.T @ inputs / samples
    rounded = round_matrix(weight.numpy(), hessian.diagonal().numpy().copy(), CpuEngine(), RECIPE)
    return weight, hessian, torch.from_numpy(rounded.scale), torch.from_numpy(rounded.ranks)


@pytest.mark.parametrize("method", ["rtn", "gptq", "yaqa"])
def test_a_weight_that_is_not_finite_is_refused(tmp_path, method):
    root = text_models.make("llama", tmp_path / "model")
    weights = load_file(root / "model.safetensors")
    weights["model.layers.0.mlp.down_proj.weight"][1, 3] = float("nan")
    save_file(weights, root / "model.safetensors", {"format": "pt"})
    (tmp_path / "text.txt").write_text(text_models.text(600))
    done = nf4("quantize", "model", "out", "--calibration", "text.txt", "--calibration-length",
               "32", "--method", method, cwd=tmp_path)  # fmt: skip
    assert done.returncode == 3, done.stderr
    assert "Traceback" not in done.stderr
    assert "model.layers.0" in " ".join(done.stderr.split())


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("threads", [2, 3, 64])
def test_threads_choose_the_same_scales(weighted, nested, threads):
    """The matrix has five parts of 65,536 elements, the last one not whole, odd at its end."""
    generator = np.random.default_rng(0)
    weight = generator.standard_normal((601, 511), np.float32)
    importance = generator.random(511, np.float32) if weighted else np.zeros(511, np.float32)
    recipe = replace(RECIPE, double_quant=nested)
    one = round_matrix(weight, importance, CpuEngine(), recipe)
    several = round_matrix(weight, importance, CpuEngine(), recipe, threads)
    assert np.array_equal(one.ranks, several.ranks)
    assert np.array_equal(one.scale, several.scale)


def choose(weight, hessian, scale, notes=None, damping=DAMPING):
    note = notes.append if notes is not None else (lambda said: None)
    return feed_back(weight, hessian, scale, "nf4", damping, note).long()


def test_error_feedback_is_the_plain_algorithm():
    """Against one column after another with the inverse itself (Optimal Brain Quantization)."""
    weight, hessian, scale, _ = problem()
    damping = 0.02
    ours = choose(weight, hessian, scale, damping=damping)
    matrix = hessian.double().clone()
    matrix.diagonal().add_(damping * matrix.diagonal().mean())
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    left = list(order.tolist())
    work = weight.double().clone()
    ranks = torch.zeros_like(ours)
    while left:
        inverse = torch.linalg.inv(matrix[left][:, left])
        column = left.pop(0)
        rank = torch.bucketize((work[:, column] / scale[:, column].double()).float(), MIDPOINTS)
        ranks[:, column] = rank
        error = (work[:, column] - VALUES[rank].double() * scale[:, column].double()) / inverse[
            0, 0
        ]
        work[:, left] -= error[:, None] * inverse[0, 1:][None]
    assert (ranks != ours).double().mean() < 0.002  # float32 against float64, at a midpoint
    found, expected = (relative_loss(weight, VALUES[r] * scale, hessian) for r in (ours, ranks))
    assert found == pytest.approx(expected, rel=0.01)


def test_it_loses_less_than_rounding():
    weight, hessian, scale, nearest = problem()
    plain = relative_loss(weight, VALUES[nearest.long()] * scale, hessian)
    fed = relative_loss(weight, VALUES[choose(weight, hessian, scale)] * scale, hessian)
    assert fed < 0.6 * plain


def test_columns_without_input_are_rounded_to_the_nearest():
    weight, hessian, scale, _ = problem()
    dead = torch.tensor([0, 7, 159])
    hessian[dead, :] = hessian[:, dead] = 0
    ranks = choose(weight, hessian, scale)
    expected = torch.bucketize(weight / scale, MIDPOINTS)
    assert torch.equal(ranks[:, dead], expected[:, dead])
    nothing = choose(weight, torch.zeros_like(hessian), scale)
    assert torch.equal(nothing, expected)


def test_moments_of_few_tokens_and_worse_ones():
    weight, hessian, scale, _ = problem(samples=3)  # rank 3 of 160
    notes: list[str] = []
    assert (
        relative_loss(weight, VALUES[choose(weight, hessian, scale, notes)] * scale, hessian) < 0.02
    )
    broken = hessian - 5 * torch.eye(160) * hessian.diagonal().mean()
    broken.diagonal().abs_()
    ranks = choose(weight, broken, scale, notes, damping=1e-6)
    assert len(notes) == 1
    assert "no positive matrix" in notes[0]
    assert ranks.max() < 16


def test_codes_are_packed_as_they_are_stored():
    ranks = np.array([[1, 2, 3], [15, 0, 7]], np.uint8)
    assert pack(ranks, "nf4").tolist() == [0x12, 0x3F, 0x07]
    assert pack(ranks[:, :1], "nf4").tolist() == [0x1F]
    assert pack(np.array([[3]], np.uint8), "nf4").tolist() == [0x37]  # and the code of 0.0


def test_gptq_loses_less_than_rtn_and_the_layers_before_count(tmp_path):
    root, seen = text_models.make("llama", tmp_path / "model"), tokens(12, 32)
    names = hooked(root, seen[:1]).keys() - {"lm_head.weight"}
    losses = {}
    for method in ("rtn", "gptq"):
        found = measured(root, tmp_path / method, names, seen, method=method)
        assert found.losses.keys() == names
        losses[method] = found.losses
    assert sum(losses["gptq"].values()) < 0.8 * sum(losses["rtn"].values())


# -- the command ------------------------------------------------------------------------------


@pytest.fixture
def work(tmp_path):
    text_models.make("llama", tmp_path / "model", torch.bfloat16)
    (tmp_path / "text.txt").write_text(text_models.text(600))
    return tmp_path


@pytest.mark.parametrize("method", nightly_but(["yaqa"], ["rtn", "gptq", "yaqa"]))
def test_calibrated_verified_and_measured_again(work, method):
    told = nf4("quantize", "model", "out", *TEXT, "--method", method, cwd=work)
    assert told.returncode == 0, told.stderr
    assert "calibrating model" in told.stderr
    assert not list(work.glob(".out*")), "what was kept meanwhile is gone"
    about = load(work / "out" / IMPORTANCE).about
    assert (about["tokens"], about["length"], about["method"]) == (512, 32, method)
    assert len(about["losses"]) == 14
    manifest = Manifest.from_file(work / "out" / MANIFEST)
    assert manifest.config.method == method
    errors = [t.error for t in manifest.tensors.values() if t.error]
    assert all((e.worst_block is not None) == (method != "rtn") for e in errors)
    nf4_ok("verify", "out", cwd=work)
    engine, elsewhere = CpuEngine(), Elsewhere()  # codes and importance go along with each task
    report = verify(work / "out", work / "model", engine, RESOURCES, cluster=elsewhere)
    assert report.ok, report.findings
    assert elsewhere.made
    # In another process, which shares no cache and no order of hashes with the first.
    again = ("verify", "out", "--source", "model", "--calibration", "text.txt")
    said = nf4_ok(*again, cwd=work, run=nf4_process)
    assert ("every byte but the codes is" in said) == (method != "rtn")
    assert (f"which {method} chose" in said) == (method != "rtn")
    assert "importance and loss of 14 weights are those that the text gives" in said
    if method == "rtn":  # without text or torch, the same bytes
        nf4_ok("quantize", "model", "again", "--importance", f"out/{IMPORTANCE}", cwd=work)
        assert same_files(work / "out", work / "again")


def test_codes_that_were_changed_are_found(work):
    """With the digests forged as well, what the codes lose is no more what the manifest says."""
    from nf4cli.checkpoint.digest import digest_file, digest_shard
    from nf4cli.checkpoint.reader import read_shard

    nf4_ok("quantize", "model", "out", *TEXT, "--method", "gptq", cwd=work)
    (path,) = (work / "out").glob("*.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    (tensor,) = (t for t in read_shard(path).tensors if t.name == name)
    data = bytearray(path.read_bytes())
    data[tensor.start + 5] ^= 0x10
    path.write_bytes(data)
    document = json.loads((work / "out" / MANIFEST).read_text())
    _, tensors = digest_shard(read_shard(path), "blake3")
    for file in document["output"]["files"]:
        file["digest"] = digest_file(work / "out" / file["name"], "blake3")
    document["tensors"][name]["output"]["digests"][name] = tensors[name]
    (work / "out" / MANIFEST).write_text(json.dumps(document, indent=1) + "\n")
    nf4_ok("verify", "out", cwd=work)
    done = nf4("verify", "out", "--source", "model", cwd=work)
    assert done.returncode == 1
    assert "another record than the source gives" in done.stdout
    assert name in done.stdout


def test_another_text_is_named(work):
    nf4_ok("quantize", "model", "out", *TEXT, cwd=work)
    (work / "other.txt").write_text(text_models.text(600, seed=9))
    done = nf4("verify", "out", "--source", "model", "--calibration", "other.txt", cwd=work)
    assert done.returncode == 1
    assert "was measured on another text" in done.stdout
    done = nf4("verify", "out", "--calibration", "text.txt", cwd=work)
    assert (done.returncode, "--calibration needs --source" in done.stderr) == (2, True)
    nf4_ok("quantize", "model", "plain", cwd=work)
    done = nf4("verify", "plain", "--source", "model", "--calibration", "text.txt", cwd=work)
    assert (done.returncode, "was not calibrated" in done.stderr) == (2, True)


@pytest.mark.parametrize(
    ("step", "says"),
    [
        ("keep_block", "continuing an earlier calibration: 1 blocks are done"),
        ("keep_gradients", "calibrating model"),
    ],
)
def test_stopped_and_resumed_it_is_the_same(work, step, says):
    command = ["quantize", "model", "out", *TEXT, "--method", "yaqa"]
    nf4_ok(*command[:2], "whole", *command[3:], cwd=work)
    script = (
        "from nf4cli.quality.calibration.scratch import Scratch\n"
        "import os\n"
        f"keep = Scratch.{step}\n"
        "def once(self, *args):\n"
        "    keep(self, *args)\n"
        "    os._exit(7)\n"
        f"Scratch.{step} = once\n"
        "from nf4cli.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-P", "-c", script, *command], cwd=work, check=False,
                          capture_output=True)  # fmt: skip
    assert done.returncode == 7
    assert not (work / "out").exists()
    told = nf4(*command, "--resume", cwd=work)
    assert told.returncode == 0, told.stderr
    assert says in told.stderr
    assert same_files(work / "whole", work / "out")
    assert not list(work.glob(".out*"))
    again = nf4(*command, "--resume", cwd=work)
    assert again.returncode == 0, again.stderr
    assert "calibrating" not in again.stderr
    assert "out is complete already" in again.stderr


@pytest.mark.parametrize("option", [(), ("--resume",)])
def test_a_second_run_is_refused_and_leaves_the_first_alone(work, option):
    scratch = work / ".out.calibration"
    scratch.mkdir()
    (scratch / "kept").write_text("a block")
    held = os.open(scratch, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        done = nf4("quantize", "model", "out", *TEXT, *option, cwd=work)
    finally:
        os.close(held)
    assert done.returncode == 2
    assert "another run is calibrating for out" in " ".join(done.stderr.split())
    assert (scratch / "kept").read_text() == "a block"
    nf4_ok("quantize", "model", "out", *TEXT, cwd=work)
    assert not scratch.exists()


def test_what_lies_in_the_place_of_a_calibration_is_refused(work):
    (work / ".out.calibration").symlink_to("model")
    done = nf4("quantize", "model", "out", *TEXT, cwd=work)
    assert done.returncode == 2
    assert "is no directory" in " ".join(done.stderr.split())
    assert (work / "model" / "config.json").exists()


def test_interrupted_it_says_so(work):
    script = (
        "import nf4cli.quality.calibration.walk as w, time\n"
        "w.Walk.run = lambda *a: time.sleep(30)\n"
        "from nf4cli.cli import main; main()"
    )
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", script, "quantize", "model", "out", *TEXT],
        cwd=work, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    for line in process.stderr:
        if "calibrating" in line:
            break
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert not list(work.glob(".out*")), "nothing was done yet, so nothing is kept"


@pytest.mark.parametrize(
    ("change", "code", "says"),
    [
        (lambda w: (w / "text.txt").write_text("few words"), 2, "fewer than one window"),
        (lambda w: (w / "text.txt").write_bytes(b"\xff\xfe\x00bad"), 3, "is no UTF-8 text"),
        (lambda w: (w / "text.txt").unlink(), 3, "does not exist"),
        (lambda w: [p.unlink() for p in (w / "model").glob("token*")], 3, "has no tokenizer"),
        (lambda w: (w / "text.txt").write_text("  \n"), 3, "there is no text"),
    ],
)
def test_what_a_user_may_give(work, change, code, says):
    change(work)
    done = nf4("quantize", "model", "out", *TEXT, cwd=work)
    assert done.returncode == code, done.stderr
    assert says in done.stderr
    assert not (work / "out").exists()


def test_an_encoder_with_a_decoder_is_refused(tmp_path):
    text_models.make("t5", tmp_path / "model", torch.bfloat16)
    (tmp_path / "text.txt").write_text(text_models.text(600))
    done = nf4("quantize", "model", "out", *TEXT, cwd=tmp_path)
    assert done.returncode == 2
    assert "use --scale search" in done.stderr


def test_text_in_directories_and_lines(work):
    (work / "data").mkdir()
    lines = [json.dumps({"text": text_models.text(60, i)}) for i in range(8)]
    (work / "data/a.jsonl").write_text("\n".join(lines))
    (work / "data/b.md").write_text(text_models.text(60, 99))
    nf4_ok("quantize", "model", "out", "--calibration", "data", *TEXT[2:], cwd=work)
    (work / "data/a.jsonl").write_text('{"text": 3}')
    done = nf4("quantize", "model", "no", "--calibration", "data", *TEXT[2:], cwd=work)
    assert (done.returncode, '"text"' in done.stderr) == (3, True)
    shutil.rmtree(work / "data")
    (work / "data").mkdir()
    (work / "data/x.parquet").write_bytes(b"PAR1")
    done = nf4("quantize", "model", "no", "--calibration", "data", *TEXT[2:], cwd=work)
    assert (done.returncode, "x.parquet is a table" in done.stderr) == (3, True)
