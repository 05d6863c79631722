"""The fuzz targets, briefly: every seed, what once failed, random bytes, and mutations by atheris.

scripts/fuzz runs them long.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from attacks.make import KINDS
from fuzz.targets import TARGETS, seeds
from hypothesis import given, settings
from hypothesis import strategies as st

from nf4cli.format.dtypes import ITEMSIZE

RUNS = 1500  # executions a target; scripts/fuzz makes 150,000
HERE = Path(__file__).parent

ONCE_FAILED = [
    ("config", b'{"model_type": "x", "quantization_config": {"quant_method": "fp8", '
               b'"config_groups": {"group_0": {"../x": {}}}}}'),
    ("state", b'{"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [64, 4], '
              b'"nested_dtype": "flo.t32"}'),
    ("manifest", KINDS["manifest"]()["no-digests"]),
    ("manifest", KINDS["manifest"]()["action-unknown"]),
]  # fmt: skip


@pytest.mark.parametrize("name", TARGETS)
def test_seeds(name):
    for data in seeds(name):
        TARGETS[name](data)


@pytest.mark.parametrize(("name", "data"), ONCE_FAILED)
def test_what_once_failed(name, data):
    TARGETS[name](data)


@pytest.mark.parametrize("name", ["config", "index", "manifest", "pipeline", "state"])
def test_every_attack_is_fed_to_every_target(name):
    for make in KINDS.values():
        for data in make().values():
            TARGETS[name](data)


TEXT = st.text(max_size=12)
NUMBERS = st.integers(-2, 5) | st.sampled_from([2**31, 2**63, 2**64, 10**30]) | st.floats()
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
TENSOR = st.fixed_dictionaries({
    "dtype": st.sampled_from([*ITEMSIZE, "F4"]) | VALUES,
    "shape": st.lists(st.integers(0, 4), max_size=3) | VALUES,
    "data_offsets": st.lists(st.integers(0, 40), min_size=2, max_size=2) | VALUES,
})  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(TEXT | st.just("__metadata__"), TENSOR | VALUES, max_size=4), st.binary())
def test_reader_agrees_with_the_library(header, data):
    TARGETS["reader_text"](json.dumps(header).encode() + b"\n\n" + data)


@st.composite
def valid_files(draw: st.DrawFn) -> bytes:
    """Headers that are right, but for one field in some of them."""
    header, offset = {}, 0
    for name in draw(st.lists(TEXT, unique=True, max_size=5)):
        dtype = draw(st.sampled_from([*ITEMSIZE]))
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        count = ITEMSIZE[dtype]
        for dimension in shape:
            count *= dimension
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + count]}
        offset += count
    if header and draw(st.booleans()):
        tensor = header[draw(st.sampled_from([*header]))]
        field = draw(st.sampled_from([*tensor]))
        tensor[field] = draw(TENSOR)[field]
    return json.dumps(header).encode() + b"\n\n" + bytes(i % 251 for i in range(offset))


@settings(max_examples=400, deadline=None)
@given(valid_files())
def test_reader_agrees_on_files_that_are_nearly_right(data):
    TARGETS["reader_text"](data)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300))
def test_the_library_reads_what_we_write(data):
    TARGETS["writer"](data)


@pytest.mark.parametrize("name", TARGETS)
def test_atheris(name, tmp_path):
    if find_spec("atheris") is None:
        pytest.skip("atheris has no build for this system or Python: the other tests still ran")
    (tmp_path / "place").mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "fuzz.drive", name, str(RUNS), "1", str(tmp_path)],
        cwd=HERE, capture_output=True, text=True, check=False,
        env={**os.environ, "NF4_FUZZ_PLACE": str(tmp_path / "place")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert f"number_of_executed_units: {RUNS}" in done.stderr
