"""nf4 plan: budgets kept, estimates checked, units that a loader wants alike, and bad input."""

from __future__ import annotations

import json

import numpy as np
import pytest
import text_models
import torch
import transformers
from helpers import LLAMA, llama_tensors, nf4, nf4_ok, write_checkpoint_dir
from safetensors.torch import load_file, save_file
from schemas import document

import nf4cli
from nf4cli.quality import sensitivity
from nf4cli.quality.calibration.text import open_tokenizer
from nf4cli.quality.texts import read_documents, sequences

TEXT = ("--calibration", "text.txt", "--calibration-tokens", "1024", "--calibration-length", "64")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A Llama `model` and a `text.txt`; never changed by a test."""
    root = tmp_path_factory.mktemp("plan")
    text_models.make("llama", root / "model", torch.bfloat16)
    (root / "text.txt").write_text(text_models.text(1500))
    return root


def planned(place, recipe, *options):
    done = nf4("plan", "model", recipe, *options, "--json", "-q", cwd=place)
    assert done.returncode == 0, done.stderr
    return document(done.stdout, "recipe")


def made(place, recipe, output):
    """Convert by a recipe and prove it; return what nf4 inspect says."""
    nf4_ok("quantize", "model", output, "--recipe", recipe, "-q", cwd=place)
    nf4_ok("verify", output, "--source", "model", "-q", cwd=place)
    return json.loads(nf4_ok("inspect", output, "--json", cwd=place))


@pytest.mark.parametrize("bits", [4.6, 5.5, 9.0])
def test_a_budget_of_bits_is_kept_and_used(place, tmp_path, bits):
    found = planned(place, tmp_path / "r.toml", "--bits", bits)
    assert found["method"] == "weights"
    assert found["bound"] <= found["loss"] * (1 + 1e-9)
    share = sum(m["bits"] * m["elements"] for m in found["modules"])
    whole = sum(m["elements"] for m in found["modules"])
    assert found["bits"] == pytest.approx(share / whole)
    # One module of this tiny model is up to an eighth of it.
    assert bits - 0.6 < found["bits"] <= bits
    made(place, tmp_path / "r.toml", tmp_path / "out")


def test_a_budget_of_bytes_is_of_the_files(place, tmp_path):
    whole = nf4cli.plan(place / "model").shard_bytes
    found = planned(place, tmp_path / "r.toml", "--max-size", f"{whole + 3000}")
    assert found["shard_bytes"] <= whole + 3000
    made(place, tmp_path / "r.toml", tmp_path / "out")
    files = (tmp_path / "out").glob("*.safetensors")
    assert sum(file.stat().st_size for file in files) == found["shard_bytes"]


def test_a_text_finds_what_rounding_costs(place, tmp_path):
    found = planned(place, tmp_path / "r.toml", "--bits", "5", *TEXT)
    assert found["method"] == "text"
    assert found["check"]["correlation"] > 0.8
    assert 0.4 < found["check"]["factor"] < 2.5
    low, high = found["saved"]
    assert low < 1 - found["loss"] / found["uniform"]["loss"] < high
    again = planned(place, tmp_path / "again.toml", "--bits", "5", *TEXT)
    assert (tmp_path / "again.toml").read_text() == (tmp_path / "r.toml").read_text()
    assert again["loss"] == found["loss"]


@pytest.mark.parametrize("scale", ["absmax", "search"])
def test_what_is_measured_is_what_a_conversion_loses(place, tmp_path, scale):
    """Of the best one format for all, against the decoded output of that conversion."""
    options = ("--bits", "4.9", "--scale", scale, *TEXT)
    found = planned(place, tmp_path / "r.toml", *options)["uniform"]
    assert not found["double_quant"]
    nf4_ok(
        "quantize", "model", tmp_path / "out", "--blocksize", found["blocksize"],
        "--no-double-quant", "--scale", scale, "-q", cwd=place,
    )  # fmt: skip
    nf4_ok("dequantize", tmp_path / "out", tmp_path / "back", "--dtype", "float32", "-q")
    tokens = sequences(
        read_documents([place / "text.txt"]), open_tokenizer(place / "model"), 64, 16
    )
    before, after = (
        transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(
            torch.from_numpy(tokens)
        )
        .logits.detach()
        .log_softmax(-1)
        for path in (place / "model", tmp_path / "back")
    )
    exact = float((before.exp() * (before - after)).sum(-1).mean())
    # A search is measured with nested scales; what float32 ones lose is reckoned from that.
    assert found["loss"] == pytest.approx(exact, rel=0.05 if scale == "search" else 1e-3)


def test_the_smallest_output_of_a_loss(place, tmp_path):
    loose = planned(place, tmp_path / "loose.toml", "--bits", "4.7", *TEXT)
    tight = planned(place, tmp_path / "tight.toml", "--max-kl", loose["loss"] / 2, *TEXT)
    assert tight["loss"] <= loose["loss"] / 2
    assert tight["bits"] > loose["bits"]


def test_the_estimate_is_the_second_order_of_the_divergence(place):
    """Against a derivative by automatic differentiation of the KL divergence itself."""
    tokenizer = open_tokenizer(place / "model")
    tokens = sequences([text_models.text(1500)], tokenizer, 32, 64)
    name = "model.layers.0.mlp.down_proj.weight"
    generator = np.random.default_rng(0)

    def rounding(_, weight):
        error = generator.standard_normal(weight.shape).astype(np.float32)
        return weight + np.float32(1e-3) * fixed.setdefault("error", error)

    fixed: dict[str, np.ndarray] = {}
    found, checked = sensitivity.measure(
        place / "model", [name], tokens, {0: rounding}, 0, "float32", "cpu", lambda *_: None
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float32)
    weight, ids = model.get_parameter(name), torch.from_numpy(tokens)
    with torch.no_grad():
        before = model(ids).logits.log_softmax(-1)
        weight += 1e-3 * torch.from_numpy(fixed["error"])
        after = model(ids).logits.log_softmax(-1)
    exact = float((before.exp() * (before - after)).sum(-1).mean())
    count = found.alone[name].size
    # The mean of `count` squares of a normal variable has a relative error of sqrt(2 / count).
    assert found.kl_alone(name) == pytest.approx(exact, rel=4 * (2 / count) ** 0.5)
    assert checked.measured[name] == pytest.approx(exact, rel=0.5)


def test_shares_are_derivatives_in_the_rounded_model_and_add_up(place):
    """Against automatic differentiation by the weights themselves, which sensitivity avoids."""
    tokens = sequences([text_models.text(1500)], open_tokenizer(place / "model"), 32, 64)
    names = [f"model.layers.{n}.{m}_proj.weight" for n in (0, 1) for m in ("mlp.up", "self_attn.v")]
    model = transformers.AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float32)
    weights = {name: model.get_parameter(name) for name in names}
    generator = torch.Generator().manual_seed(0)
    errors = {
        name: 0.03 * weight.std().item() * torch.randn(weight.shape, generator=generator)
        for name, weight in weights.items()
    }

    def rounding(name, weight):
        return weight + errors[name].numpy()

    roundings = {
        1: rounding,
        0: lambda name, weight: weight,
        2: lambda n, w: w + 2 * errors[n].numpy(),
    }
    steps = []
    found, checked = sensitivity.measure(
        place / "model", names, tokens, roundings, 1, "float32", "cpu",
        lambda name, count: steps.append(count),
    )  # fmt: skip
    assert sum(steps) == sensitivity.steps(len(tokens), len(roundings), len(names))
    ids = torch.from_numpy(tokens)
    with torch.no_grad():
        before = model(ids).logits.log_softmax(-1)
        for name, error in errors.items():
            weights[name] += error
    after = model(ids).logits.log_softmax(-1)
    exact = (before.exp() * (before - after)).sum(-1).mean()
    exact.backward()
    assert found.whole[1].mean() == pytest.approx(exact.item(), rel=1e-3)
    for name, weight in weights.items():
        half = float((weight.grad * errors[name]).sum()) / 2
        assert found.share(name, 1) == pytest.approx(half, rel=1e-2)
    assert sum(found.share(name, 1) for name in names) == pytest.approx(exact.item(), rel=0.05)
    assert found.whole[0].mean() == pytest.approx(0, abs=1e-6)
    assert found.whole[2].mean() == pytest.approx(4 * exact.item(), rel=0.3)
    assert checked.factor == found.factor(1) == pytest.approx(1, rel=0.05)


def test_vllm_gets_units_that_it_loads_as_one(tmp_path):
    write_checkpoint_dir(tmp_path / "model", llama_tensors(), LLAMA)
    nf4_ok("plan", "model", "r.toml", "--bits", "6", "--target", "vllm", "-q", cwd=tmp_path)
    nf4_ok("quantize", "model", "out", "--recipe", "r.toml", "--target", "vllm", cwd=tmp_path)
    done = nf4("plan", "model", "j.toml", "--bits", "6", "--target", "vllm", "--json", cwd=tmp_path)
    units = {tuple(m["modules"]) for m in document(done.stdout, "recipe")["modules"]}
    parts = tuple(f"model.layers.0.self_attn.{name}_proj" for name in "kqv")
    assert parts in units


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        ((), 2, "say one budget"),
        (("--bits", "5", "--max-size", "1GB"), 2, "2 are given"),
        (("--bits", "3"), 2, "the least is --bits 4."),
        (("--bits", "17"), 2, "enough for all modules in 16 bits"),
        (("--bits", "nan"), 2, "no positive number"),
        (("--max-size", "1000"), 2, "the least is --bits 4."),
        (("--max-kl", "0.1"), 2, "needs --calibration"),
        (("--max-kl", "1e-30", *TEXT), 2, "enough for all modules in 16 bits"),
        (("--bits", "5", "--scale", "best"), 2, "not one of absmax, search"),
        (("--bits", "5", "--calibration", "none.txt"), 3, "none.txt"),
    ],
)
def test_what_cannot_be_is_said(place, tmp_path, options, code, says):
    done = nf4("plan", "model", tmp_path / "r.toml", *options, cwd=place)
    assert done.returncode == code, done.stderr
    assert says in " ".join(done.stderr.split())
    assert not (tmp_path / "r.toml").exists()
    assert done.returncode == code


def test_a_text_that_is_too_short_is_said_so(place, tmp_path):
    done = nf4(
        "plan", "model", tmp_path / "r.toml", "--bits", "4.6", "--calibration", "text.txt",
        "--calibration-tokens", "16", "--calibration-length", "8", cwd=place,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "too short to tell" in " ".join(done.stderr.split())


def test_a_single_window_has_no_interval(place, tmp_path):
    text = ("--calibration", "text.txt", "--calibration-tokens", "64", "--calibration-length", "64")
    done = nf4("plan", "model", tmp_path / "r.toml", "--bits", "5", *text, "--json", cwd=place)
    assert done.returncode == 0, done.stderr
    assert document(done.stdout, "recipe")["saved"] is None
    assert "one window" in " ".join(done.stderr.split())


def test_a_check_of_too_few_modules_has_no_correlation():
    figures = {"a": 0.1, "b": 0.2}
    assert sensitivity.Checked(figures, figures, 1.0).correlation is None
    alike = dict.fromkeys("abcd", 0.1)
    assert sensitivity.Checked(alike, alike, 1.0).correlation is None


def test_a_recipe_is_never_overwritten(place, tmp_path):
    (tmp_path / "r.toml").write_text("mine")
    done = nf4("plan", "model", tmp_path / "r.toml", "--bits", "5", cwd=place)
    assert done.returncode == 2
    assert (tmp_path / "r.toml").read_text() == "mine"


def test_what_is_printed(place, tmp_path):
    done = nf4_ok("plan", "model", tmp_path / "r.toml", "--bits", "5", cwd=place)
    assert "bits a weight of linear layers" in done
    assert "less than" in done
    assert "nf4 quantize model" in " ".join(done.split())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ((), "down_proj.weight has a NaN or an infinity"),
        (("--keep", "model.layers.0.mlp.down_proj"), "predicts a NaN or an infinity"),
    ],
)
def test_a_model_that_is_not_finite_is_refused(tmp_path, options, says):
    root = text_models.make("llama", tmp_path / "model")
    weights = load_file(root / "model.safetensors")
    weights["model.layers.0.mlp.down_proj.weight"][1, 3] = float("nan")
    save_file(weights, root / "model.safetensors", {"format": "pt"})
    (tmp_path / "text.txt").write_text(text_models.text(600))
    done = nf4("plan", "model", "r.toml", "--bits", "6", "--calibration", "text.txt",
               "--calibration-length", "32", *options, cwd=tmp_path)  # fmt: skip
    assert done.returncode == 3, done.stderr
    assert "Traceback" not in done.stderr
    assert says in " ".join(done.stderr.split())
