"""What the tests of hostile input share: command lines run by runner.py, and what must hold."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

RUNNER = Path(__file__).with_name("runner.py")
MEMORY = 300_000_000  # bytes; an interpreter with NumPy has 60 to 70 million of them
CPU = ("--engine", "cpu", "--workers", "1")
COMMANDS = {
    "quantize": ("quantize", "m", "out-quantize", *CPU),
    "inspect": ("inspect", "m"),
    "verify": ("verify", "m", *CPU),
    "dequantize": ("dequantize", "m", "out-dequantize", *CPU),
    "diff": ("diff", "m", "m", *CPU),
}


class Result(NamedTuple):
    code: int
    stdout: str
    stderr: str
    peak: int
    seconds: float


def run(jobs: Sequence[dict[str, Any]], good: Path) -> list[Result]:
    """The results of command lines, run by two processes; `good` is a good output."""
    halves = jobs[: len(jobs) // 2], jobs[len(jobs) // 2 :]
    processes = [
        subprocess.Popen(
            [sys.executable, RUNNER, good], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True, env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
        )
        for _ in halves
    ]  # fmt: skip
    for process, half in zip(processes, halves, strict=True):
        process.stdin.write(json.dumps(half))
        process.stdin.close()
    results = [Result(**result) for p in processes for result in json.load(p.stdout)]
    assert [p.wait() for p in processes] == [0, 0]
    return results


def job(place: Path, *arguments: str) -> dict[str, Any]:
    (place / "outside").mkdir(exist_ok=True)
    return {"cwd": str(place), "arguments": arguments, "outside": str(place / "outside")}


def check(result: Result, place: Path, codes: set[int], memory: int = MEMORY) -> None:
    shown = f"{place.name}: {result.code}, {result.peak:,} bytes\n{result.stdout}\n{result.stderr}"
    assert result.code in codes, shown
    assert "Traceback" not in result.stderr, shown
    assert "OPENED" not in result.stderr, shown
    text = result.stdout + result.stderr
    assert all(c.isprintable() for c in text if c != "\n"), shown
    assert sum(line.startswith("error:") for line in result.stderr.splitlines()) <= 1, shown
    assert result.peak < memory, shown
    assert result.seconds < 20, shown


def names(place: Path) -> set[str]:
    return {str(p.relative_to(place)) for p in place.rglob("*")}
