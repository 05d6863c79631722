"""Outputs of earlier versions: made again byte for byte, and good for ever."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import nf4_ok

OUTPUTS = Path(__file__).parents[1] / "goldens" / "outputs"
"""Made by nf4 0.2.0, before its modules were rearranged, from `source`."""

OPTIONS = {
    "0.2.0-nf4": (),
    "0.2.0-search": (
        "--scale", "search", "--quant-type", "fp4", "--no-double-quant", "--blocksize", "32",
        "--dtype", "float32", "--digest", "sha256",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_it_is_made_again_byte_for_byte(name, tmp_path):
    nf4_ok("quantize", OUTPUTS / "source", tmp_path / "out", *OPTIONS[name])
    expected = {p.name: p.read_bytes() for p in (OUTPUTS / name).iterdir()}
    made = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    assert made.keys() == expected.keys()
    for file in expected.keys() - {"nf4_manifest.json", "README.md"}:
        assert made[file] == expected[file], file
    before, now = (json.loads(files["nf4_manifest.json"]) for files in (expected, made))
    for manifest in (before, now):
        del manifest["tool"]["version"]
    assert now == before


@pytest.mark.parametrize("name", OPTIONS)
def test_it_is_proved(name):
    assert "is good" in nf4_ok("verify", OUTPUTS / name, "--source", OUTPUTS / "source")
