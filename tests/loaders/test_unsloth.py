"""unsloth's own code for experts in 4 bit, over the transformers that it asks for, on a CPU."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import nf4_ok, nightly_but
from text_models import make

pytestmark = pytest.mark.loaders

HERE = Path(__file__).parent.parent
_BESIDE = HERE.parent / ".venv-unsloth" / "bin" / "python"
PYTHON = Path(os.environ.get("NF4_UNSLOTH_PYTHON") or _BESIDE)
CASES = {
    **{name: (name, "--target", "unsloth") for name in (
        "qwen3_moe", "mixtral", "qwen2_moe", "deepseek_v3", "glm4_moe", "gpt_oss",
    )},
    **{f"{name} for vLLM": (name, "--target", "vllm") for name in (
        "qwen3_moe", "mixtral", "qwen2_moe", "deepseek_v3",
    )},
    "qwen2_moe, plain scales": ("qwen2_moe", "--target", "unsloth", "--no-double-quant"),
    "qwen3_moe by a recipe": ("qwen3_moe", "--target", "unsloth", "--recipe", "recipe.toml"),
    "qwen3_moe, a layer kept": ("qwen3_moe", "--target", "unsloth", "--keep", "layers.1.mlp"),
}  # fmt: skip


RECIPE = """recipe = 1
[default]
blocksize = 64
double_quant = true
[[format]]
blocksize = 32
double_quant = true
modules = ["layers.0.mlp.experts", "q_proj"]
[[format]]
blocksize = 64
double_quant = false
modules = ["layers.1.mlp.experts", "k_proj"]
"""
LATER = ("glm4_moe", "mixtral for vLLM", "qwen2_moe for vLLM", "qwen2_moe, plain scales")
"""Cases for scripts/nightly."""


@pytest.fixture(scope="module")
def found(tmp_path_factory, pytestconfig) -> dict[str, dict[str, Any]]:
    if not PYTHON.is_file():
        pytest.skip(f"no environment with unsloth_zoo at {PYTHON}: scripts/test makes one")
    root, jobs = tmp_path_factory.mktemp("unsloth"), {}
    (root / "recipe.toml").write_text(RECIPE)
    for case, (name, *options) in CASES.items():
        if case in LATER and not pytestconfig.getoption("--long"):
            continue
        source, out, back = root / "src" / name, root / case / "out", root / case / "back"
        out.parent.mkdir(exist_ok=True)
        if not source.joinpath("config.json").exists():
            make(name, source, torch.bfloat16)
        nf4_ok("quantize", source, out, "-q", *options, cwd=root)
        nf4_ok("dequantize", out, back, "-q")
        jobs[case] = [str(out), str(back)]
    done = subprocess.run(  # in a directory of its own: unsloth writes compiled code into it
        [PYTHON, HERE / "unsloth_worker.py", json.dumps(jobs)], cwd=root,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert not done.returncode, done.stderr[-3000:]
    answer: dict[str, dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return answer


@pytest.mark.parametrize("case", nightly_but(CASES.keys() - LATER, CASES))
def test_unsloth_holds_every_weight_exactly(found, case):
    seen = found[case]
    assert not seen["wrong"]
    assert seen["packed"] > 0
    assert seen["largest"] == 0
    assert seen["logprobs"] < 0.1
    name, *_ = CASES[case]
    stacks = {"deepseek_v3": 2, "glm4_moe": 2, "gpt_oss": 0, "qwen3_moe, a layer kept": 2}
    assert seen["stacks"] == stacks.get(case, stacks.get(name, 4))
