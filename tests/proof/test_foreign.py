"""verify on what bitsandbytes wrote: by transformers 5, and by 4 where it is at hand.

Larger than the other tiny models: about one nested code in 600 differs on a CPU.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import foreign_worker
import numpy as np
import pytest
import torch
from damage import STATE, config, content, flip, patch, quantization, resave, shard_of, state
from forking import OF_LOADERS, command
from helpers import nf4, nf4_ok

FOUR = os.environ.get("NF4_TRANSFORMERS4_PYTHON")
UP = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("foreign") / "source"
    foreign_worker.make_source(path)
    return path


@pytest.fixture(scope="module")
def five(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("five")
    foreign_worker.write(source, root)
    return root


@pytest.fixture(scope="module")
def four(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not FOUR:
        pytest.skip("NF4_TRANSFORMERS4_PYTHON names no Python with transformers 4")
    root = tmp_path_factory.mktemp("four")
    program = [*command(Path(FOUR), OF_LOADERS), foreign_worker.__file__]
    subprocess.run([*program, source, root], check=True)
    return root


@pytest.mark.parametrize("version", ["five", "four"])
@pytest.mark.parametrize("name", ["nested", "plain", "sharded"])
def test_it_is_good_and_what_is_not_known_is_said(request, source, version, name):
    root = request.getfixturevalue(version) / name
    seen = json.loads(nf4_ok("verify", root, "--source", source, "--json"))
    assert seen["findings"] == []
    assert any("llm_int8_skip_modules" in sentence for sentence in seen["unchecked"])
    assert any("nf4_manifest.json" in sentence for sentence in seen["unchecked"])
    if name == "sharded":
        assert len(list(root.glob("*.safetensors"))) > 1
    if name == "plain":
        assert seen["notes"] == []
    else:
        (note,) = seen["notes"]
        assert "have the neighbour of the nearest code" in note
        assert any("or as good (see the note)" in check["what"] for check in seen["checks"])
    if name == "nested":
        text = nf4_ok("verify", root)
        assert "run again with --source" in text
        assert "is good" in text


@pytest.fixture
def copy(five: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(five / "nested", tmp_path / "copy"))


@pytest.mark.parametrize("bit", [0, 1, 4, 7])
def test_another_code_than_the_kernel_could_give_is_found(copy, source, bit):
    """Even a code next to the right one, where the scale is not at the edge between the two."""
    flip(copy, UP + ".absmax", 70, bit)
    done = nf4("verify", copy, "--source", source)
    assert done.returncode == 1
    assert f"{UP}.absmax in model.safetensors: byte 70" in done.stdout


def offset_of(root: Path) -> float:
    return json.loads(content(root, UP + STATE))["nested_offset"]


def test_an_offset_of_another_summation_is_as_good(copy, source):
    """Given another offset, nested_absmax and codes must follow from it: here they do not all."""
    near = offset_of(copy) * (1 + 1e-7)
    text = json.dumps(near)
    assert text != json.dumps(offset_of(copy))
    resave_state(copy, nested_offset=near)
    done = nf4("verify", copy, "--source", source)
    assert UP + STATE not in done.stdout, "the offset itself is accepted"
    resave_state(copy, nested_offset=offset_of(copy) * 1.001)
    done = nf4("verify", copy, "--source", source)
    assert done.returncode == 1
    assert UP + STATE in done.stdout


def resave_state(root: Path, **fields: object) -> None:
    """Their blobs have no room for a longer number: the file is saved anew."""
    blob = json.dumps(json.loads(content(root, UP + STATE)) | fields).encode()
    new = torch.from_numpy(np.frombuffer(blob, np.uint8).copy())
    resave(root, UP, lambda tensors: tensors.update({UP + STATE: new}))


def test_what_their_config_says_otherwise_is_found(copy, source):
    config(copy, lambda c: c.update(rms_norm_eps=0.5))
    done = nf4("verify", copy, "--source", source)
    assert done.returncode == 1
    assert "rms_norm_eps is 0.5" in done.stdout
    config(copy, lambda c: c.pop("rms_norm_eps"))
    text = nf4_ok("verify", copy, "--source", source)
    assert "this one lacks: rms_norm_eps" in text


def test_their_kept_tensors_are_compared(copy, source):
    quantization(copy, lambda q: q.update(llm_int8_skip_modules=["lm_head"]))
    nf4_ok("verify", copy, "--source", source)
    assert shard_of(copy, "lm_head.weight").name == "model.safetensors"
    patch(copy, "lm_head.weight", lambda data: data[2:] + data[:2])
    assert nf4("verify", copy, "--source", source).returncode == 1
    state(copy, UP, dtype="float16")
    assert f"{UP}{STATE} is" in nf4("verify", copy, "--source", source).stdout
