"""What chosen scales are for: real models stay closer to themselves, in as many bytes."""

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


def losses(source: Path, work: Path, figure: str) -> dict[str, dict[str, float]]:
    """Return a figure of nf4 eval by recipe and text, of outputs that have the same size."""
    found, sizes = {}, set()
    for name, options in RECIPES.items():
        nf4_ok("quantize", source, work / name, *options)
        sizes.add((work / name / "model.safetensors").stat().st_size)
        told = nf4_ok("eval", work / name, "--source", source, "--tokens", "1024", "--json", "-q",
                      "--cache-dir", work / "cache")  # fmt: skip
        texts = document(told, "eval")["texts"]
        found[name] = {text: figures[figure][0] for text, figures in texts.items()}
    assert len(sizes) == 1
    return found


@pytest.mark.long
def test_smollm2_loses_less_by_search_and_half_by_calibration(smollm, tmp_path):
    """Bounds well above what was measured (docs/quality.md), for little text and quick."""
    kl = losses(smollm, tmp_path, "kl_mean")
    for text in ("python", "packages"):
        assert kl["search"][text] < 0.97 * kl["absmax"][text], kl
        assert kl["calibrated"][text] < 0.65 * kl["absmax"][text], kl


def test_minilm_loses_less_by_search_and_a_fifth_by_calibration(minilm, tmp_path):
    """0.93 and 0.73 of the distance were measured, with this little text."""
    cosines = losses(minilm, tmp_path, "cosine_mean")
    for text in ("python", "packages"):
        search, calibrated = (
            (1 - cosines[name][text]) / (1 - cosines["absmax"][text])
            for name in ("search", "calibrated")
        )
        assert search < 0.97, cosines
        assert calibrated < 0.82, cosines
