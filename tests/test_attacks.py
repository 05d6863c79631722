"""Every hostile file of tests/attacks, with every command: refused in words, or harmless.

Never a traceback, a hang, much memory, a file outside the model opened, code run, anything left
behind, or a character that means something to a terminal.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from attacks.make import GOOD_STATE, KINDS
from attacks.running import COMMANDS, check, job, names, run
from fuzz.targets import tiny_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

ATTACKS = Path(__file__).parent / "attacks"
REFUSED = {"quantize": {3}, "inspect": {3}, "verify": {1, 3}, "dequantize": {3}, "diff": {3}}
HARMLESS = {
    "quantize": {0, 3}, "inspect": {0}, "verify": {0, 1, 3}, "dequantize": {0, 3}, "diff": {0, 3}
}  # fmt: skip
EXPECTED = {
    "safetensors": REFUSED,
    "index": REFUSED,
    "config": REFUSED,
    "pipeline": REFUSED,
    # These are beside a finished output, which quantize refuses for being one.
    "state": {"inspect": {0}, "verify": {1}, "dequantize": {3}, "diff": {3}},
    "manifest": {"inspect": {0, 3}, "verify": {1}, "diff": {0}},
    "record": {"inspect": {0}, "verify": {1}, "dequantize": {0}},
}
VALID = {
    "safetensors/name-empty", "safetensors/name-is-a-path", "safetensors/name-is-python",
    "safetensors/name-turns-direction", "safetensors/name-with-escapes",
    "safetensors/name-with-newline", "safetensors/name-with-nul",
    "safetensors/shape-absurd-but-empty", "safetensors/name-is-a-regex",
    "safetensors/shape-10000-dimensions", "safetensors/keys-of-state-without-weight",
    "config/model-type-list", "config/model-type-escape", "config/layers-absurd",
    "config/quantized-with-a-list", "config/quantized-by-a-number", "config/fp8-of-nothing",
    "config/compressed-of-nothing", "config/fp8-with-groups",
}  # fmt: skip
"""Files that are in order by their format's rules: inspect shows them, nobody is hurt."""

SAYS = {
    "safetensors/duplicate-key": "twice in its header",
    "safetensors/name-too-long": "5,007 characters",
    "safetensors/name-is-a-regex": "may never finish",
    "safetensors/git-lfs": "Git LFS pointer",
    "safetensors/trailing-bytes": "not a complete safetensors file",
    "index/parent": "leads out of the directory",
    "index/absolute": "leads out of the directory",
    "index/backslash": "does not exist",
    "index/long-name": "does not exist",
    "index/a-directory": "no regular file",
    "index/a-fifo": "no regular file",
    "index/a-loop": "no regular file",
    "index/duplicate-key": "two different values",
    "index/escapes": r"\x1b[2J",
    "config/deep": "not valid JSON",
    "config/duplicate-key": "two different values",
    "config/fp8-of-nothing": "fmt",
    "config/compressed-of-nothing": "no weights",
    "config/layers-absurd": "layers",
    "pipeline/parent": "leads out of the directory",
    "pipeline/link-outside": "no directory of its own",
}
"""Words of the refusal by quantize."""


OUTPUTS = ("quantize", "dequantize")


def with_state(output: Path, blob: bytes) -> None:
    """Exchange the quantization state of one packed weight."""
    file = output / "model.safetensors"
    tensors = load_file(file)
    key = next(k for k in tensors if ".quant_state." in k)
    tensors[key] = torch.frombuffer(bytearray(blob), dtype=torch.uint8) if blob else torch.empty(
        0, dtype=torch.uint8
    )  # fmt: skip
    save_file(tensors, file, {"format": "pt"})
    (output / "nf4_manifest.json").unlink()


def prepare(place: Path, kind: str, data: bytes, llama: Path, packed: Path) -> None:
    """A model `m` in `place` with the attack in it, and something to be stolen beside it."""
    outside, model = place / "outside", place / "m"
    outside.mkdir(parents=True)
    (outside / "secret.safetensors").write_bytes(tiny_model())
    if kind in ("safetensors", "config"):
        shutil.copytree(llama, model)
        name = "model.safetensors" if kind == "safetensors" else "config.json"
        (model / name).write_bytes(data)
    elif kind == "index":
        model.mkdir()
        (model / "a.safetensors").write_bytes(tiny_model())
        (model / "directory.safetensors").mkdir()
        os.mkfifo(model / "fifo.safetensors")
        (model / "loop.safetensors").symlink_to("loop.safetensors")
        (model / "model.safetensors.index.json").write_bytes(data)
    elif kind == "state":
        shutil.copytree(packed, model)
        with_state(model, data)
    elif kind == "manifest":
        shutil.copytree(packed, model)
        os.mkfifo(model / "fifo")
        (model / "nf4_manifest.json").write_bytes(data)
    else:
        model.mkdir()
        shutil.copytree(packed, model / "unet")
        (model / "link-outside").symlink_to("../outside")
        (model / "loop.safetensors").symlink_to("loop.safetensors")
        index = {"_class_name": "X", "unet": ["diffusers", "UNet2DModel"]}
        (model / "model_index.json").write_text(json.dumps(index))
        name = "model_index.json" if kind == "pipeline" else "nf4_pipeline.json"
        (model / name).write_bytes(data)


@pytest.mark.parametrize("kind", KINDS)
def test_attack_files(kind, llama, llama_nf4, tmp_path):
    jobs, cases = [], []
    for file in sorted((ATTACKS / kind).iterdir()):
        place = tmp_path / file.name
        prepare(place, kind, file.read_bytes(), llama, llama_nf4)
        expected = HARMLESS if f"{kind}/{file.name}" in VALID else EXPECTED[kind]
        before = names(place)
        for command in EXPECTED[kind]:
            jobs.append(job(place, *COMMANDS[command]))
            cases.append((place, command, expected[command], before))
    for (place, command, codes, before), result in zip(cases, run(jobs, llama_nf4), strict=True):
        check(result, place, codes)
        out = f"out-{command}"
        assert (place / out).exists() == (result.code == 0 and command in OUTPUTS), result
        assert {n for n in names(place) if not n.startswith("out-")} == before, result
        if command == "quantize":
            assert SAYS.get(f"{kind}/{place.name}", "") in result.stderr, result.stderr


@pytest.mark.parametrize("kind", KINDS)
def test_the_files_are_what_the_program_makes(kind):
    made = KINDS[kind]()
    assert {f.name: f.read_bytes() for f in (ATTACKS / kind).iterdir()} == made
    assert {name.partition("/")[2] for name in (*VALID, *SAYS) if name.startswith(f"{kind}/")} <= (
        made.keys()
    )


def test_a_good_state_passes(llama_nf4, tmp_path):
    """The states are refused for what is wrong with them, not for being exchanged."""
    prepare(tmp_path / "a", "state", b"", llama_nf4, llama_nf4)
    shutil.rmtree(tmp_path / "a" / "m")
    shutil.copytree(llama_nf4, tmp_path / "a" / "m")
    with safe_open(llama_nf4 / "model.safetensors", "numpy") as file:
        key = next(k for k in file.keys() if ".quant_state." in k)  # noqa: SIM118
        good = json.loads(file.get_tensor(key).tobytes())
    assert good.keys() == GOOD_STATE.keys()
    with_state(tmp_path / "a" / "m", json.dumps(good).encode())
    assert run([job(tmp_path / "a", *COMMANDS["verify"])], llama_nf4)[0].code == 0
