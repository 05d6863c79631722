"""Outlier blocks: what counts as one, the same on every engine, and where it is shown."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from helpers import INPUT, LLAMA, UP, llama_tensors, nf4, nf4_ok, raw, write_checkpoint_dir

from nf4cli.checkpoint.discovery import MANIFEST
from nf4cli.engines.protocol import GRANULE
from nf4cli.format.codebook import BLOCKSIZES


def count(engine, x: torch.Tensor, blocksize: int, quant_type: str = "nf4") -> list[float]:
    """Outlier blocks a granule of a float32 vector."""
    packed = np.empty((x.numel() + 1) // 2, np.uint8)
    absmax = np.empty(-(-x.numel() // blocksize), np.float32)
    stats = engine.quantize(raw(x), "F32", blocksize, quant_type, packed, absmax)
    return stats[:, 3].tolist()


def block(blocksize: int, ratio: float, seed: int = 0) -> torch.Tensor:
    """A block whose largest magnitude is `ratio` times the root mean square of the rest."""
    x = torch.randn(blocksize, generator=torch.Generator().manual_seed(seed)).clamp(-2, 2)
    place = seed % blocksize
    x[place] = 0
    x /= (x.double().square().sum() / (blocksize - 1)).sqrt()
    x[place] = -ratio if seed % 2 else ratio
    return x


@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_the_ratio_decides_at_every_blocksize(engine, blocksize):
    """Within a hundredth of 10; a float32 sum of 4,096 squares is not exact to the last bit."""
    for seed in range(4):
        blocks = [block(blocksize, ratio, seed) for ratio in (9.9, 10.1, 3.0, 1e3, 1e25)]
        assert count(engine, torch.cat(blocks), blocksize) == [3]
        assert count(engine, torch.cat([blocks[0], block(blocksize // 2, 9.9)]), blocksize) == [0]
        assert count(engine, torch.cat([blocks[0], block(blocksize // 2, 10.1)]), blocksize) == [1]


LOSSLESS = {
    "zeros": torch.zeros(64),
    "one value": torch.zeros(64).index_fill(0, torch.tensor([5]), 0.3),
    "one value of each sign in 4096": torch.zeros(4096).index_copy(
        0, torch.tensor([5, 4000]), torch.tensor([0.3, -0.3])
    ),
    "nearly the largest float": torch.zeros(64).index_fill(0, torch.tensor([9]), 3.4e38),
    "smaller than the floor of the reciprocal": torch.linspace(0, 1e-39, 64),
    "a tail of one": torch.ones(1),
    "a tail of zeros": torch.zeros(33),
}


@pytest.mark.parametrize("name", LOSSLESS)
def test_what_loses_nothing_does_not_count(engine, name):
    x = LOSSLESS[name]
    for quant_type in ("nf4", "fp4"):
        assert count(engine, x, 4096 if x.numel() == 4096 else 64, quant_type) == [0]


def test_an_extreme_value_counts_however_extreme(engine):
    """A flipped bit of an exponent: the squares of the others underflow in units of absmax."""
    for outlier in (1e6, 1e19, 1e38):
        x = torch.randn(64, generator=torch.Generator().manual_seed(1)) * 1e-2
        x[40] = outlier
        assert count(engine, x, 64) == [1]
        assert count(engine, torch.cat([torch.zeros(GRANULE), x[:41]]), 64) == [0, 1]


def test_the_count_is_what_its_definition_says(engine):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(3 * GRANULE + 40, generator=generator)
    x[torch.randint(0, x.numel(), (4000,), generator=generator)] *= 8
    for blocksize in (32, 64, 1024):
        expected = np.zeros(4)
        for number, part in enumerate(x.double().split(blocksize)):
            absmax, n = part.abs().max(), part.numel()
            rest = (part.square().sum() - absmax.square()) / max(1, n - 1)
            expected[number * blocksize // GRANULE] += bool(absmax > 10.0025 * rest.sqrt() > 0)
        assert expected.sum() > 10
        assert count(engine, x, blocksize) == expected.tolist()


# -- where it is shown ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def crushed(tmp_path_factory):
    """(source, output) of a model with 3 outlier blocks in one weight of 128."""
    root = tmp_path_factory.mktemp("crushed")
    tensors = llama_tensors()
    for row in (0, 7, 100):
        tensors[UP][row, row % 64] = 3.0
    write_checkpoint_dir(root / "model", tensors, LLAMA)
    text = nf4_ok("quantize", root / "model", root / "out")
    assert f"outlier blocks 0.26%, most 2.34% in {UP}" in text
    return root / "model", root / "out"


def test_the_manifest_has_the_count_of_every_weight(crushed):
    records = json.loads((crushed[1] / MANIFEST).read_text())["tensors"]
    errors = {name: r["error"] for name, r in records.items() if r["action"] == "quantize"}
    assert errors[UP]["blocks"] == 128
    assert {name: e["outlier_blocks"] for name, e in errors.items() if e["outlier_blocks"]} == {
        UP: 3
    }


def test_inspect_shows_the_weights_with_most(crushed):
    text = nf4_ok("inspect", crushed[1])
    assert "3 of 1,152 (0.26%); the most:\n  2.34% in " + UP in text
    assert "outlier blocks" in (one := nf4_ok("inspect", crushed[1], UP))
    assert "3 of 128 (2.34%)" in one
    document = json.loads(nf4_ok("inspect", crushed[1], "--json"))
    assert document["errors"][UP]["outlier_blocks"] == 3


def test_a_model_without_any_says_nothing_of_them(llama_nf4):
    assert "outlier" not in nf4_ok("inspect", llama_nf4)


def edit_errors(root, change, **fields) -> None:
    document = json.loads((root / MANIFEST).read_text()) | fields
    for record in document["tensors"].values():
        if "error" in record:
            change(record["error"])
    (root / MANIFEST).write_text(json.dumps(document))


def test_a_manifest_of_an_earlier_version_is_proved_without_them(crushed, tmp_path):
    source, output = crushed
    shutil.copytree(output, tmp_path / "out")
    edit_errors(
        tmp_path / "out",
        lambda e: (e.pop("blocks"), e.pop("outlier_blocks")),
        tool={"name": "nf4cli", "version": "0.1.0"},
    )
    assert "is good" in nf4_ok("verify", tmp_path / "out", "--source", source)
    assert "outlier" not in nf4_ok("inspect", tmp_path / "out")


@pytest.mark.parametrize("change", [
    lambda e: e.update(outlier_blocks=e["outlier_blocks"] + 1),
    lambda e: e["outlier_blocks"] and e.pop("outlier_blocks"),
])  # fmt: skip
def test_a_manifest_that_is_wrong_about_them_is_noticed(crushed, tmp_path, change):
    source, output = crushed
    shutil.copytree(output, tmp_path / "out")
    edit_errors(tmp_path / "out", change)
    done = nf4("verify", tmp_path / "out", "--source", source)
    assert done.returncode == 1
    assert f"has of {UP} another record than the source gives" in done.stdout


@pytest.mark.parametrize("fields", [
    {"outlier_blocks": "3"}, {"outlier_blocks": -1}, {"blocks": 10**400}, {"blocks": True},
])  # fmt: skip
def test_a_count_that_is_no_number_is_a_damaged_manifest(crushed, tmp_path, fields):
    shutil.copytree(crushed[1], tmp_path / "out")
    edit_errors(tmp_path / "out", lambda e: e.update(fields))
    done = nf4("inspect", tmp_path / "out")
    assert done.returncode == INPUT
    assert "damaged" in done.stderr


def test_a_count_of_blocks_that_are_not_there_is_shown_as_it_is(crushed, tmp_path):
    shutil.copytree(crushed[1], tmp_path / "out")
    edit_errors(tmp_path / "out", lambda e: e.update(blocks=0))
    assert "3 of 0" in nf4_ok("inspect", tmp_path / "out")
    assert nf4("verify", tmp_path / "out", "--source", crushed[0]).returncode == 1
