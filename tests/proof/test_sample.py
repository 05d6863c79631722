"""verify --sample: a quick look that says how much it looked at."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from damage import flip, quantization
from helpers import USAGE, nf4, nf4_ok

from nf4cli import engines
from nf4cli.checkpoint.discovery import MANIFEST, open_checkpoint
from nf4cli.planning.resources import Resources
from nf4cli.proof.sample import choose, units_of, verify_sample
from nf4cli.proof.verify import verify

UP = "model.layers.0.mlp.up_proj.weight"
RESOURCES = Resources(workers=2, chunk=1 << 20, memory=0)


@pytest.fixture
def copy(llama_nf4: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama_nf4, tmp_path / "copy"))


def test_it_says_what_it_looked_at(llama, llama_nf4):
    text = nf4_ok("verify", llama_nf4, "--sample", "30%", "--seed", "4", "--source", llama)
    assert "is good in the sample: " in text
    assert "--seed 4" in text
    assert "is good\n" not in text
    assert "not checked: " in text
    seen = json.loads(nf4_ok("verify", llama_nf4, "--sample", "30%", "--seed", "4", "--json"))
    sample = seen["sample"]
    assert sample["seed"] == 4
    assert 0.1 < sample["share"] <= 0.3
    assert sample["share"] == sample["nbytes"] / sample["of_nbytes"]
    assert json.loads(nf4_ok("verify", llama_nf4, "--json"))["sample"] is None


@pytest.mark.parametrize("levels", ["manifest", "source", "both"])
def test_damage_is_found_where_it_was_looked_at(copy, llama, levels):
    """Over many seeds a damaged tensor is found exactly where it is in the sample."""
    flip(copy, UP, 100)
    if levels == "source":
        (copy / MANIFEST).unlink()
    source = None if levels == "manifest" else llama
    caught = []
    for seed in range(12):
        report = verify_sample(copy, source, 0.4, seed, engines.load("cpu"), RESOURCES)
        caught.append(not report.ok)
        assert {f.where for f in report.findings} <= {UP}
        assert report.ok is (UP not in chosen_names(copy, 0.4, seed))
    assert 0 < sum(caught) < 12


def chosen_names(root: Path, share: float, seed: int) -> set[str]:
    checkpoint = open_checkpoint(root)
    from nf4cli.checkpoint.packed import load_weights
    from nf4cli.checkpoint.reader import ShardReaders

    with ShardReaders(checkpoint.shards) as readers:
        units = units_of(checkpoint, load_weights(checkpoint, readers))
    total = sum(unit.nbytes for unit in units)
    return {unit.name for unit in choose(units, int(share * total), seed)}


def test_everything_small_is_looked_at_whatever_the_sample(copy, llama):
    quantization(copy, lambda q: q.pop("bnb_4bit_quant_type"))
    (copy / "tokenizer.json").write_text("[1]")
    report = verify_sample(copy, llama, 1, 0, engines.load("cpu"), RESOURCES)
    assert {f.where for f in report.findings} == {"config.json", "tokenizer.json"}
    assert {f.level for f in report.findings} == {"config", "manifest", "source"}
    assert report.sample is not None
    assert report.sample.tensors >= 1


def test_a_sample_of_everything_is_as_strict_as_verify(copy, llama):
    for place in range(3):
        flip(copy, UP + ("", ".absmax", ".nested_absmax")[place], 1)
        every = verify_sample(copy, llama, 1.0, 0, engines.load("cpu"), RESOURCES)
        full = verify(copy, llama, engines.load("cpu"), RESOURCES)
        assert every.sample is not None
        assert every.sample.share == 1
        tensors = {f.where for f in full.findings} - {"model.safetensors"}
        assert {f.where for f in every.findings} == tensors


def test_it_reads_no_more_than_it_says(llama_nf4):
    counts: list[int] = []
    report = verify_sample(
        llama_nf4, None, 50_000, 1, engines.load("cpu"), RESOURCES,
        lambda _, count: counts.append(count),
    )  # fmt: skip
    assert report.sample is not None
    assert sum(counts) == report.sample.nbytes <= 50_000


@pytest.mark.parametrize("sample", ["0%", "101%", "nan%", "x%", "-5%", "many", "0"])
def test_no_sample(llama_nf4, sample):
    done = nf4("verify", llama_nf4, f"--sample={sample}")
    assert done.returncode == USAGE
    assert "--sample" in done.stderr


def test_a_seed_without_a_sample(llama_nf4):
    assert nf4("verify", llama_nf4, "--seed", "1").returncode == USAGE
