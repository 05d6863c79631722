"""What the tests share: tiny checkpoints, a bitsandbytes oracle, the real command line."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import run_inside
from safetensors.torch import load_file, save_file

TORCH_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64,
    "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 512, "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6, "hidden_act": "silu", "tie_word_embeddings": False,
    "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "bfloat16",
}  # fmt: skip


def nightly_but(every_commit: Iterable[Any], cases: Iterable[Any]) -> list[Any]:
    """Return test parameters: the cases, of which all but some are left to scripts/nightly."""
    kept = list(every_commit)
    return [pytest.param(c, marks=[] if c in kept else pytest.mark.long) for c in cases]


def raw(values: torch.Tensor) -> np.ndarray:
    """The bytes of a tensor as the engines take them."""
    return values.contiguous().reshape(-1).view(torch.uint8).numpy().copy()


def hard_values(dtype: str, count: int, seed: int) -> torch.Tensor:
    """Every kind of float: normal, tiny, huge, subnormal, zeros of both signs, whole zero runs."""
    generator = np.random.default_rng(seed)
    width = np.uint32 if dtype == "F32" else np.uint16
    bits = generator.integers(0, np.iinfo(width).max, count, dtype=width, endpoint=True)
    values = torch.from_numpy(bits.view(np.int32 if dtype == "F32" else np.int16))
    x = values.view(TORCH_DTYPES[dtype]).clone()
    x[~torch.isfinite(x)] = 0.0
    magnitude = 10.0 ** generator.uniform(-42, 38, -(-count // 97))
    runs = torch.from_numpy(np.repeat(magnitude, 97)[:count])
    mild = (torch.from_numpy(generator.standard_normal(count)) * runs).to(x.dtype)
    mild[~torch.isfinite(mild)] = 0.0
    x = torch.where(torch.from_numpy(generator.random(count) < 0.8), mild, x)
    x[: count // 5] = 0.0
    x[count // 10 : count // 8] = -0.0
    return x


def bnb_quantize(
    weight: torch.Tensor, blocksize: int, quant_type: str
) -> tuple[np.ndarray, np.ndarray]:
    """(packed bytes, float32 absmax) by bitsandbytes' own default implementation."""
    packed, absmax = _default_kernels()["quantize_4bit"](weight, blocksize, quant_type, torch.uint8)
    return packed.reshape(-1).numpy(), absmax.numpy()


def bnb_nested(absmax: np.ndarray, offset: float) -> tuple[np.ndarray, np.ndarray]:
    """(codes, nested_absmax) of absmax - offset by bitsandbytes' default implementation."""
    from bitsandbytes.functional import create_dynamic_map

    values = torch.from_numpy(absmax) - torch.tensor(offset, dtype=torch.float32)
    codes, nested = _default_kernels()["quantize_blockwise"](values, create_dynamic_map(), 256)
    return codes.numpy(), nested.numpy()


def bnb_dequantize(
    packed: np.ndarray, absmax: np.ndarray, blocksize: int, quant_type: str, n: int, dtype: Any
) -> torch.Tensor:
    """n elements by bitsandbytes' default implementation (its CPU kernel fails at some shapes)."""
    with torch.compiler.set_stance("force_eager"):
        return _default_kernels()["dequantize_4bit"](
            torch.from_numpy(packed), torch.from_numpy(absmax), blocksize, quant_type, (n,), dtype
        )


@cache
def _default_kernels() -> dict[str, Any]:
    """bitsandbytes' pure torch implementations by operator name.

    On the CPU its dispatcher prefers native kernels, which take other codes here and there, so
    the module is executed once more with a registrar that only collects.
    """
    import bitsandbytes._ops as registry
    from bitsandbytes.backends.default import ops

    found: dict[str, Any] = {}

    def collect(name: str, backend: str) -> Any:
        def decorate(function: Any) -> Any:
            found[name.removeprefix("bitsandbytes::")] = function
            return function

        return decorate

    spec = importlib.util.spec_from_file_location(f"{ops.__package__}.collected", ops.__file__)
    assert spec is not None
    assert spec.loader is not None
    original, registry.register_kernel = registry.register_kernel, collect
    try:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    finally:
        registry.register_kernel = original
    return found


def llama_tensors(seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """Random weights of a two-layer Llama as `LLAMA` describes it."""
    generator = torch.Generator().manual_seed(seed)

    def matrix(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * 0.05).to(dtype)

    tensors = {"model.embed_tokens.weight": matrix(512, 64), "lm_head.weight": matrix(512, 64)}
    for layer in range(2):
        prefix = f"model.layers.{layer}."
        for name, shape in {
            "self_attn.q_proj": (64, 64), "self_attn.k_proj": (32, 64),
            "self_attn.v_proj": (32, 64), "self_attn.o_proj": (64, 64),
            "mlp.gate_proj": (128, 64), "mlp.up_proj": (128, 64), "mlp.down_proj": (64, 128),
        }.items():  # fmt: skip
            tensors[f"{prefix}{name}.weight"] = matrix(*shape)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{norm}.weight"] = torch.ones(64, dtype=dtype)
    tensors["model.norm.weight"] = torch.ones(64, dtype=dtype)
    return tensors


def write_checkpoint_dir(
    root: Path,
    tensors: dict[str, torch.Tensor],
    config: dict[str, Any] | None = None,
    shards: int = 1,
) -> Path:
    """A checkpoint as transformers lays it out, in one file or several with an index."""
    root.mkdir(parents=True, exist_ok=True)
    names = list(tensors)
    if shards == 1:
        save_file(tensors, root / "model.safetensors", {"format": "pt"})
    else:
        weight_map = {}
        for i in range(shards):
            file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
            part = {name: tensors[name] for name in names[i::shards]}
            save_file(part, root / file, {"format": "pt"})
            weight_map |= dict.fromkeys(part, file)
        index = {"metadata": {}, "weight_map": weight_map}
        (root / "model.safetensors.index.json").write_text(json.dumps(index))
    if config is not None:
        (root / "config.json").write_text(json.dumps(config, indent=2))
    return root


def read_all(root: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a directory, by the safetensors library."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(root.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def nf4(*arguments: object, cwd: Path | None = None) -> Any:
    """Run the command inside this process; returns what it printed and its exit code."""
    return run_inside(*arguments, cwd=cwd)


def nf4_process(*arguments: object, cwd: Path | None = None, **kwargs: Any) -> Any:
    """Run the installed command in a process of its own; command.py says which tests need one.

    Args:
        kwargs: of `subprocess.run`.
    """
    return subprocess.run(
        [Path(sys.executable).with_name("nf4"), *map(str, arguments)],
        capture_output=True, text=True, cwd=cwd, check=False, timeout=300, **kwargs,
    )  # fmt: skip


def nf4_ok(*arguments: object, cwd: Path | None = None, run: Callable[..., Any] = nf4) -> str:
    """Run the command, which must succeed; returns its stdout.

    Args:
        run: `nf4`, or `nf4_process`.
    """
    done = run(*arguments, cwd=cwd)
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def same_files(a: Path, b: Path, but: tuple[str, ...] = ()) -> bool:
    """Whether two directories hold the same files with the same bytes."""

    def content(root: Path) -> dict[str, bytes]:
        files = (p for p in root.rglob("*") if p.is_file() and p.name not in but)
        return {str(p.relative_to(root)): p.read_bytes() for p in files}

    return content(a) == content(b)


UP = "model.layers.0.mlp.up_proj.weight"
USAGE, INPUT, MACHINE = 2, 3, 4


def refused(
    code: int,
    *arguments: object,
    says: tuple[str, ...],
    cwd: Path,
    run: Callable[..., Any] = nf4,
) -> str:
    """Require that the command fails with `code` and leaves the working directory as it was.

    Args:
        says: what its message must contain.
        run: `nf4`, or `nf4_process`.

    Returns:
        what it said on stderr.
    """
    before = sorted(cwd.rglob("*"))
    done = run(*arguments, cwd=cwd)
    assert done.returncode == code, f"{done.returncode}: {done.stdout}{done.stderr}"
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    for words in says:
        assert words in done.stderr, done.stderr
    assert sorted(cwd.rglob("*")) == before
    return done.stderr


def full_tmpfs(size: str):
    """A tmpfs of `size` for a test, or a named skip where we may not mount."""
    mount = shutil.which("mount")
    if mount is None or os.geteuid() != 0:
        pytest.skip("a really full disk needs root, to mount a small tmpfs")
    return mount, size


def carry_out(plan, output, engine, resources, resume=False, progress=None):
    """Carry out the plan of a checkpoint, or of a model, by the library and not as a command.

    Returns:
        The manifest of a checkpoint.
    """
    from nf4cli.convert.listener import Listener
    from nf4cli.convert.write_model import Execution, write_model
    from nf4cli.planning.model_plan import ModelPlan

    listener = Listener()
    if progress is not None:
        listener.progress = progress
    model = plan if isinstance(plan, ModelPlan) else ModelPlan.of(plan)
    run = Execution(engine, resources, resume=resume, listener=listener)
    return write_model(model, output, run).get("")
