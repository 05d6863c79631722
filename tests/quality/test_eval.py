"""nf4 eval: its figures against transformers' own, its intervals, its cache, its exit codes."""

from __future__ import annotations

import json

import numpy as np
import pytest
import text_models
import torch
import transformers
from helpers import nf4, nf4_ok
from schemas import document

import nf4cli
from nf4cli.errors import UsageError
from nf4cli.quality import texts
from nf4cli.quality.calibration.text import open_tokenizer
from nf4cli.quality.evaluation import causal, statistics
from nf4cli.quality.evaluation.cache import Cache
from nf4cli.quality.evaluation.statistics import blocks_of, figures

LIMITS = ("--context", "32", "--tokens", "512")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A Llama `model`, its 4-bit `out`, a text; never changed by a test."""
    root = tmp_path_factory.mktemp("eval")
    text_models.make("llama", root / "model", torch.bfloat16)
    nf4_ok("quantize", root / "model", root / "out")
    (root / "text.txt").write_text(text_models.text(900))
    return root


def evaluated(place, tmp_path, output, *options, code=0):
    done = nf4(
        "eval", output, "--source", "model", "--text", "text.txt", *LIMITS, "--json", "-q",
        "--cache-dir", tmp_path / "cache", *options, cwd=place,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    return document(done.stdout, "eval")


def test_figures_are_those_of_transformers(place, tmp_path):
    found = evaluated(place, tmp_path, "out")["texts"]["text"]
    nf4_ok("dequantize", place / "out", tmp_path / "decoded")
    tokenizer = open_tokenizer(place / "model")
    windows = texts.sequences([text_models.text(900)], tokenizer, 32, 16)
    a, b = (
        transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        for path in (place / "model", tmp_path / "decoded")
    )
    ids = torch.from_numpy(windows)
    with torch.no_grad():
        p, q = (m(ids).logits[:, :-1].double().log_softmax(-1) for m in (a, b))
        losses = [float(m(ids, labels=ids).loss) for m in (a, b)]
    kl = (p.exp() * (p - q)).sum(-1)
    assert found["positions"] == kl.numel() == 16 * 31
    assert found["kl_mean"][0] == pytest.approx(float(kl.mean()), rel=1e-3)
    assert found["kl_99"][0] == pytest.approx(float(kl.flatten().quantile(0.99)), rel=1e-2)
    assert found["kl_max"][0] == pytest.approx(float(kl.max()), rel=1e-2)
    assert found["perplexity_source"][0] == pytest.approx(np.exp(losses[0]), rel=1e-3)
    assert found["perplexity_output"][0] == pytest.approx(np.exp(losses[1]), rel=1e-3)
    ratio = np.exp(losses[1] - losses[0])
    assert found["perplexity_ratio"][0] == pytest.approx(ratio, rel=1e-3)
    same = float((p.argmax(-1) == q.argmax(-1)).double().mean())
    assert found["top1"][0] == pytest.approx(same, abs=0.003)
    for value, low, high in (found[n] for n in found if n != "positions"):
        assert low <= value <= high


def test_bitsandbytes_says_the_same(place, tmp_path):
    """The decoded weights are the model that bitsandbytes runs, in float32."""
    found = evaluated(place, tmp_path, "out")["texts"]["text"]
    windows = texts.sequences([text_models.text(900)], open_tokenizer(place / "model"), 32, 16)
    model = transformers.AutoModelForCausalLM.from_pretrained(place / "out", dtype=torch.float32)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
            module.compute_dtype = torch.float32
    with torch.no_grad():
        loss = float(model(torch.from_numpy(windows), labels=torch.from_numpy(windows)).loss)
    assert found["perplexity_output"][0] == pytest.approx(np.exp(loss), rel=2e-3)


def test_a_model_is_nowhere_from_itself(place, tmp_path):
    found = evaluated(place, tmp_path, "model")["texts"]["text"]
    assert found["kl_max"][0] < 1e-4
    assert found["top1"][0] == 1
    assert found["perplexity_ratio"] == pytest.approx([1, 1, 1], abs=1e-3)


def test_a_source_of_four_bits_is_decoded_as_well(place, tmp_path):
    done = nf4("eval", "out", "--source", "out", "--text", "text.txt", *LIMITS, "--json", "-q",
               "--cache-dir", tmp_path / "c", cwd=place)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert document(done.stdout, "eval")["texts"]["text"]["kl_max"][0] < 1e-4


def test_the_source_is_run_once(place, tmp_path):
    first = evaluated(place, tmp_path, "out")
    (entry,) = (tmp_path / "cache").iterdir()
    written = entry.stat().st_ino
    assert evaluated(place, tmp_path, "out") == first
    (entry,) = (tmp_path / "cache").iterdir()
    assert entry.stat().st_ino == written
    values = np.lib.format.open_memmap(entry, "r+")
    values[:] = 0  # it says nothing any more: a second run that asked the model would not notice
    values.flush()
    assert evaluated(place, tmp_path, "out") != first
    done = nf4(
        "eval", "out", "--source", "model", "--text", "text.txt", *LIMITS, "--tokens", "256",
        "--cache-dir", tmp_path / "cache", cwd=place,
    )  # fmt: skip
    assert done.returncode == 0
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_the_cache_stays_within_its_bound(tmp_path):
    cache = Cache(tmp_path / "cache", 100_000)
    for key in "abc":
        with cache.writing(key, (1, 20, 1000)) as values:
            values[:] = 1
    assert sorted(p.name for p in (tmp_path / "cache").iterdir()) == ["b.npy", "c.npy"]
    assert cache.find("a") is None
    assert cache.find("c") is not None
    with pytest.raises(RuntimeError), cache.writing("d", (1, 2, 10)):
        raise RuntimeError
    assert len(list((tmp_path / "cache").iterdir())) == 2, "half an entry is none"


def test_a_bound_cuts_the_text_and_says_so(place, tmp_path):
    size = 2 * 32 * 512 * 4  # four windows
    done = nf4(
        "eval", "out", "--source", "model", "--text", "text.txt", *LIMITS, "--cache-dir",
        tmp_path / "c", "--cache-size", size, cwd=place,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "room for 128 of 512 tokens" in done.stderr
    assert "text, 124 positions" in done.stdout
    done = nf4("eval", "out", "--source", "model", "--text", "text.txt", *LIMITS, "--cache-dir",
               tmp_path / "c", "--cache-size", "1000", cwd=place)  # fmt: skip
    assert (done.returncode, "less than one window takes" in done.stderr) == (2, True)


def test_limits_for_a_pipeline(place, tmp_path):
    kl = evaluated(place, tmp_path, "out")["texts"]["text"]["kl_mean"][0]
    good = evaluated(place, tmp_path, "out", "--max-kl", str(kl * 1.1), "--min-top1", "0.01")
    assert (good["ok"], good["failures"]) == (True, [])
    bad = evaluated(place, tmp_path, "out", "--max-kl", str(kl / 2), "--min-top1", "1", code=1)
    assert not bad["ok"]
    assert len(bad["failures"]) == 2


def test_two_texts_of_its_own(place, tmp_path):
    done = nf4("eval", "out", "--source", "model", "--context", "32", "--tokens", "64",
               "--cache-dir", tmp_path, cwd=place)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "python, 62 positions" in done.stdout
    assert "packages, 62 positions" in done.stdout
    assert "KL divergence, mean" in done.stdout


def test_an_encoders_embeddings(tmp_path):
    text_models.make("bert_mlm", tmp_path / "model", torch.bfloat16)
    nf4_ok("quantize", tmp_path / "model", tmp_path / "out")
    (tmp_path / "text.txt").write_text(text_models.text(600))
    done = nf4("eval", "out", "--source", "model", "--text", "text.txt", "--json", "-q",
               "--context", "64", cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = document(done.stdout, "eval")
    assert found["kind"] == "encoder"
    nf4_ok("dequantize", tmp_path / "out", tmp_path / "decoded")
    tokenizer, cosines = open_tokenizer(tmp_path / "model"), []
    models = [
        transformers.AutoModel.from_pretrained(path, dtype=torch.float32)
        for path in (tmp_path / "model", tmp_path / "decoded")
    ]
    for paragraph in (tmp_path / "text.txt").read_text().split("\n\n"):
        given = tokenizer(paragraph, truncation=True, max_length=64, return_tensors="pt")
        with torch.no_grad():
            a, b = (m(**given).last_hidden_state[0].mean(0) for m in models)
        cosines.append(float(torch.nn.functional.cosine_similarity(a, b, dim=0)))
    figure = found["texts"]["text"]
    assert figure["positions"] == len(cosines)
    assert figure["cosine_mean"][0] == pytest.approx(np.mean(cosines), abs=1e-5)
    assert figure["cosine_min"][0] == pytest.approx(min(cosines), abs=1e-5)
    assert min(cosines) < 0.9999
    done = nf4("eval", "out", "--source", "model", "--text", "text.txt", "--max-kl", "1",
               cwd=tmp_path)  # fmt: skip
    assert (done.returncode, "for language models" in done.stderr) == (2, True)


def test_two_outputs_at_the_same_positions(place, tmp_path):
    """The share is that of the means, and its interval is narrower than theirs allow."""
    nf4_ok("quantize", place / "model", tmp_path / "coarse", "--blocksize", "256")
    one, coarse = (
        evaluated(place, tmp_path, output)["texts"]["text"]["kl_mean"]
        for output in ("out", tmp_path / "coarse")
    )
    both = evaluated(place, tmp_path, "out", "--other", tmp_path / "coarse")
    assert both["other"] == str(tmp_path / "coarse")
    found = both["texts"]["text"]
    assert found["kl_mean"] == one
    assert found["kl_other"] == coarse
    value, low, high = found["kl_ratio"]
    assert value == pytest.approx(one[0] / coarse[0], rel=1e-4)
    assert one[1] / coarse[2] < low < value < high < one[2] / coarse[1]
    assert high < 1
    swapped = evaluated(place, tmp_path, tmp_path / "coarse", "--other", "out")
    assert swapped["texts"]["text"]["kl_ratio"][0] == pytest.approx(1 / value, rel=1e-4)
    done = nf4("eval", "out", "--source", "model", "--other", tmp_path / "coarse", "--text",
               "text.txt", *LIMITS, "--html", tmp_path / "page.html", cwd=place)  # fmt: skip
    assert "of the other" in done.stdout, done.stderr
    assert "share of it" in (tmp_path / "page.html").read_text()


def test_two_encoders(tmp_path):
    text_models.make("bert_mlm", tmp_path / "model", torch.bfloat16)
    (tmp_path / "text.txt").write_text(text_models.text(600))
    for name, blocksize in (("fine", "64"), ("coarse", "256")):
        nf4_ok("quantize", tmp_path / "model", tmp_path / name, "--blocksize", blocksize)
    done = nf4_ok("eval", "fine", "--source", "model", "--other", "coarse", "--text", "text.txt",
                  "--json", "-q", cwd=tmp_path)  # fmt: skip
    found = document(done, "eval")["texts"]["text"]
    share = (1 - found["cosine_mean"][0]) / (1 - found["cosine_other"][0])
    assert found["distance_ratio"][0] == pytest.approx(share, rel=1e-2)
    assert found["distance_ratio"][2] < 1


def test_another_output_without_loss_is_refused():
    zeros = {name: np.zeros((4, 31)) for name in ("source", "output", "kl", "same")}
    with pytest.raises(UsageError, match="no loss to compare with"):
        causal.summarised({**zeros, "kl": np.ones((4, 31))}, zeros)


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        (("--text", "none.txt"), 3, "does not exist"),
        (("--text", "text.txt", "--context", "4"), 2, "is below 8"),
        (("--text", "text.txt", "--context", "32768", "--tokens", "40000"), 2, "fewer than one"),
        (("--text", "text.txt", "--dtype", "int8"), 2, "--dtype int8 is not one of"),
        (("--text", "text.txt", "--device", "cuda"), 2, "torch cannot use --device cuda"),
        (("--text", "text.txt", "--other", "none"), 3, "none does not exist"),
        (("--source", "model/model.safetensors"), 3, "no directory with a config.json"),
    ],
)
def test_what_is_refused(place, tmp_path, options, code, says):
    done = nf4("eval", "out", "--source", "model", "--cache-dir", tmp_path, *options, cwd=place)
    assert done.returncode == code, done.stderr
    assert says in done.stderr


def test_other_models_are_refused(place, tmp_path):
    text_models.make("t5", tmp_path / "t5", torch.bfloat16)
    done = nf4("eval", "out", "--source", tmp_path / "t5", cwd=place)
    assert (done.returncode, "encoder with a decoder" in done.stderr) == (2, True)
    config = json.loads((place / "model/config.json").read_text())
    small = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**config, "vocab_size": 400}))
    text_models.save(small, tmp_path / "small")
    done = nf4("eval", tmp_path / "small", "--source", "model", "--text", "text.txt", *LIMITS,
               "--cache-dir", tmp_path / "c", cwd=place)  # fmt: skip
    assert (done.returncode, "a vocabulary of 400" in done.stderr) == (2, True)
    damaged = transformers.AutoModelForCausalLM.from_pretrained(place / "model")
    damaged.model.norm.weight.data[0] = float("nan")
    damaged.save_pretrained(tmp_path / "nan")
    done = nf4("eval", tmp_path / "nan", "--source", "model", "--text", "text.txt", *LIMITS,
               "--cache-dir", tmp_path / "c", cwd=place)  # fmt: skip
    assert (done.returncode, "gives a NaN" in done.stderr) == (3, True)


def test_intervals_hold_the_truth_as_often_as_they_say():
    """Blocks of equal values: only their number counts, and the interval knows."""
    generator, inside = np.random.default_rng(3), 0
    for _ in range(100):
        column = np.repeat(generator.standard_normal(40), statistics.BLOCK)
        found = figures({"x": column}, blocks_of(1, len(column)), {"m": statistics.mean("x")})
        inside += found["m"].low <= 0 <= found["m"].high
    assert 85 <= inside <= 100


def test_one_block_has_no_interval():
    found = figures({"x": np.arange(5.0)}, blocks_of(1, 5), {"m": statistics.mean("x")})
    assert found["m"].as_list() == [2, 2, 2]


def test_the_function_returns_what_the_command_writes(place, tmp_path):
    """Figures and failures of `nf4cli.evaluate` are those of `nf4 eval --json`."""
    command = evaluated(place, tmp_path, "out", "--max-kl", "1e-9", code=1)
    found = nf4cli.evaluate(
        place / "out", place / "model", texts=[place / "text.txt"], context=32, tokens=512,
        cache_directory=tmp_path / "cache", max_kl=1e-9,
    )  # fmt: skip
    assert (found.ok, found.kind) == (command["ok"], command["kind"]) == (False, "causal")
    assert list(found.failures) == command["failures"]
    measured = found.texts["text"]
    assert command["texts"]["text"] == {
        "positions": measured.positions,
        **{name: figure.as_list() for name, figure in measured.figures.items()},
    }
