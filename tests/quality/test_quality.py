"""What chosen scales are for: a real model stays closer to itself, in as many bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import nf4_ok
from schemas import document

import nf4cli.quality.evaluation

pytestmark = pytest.mark.loaders
PYTHON = Path(nf4cli.quality.evaluation.__file__).parent / "texts" / "python.txt"
RECIPES = {
    "absmax": (),
    "search": ("--scale", "search"),
    "calibrated": ("--calibration", PYTHON, "--calibration-tokens", "2048"),
}


def test_smollm2_loses_less_by_search_and_half_by_calibration(smollm, tmp_path):
    """Bounds well above what was measured (docs/quality.md), for little text and quick."""
    kl, sizes = {}, set()
    for name, options in RECIPES.items():
        nf4_ok("quantize", smollm, tmp_path / name, *options)
        sizes.add((tmp_path / name / "model.safetensors").stat().st_size)
        told = nf4_ok("eval", tmp_path / name, "--source", smollm, "--tokens", "1024", "--json",
                      "-q", "--cache-dir", tmp_path / "cache")  # fmt: skip
        texts = document(told, "eval")["texts"]
        kl[name] = {text: figures["kl_mean"][0] for text, figures in texts.items()}
    assert len(sizes) == 1
    for text in ("python", "packages"):
        assert kl["search"][text] < 0.97 * kl["absmax"][text], kl
        assert kl["calibrated"][text] < 0.65 * kl["absmax"][text], kl
