"""Commands that the parts of scripts/gpu_day run, and the models that they run on."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from report import ROOT, Part


@dataclass(frozen=True)
class Done:
    """A command that succeeded.

    Attributes:
        seconds: by the wall.
        peak: bytes of memory, of this command or of a larger one before it in this process.
    """

    out: str
    err: str
    seconds: float
    peak: int


def run(part: Part, *command: object, seconds: float = 600) -> Done:
    """Run a command in the tests' directory.

    Args:
        seconds: that it may take, or what is left to the part if that is less.

    Raises:
        RuntimeError: it failed; the message holds the end of what it said.
        subprocess.TimeoutExpired: it took longer.
    """
    words = list(map(str, command))
    paths = [str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip
    start = time.perf_counter()
    done = subprocess.run(
        words, capture_output=True, text=True, check=False, env=environment,
        cwd=ROOT / "tests", timeout=max(1, min(seconds, part.left - 5)),
    )  # fmt: skip
    wall = time.perf_counter() - start
    if done.returncode:
        said = done.stdout[-4000:] + done.stderr[-12_000:]
        raise RuntimeError(f"exit code {done.returncode} of {' '.join(words)}\n{said}")
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    return Done(done.stdout, done.stderr, wall, peak)


def nf4(part: Part, *arguments: object, seconds: float = 600) -> Done:
    """Run an nf4 command; see `run`."""
    return run(part, *part.nf4(), *arguments, seconds=seconds)


def last_json(text: str) -> Any:
    """Return the JSON document in the last line of a program's output."""
    return json.loads(text.strip().splitlines()[-1])


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama with 32 heads, and whether its embeddings are tied."""

    hidden: int
    intermediate: int
    layers: int
    vocabulary: int
    tied: bool


def llama(root: Path, shape: Shape) -> Path:
    """Write a checkpoint of random bf16 weights."""
    sys.path.insert(0, str(ROOT / "scripts"))
    import bench_convert

    shutil.rmtree(root, ignore_errors=True)
    numbers = (
        shape.hidden, shape.intermediate, shape.layers, shape.vocabulary, shape.hidden // 4,
        int(shape.tied), 0,
    )  # fmt: skip
    return bench_convert.make(root, *numbers)


def fresh(path: Path) -> Path:
    """Return a path where nothing is (any more)."""
    shutil.rmtree(path, ignore_errors=True)
    return path
