"""Uses wheels: one as a whole in a new environment, the libraries of others without Python."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from building import ZIG, run
from checking import must
from platforms import Platform

HERE = Path(__file__).resolve().parent
FLAGS = {
    "avx2": {"avx2", "fma", "bmi2"},
    "avx512": {"avx512bw", "avx512cd", "avx512dq", "avx512vl"},
}
"""Instruction set -> what Linux calls the features of a processor that runs it."""
MODEL = """
import json, pathlib, sys
import numpy as np
from safetensors.numpy import save_file
from nf4cli.engines import cpu
place = pathlib.Path(sys.argv[1])
values = np.random.default_rng(1).standard_normal((512, 512), np.float32)
(place / "model").mkdir()
save_file({"model.layers.0.self_attn.q_proj.weight": values}, place / "model/model.safetensors")
(place / "model/config.json").write_text(json.dumps({"model_type": "llama"}))
packed, absmax = np.empty(values.size // 2, np.uint8), np.empty(values.size // 64, np.float32)
engine = cpu.CpuEngine()
engine.quantize(values.reshape(-1).view(np.uint8), "F32", 64, "nf4", packed, absmax)
(place / "codebook").write_bytes(bytes(cpu._c_codebook("nf4")))
for name, array in (("values", values), ("packed", packed), ("absmax", absmax)):
    array.tofile(place / name)
"""
"""Writes a model, and what the engine makes of its values for `call_library` to compare with."""


def use_wheel(wheel: Path, place: Path) -> str:
    """Install a wheel where there is no compiler, then convert and verify a model with it.

    Args:
        wheel: for this machine.
        place: an existing directory; gets `model`, and the files that `call_library` reads.

    Returns:
        What `nf4 --version` prints.

    Raises:
        SystemExit: a command failed.
    """
    run(sys.executable, "-m", "venv", place / "venv")
    programs = place / "venv" / "bin"
    alone = {"PATH": str(programs), "PYTHONPATH": "", "CXX": "", "HF_HUB_OFFLINE": "1"}
    pip = (programs / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    run(*pip, "--only-binary", ":all:", wheel, **alone)
    version = run(programs / "nf4", "--version", **alone).strip()
    run(programs / "python", "-I", "-c", MODEL, place, **alone)
    run(programs / "nf4", "quantize", place / "model", place / "out", **alone)
    run(programs / "nf4", "verify", place / "out", "--source", place / "model", **alone)
    return version


def call_library(library: Path, platform: Platform, made: Path, place: Path) -> list[str] | None:
    """Quantize with a wheel's library from a C program, and compare the bytes.

    Args:
        library: the library.
        platform: what it was built for.
        made: the directory that `use_wheel` got.
        place: a new directory.

    Returns:
        The instruction sets that were run; None if nothing here runs such programs.

    Raises:
        SystemExit: the library cannot be opened, or its bytes are others.
    """
    if platform.runner is None or (platform.runner and not shutil.which(platform.runner[0])):
        return None
    place.mkdir(parents=True)
    for name in ("codebook", "values"):
        shutil.copy(made / name, place / name)
    program = place / "call"
    run(ZIG, "cc", "-target", platform.zig, "-O1", "-o", program, HERE / "call.c", "-ldl",
        *(["-dynamic"] if "musl" in platform.zig else []))  # fmt: skip
    done = subprocess.run(
        [*platform.runner, program, library, place], env={"PATH": os.environ["PATH"]},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    must(done.returncode == 0, f"{platform.tag}: {done.stdout}{done.stderr}")
    isas = done.stdout.split()
    must("generic" in isas, f"{platform.tag} ran nothing")
    # Where the compiler's own question for a processor's features always says no: plain loops.
    flags = set(Path("/proc/cpuinfo").read_text().split())
    for isa, features in FLAGS.items():
        held = f"nf4_can_run_{isa}".encode() in library.read_bytes()
        must(not held or features - flags or isa in isas, f"{platform.tag} does not run its {isa}")
    for isa in isas:
        for name in ("packed", "absmax"):
            same = (place / f"{name}-{isa}").read_bytes() == (made / name).read_bytes()
            must(same, f"{platform.tag}, {isa}: {name} has other bytes")
    return isas
