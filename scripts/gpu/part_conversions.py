"""Part 3 of scripts/gpu_day: conversions end to end, from the page cache.

The CUDA engine beside the CPU engine with 1 to 16 workers, the same bytes, and where the time goes.
"""

from __future__ import annotations

import filecmp
import json
import os
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

from report import Part, main
from running import Shape, llama
from running import run as run_command

SMALL, LARGE = Shape(2048, 8192, 16, 128_256, True), Shape(4096, 14_336, 32, 128_256, False)
TINY = Shape(64, 128, 2, 256, False)
REPEATS = 3
_ROOM_FOR_LARGE = 32_000_000_000  # bytes of disk, and of memory: source, output, page cache


class Conversions:
    """Conversions of one checkpoint.

    Args:
        name: of the checkpoint, for the table.
        outputs: a directory for them, on a file system in memory where there is room.
    """

    def __init__(self, part: Part, name: str, source: Path, outputs: Path) -> None:
        self._part, self._name, self._source, self._outputs = part, name, source, outputs
        self._nbytes = sum(p.stat().st_size for p in source.glob("*.safetensors"))
        self._count = 0
        self._reference: Path | None = None
        self._different: list[str] = []

    def convert(self, engine: str, workers: int, *options: str, keep: bool = False) -> Any:
        """Convert once; returns what converting.py and `nf4 --json` say of the time."""
        self._count += 1
        output = self._outputs / f"{self._count}-{engine}-{workers}"
        emulated = ["--emulate", self._part.emulated] if self._part.emulated else []
        done = run_command(
            self._part, sys.executable, Path(__file__).with_name("converting.py"), *emulated,
            *options, "--", "quantize", self._source, output, "--engine", engine,
            "--workers", workers, "--json", "--quiet",
        )  # fmt: skip
        document, spent = done.out.rstrip().rsplit("\n", 1)
        said = json.loads(document)
        self._compare(output, keep)
        return {**json.loads(spent), "seconds": said["seconds"], "command": done.seconds,
                "engine": said["engine"]}  # fmt: skip

    def _compare(self, output: Path, keep: bool) -> None:
        """Every file with the first output's; those of 1 GB and more by the digests in both."""
        if self._reference is None:
            self._reference = output
            return
        names = sorted(p.name for p in self._reference.iterdir())
        if names != sorted(p.name for p in output.iterdir()):
            self._different.append(output.name)
        for name in names:
            whole = keep or not name.endswith(".safetensors")
            a, b = self._reference / name, output / name
            if a.stat().st_size != b.stat().st_size or (whole and not filecmp.cmp(a, b, False)):
                self._different.append(f"{output.name}/{name}")
        shutil.rmtree(output)

    def speeds(self, engines: tuple[str, ...], workers: tuple[int, ...], repeats: int) -> None:
        """Time every engine with every number of workers, in turn."""
        found: dict[str, list[Any]] = {}
        for turn in range(repeats):
            for count in workers:
                for engine in engines:
                    with self._part.report.step(f"{self._name}, {engine}, {count} workers"):
                        # every byte is compared once for each, then the manifests' digests
                        figures = self.convert(engine, count, keep=turn == 0)
                        found.setdefault(f"{engine} {count}", []).append(figures)
            self._part.report.figures({self._name: found})
        for engine in engines:
            rates = []
            for count in workers:
                runs = found.get(f"{engine} {count}", [])
                if runs:
                    seconds = statistics.median(r["seconds"] for r in runs)
                    rates.append(f"{count}: {seconds:.2f} s, {self._nbytes / seconds / 1e9:.2f}")
            title = f"{self._name}, {self._nbytes / 1e9:.2f} GB, `--engine {engine}`, by workers"
            self._part.report.row(title, "; ".join(rates) + " GB/s")
        same = "DIFFERENT" if self._different else "the same"
        self._part.report.row(f"{self._name}: bytes of all outputs", same)
        if self._different:
            self._part.report.failed(f"{self._name}: outputs differ", "\n".join(self._different))

    def shares(self, engine: str, workers: int, *options: str) -> None:
        """Say where the time of one conversion goes."""
        figures = self.convert(engine, workers, *options)
        seconds, spent = figures["seconds"], figures["wall"]
        parts = sorted(spent.items(), key=lambda item: -item[1])
        told = ", ".join(f"{label} {value:.2f} s" for label, value in parts)
        apart = ", each copy and kernel waited for" if options else ""
        title = f"{self._name}, `--engine {engine}`, {workers} workers{apart}: time of the threads"
        self._part.report.row(title, f"{told}; by the wall {seconds:.2f} s of {workers} threads")
        self._part.report.figures({f"{self._name} {engine} {workers} {' '.join(options)}": figures})


def warm(root: Path) -> None:
    """Read a checkpoint once, so that it is in the page cache."""
    for path in root.glob("*.safetensors"):
        with path.open("rb", buffering=0) as file:
            while file.read(1 << 24):
                pass


def room_for_large(part: Part) -> str:
    """Return what the machine lacks for the large checkpoint, "" for nothing."""
    disk = shutil.disk_usage(part.work).free
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if part.dry:
        return "a dry run"
    if min(disk, memory) < _ROOM_FOR_LARGE:
        return f"{disk / 1e9:.0f} GB of disk and {memory / 1e9:.0f} GB of memory are too little"
    return ""


def outputs_of(part: Part, need: int) -> Path:
    """Return a directory for outputs: in memory where there is room, else beside the rest."""
    shared = Path("/dev/shm")
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if shared.is_dir() and shutil.disk_usage(shared).free > 3 * need and memory > 12 * need:
        return shared / f"nf4-gpu-day-{os.getpid()}"
    return part.work / "outputs"


def measure(part: Part, name: str, shape: Shape, workers: tuple[int, ...], repeats: int) -> None:
    source = llama(part.work / "model", shape)
    nbytes = sum(p.stat().st_size for p in source.glob("*.safetensors"))
    outputs = outputs_of(part, nbytes)
    outputs.mkdir(parents=True, exist_ok=True)
    try:
        warm(source)
        part.report.figures({f"{name} outputs on": str(outputs.parent)})
        conversions = Conversions(part, name, source, outputs)
        conversions.speeds(("cuda", "cpu"), workers, repeats)
        for engine in ("cuda", "cpu"):
            for count in (1, workers[-1]):
                with part.report.step(f"{name}: where the time goes, {engine}, {count} workers"):
                    conversions.shares(engine, count)
        with part.report.step(f"{name}: copies and kernels apart"):
            conversions.shares("cuda", 1, "--apart")
    finally:
        shutil.rmtree(outputs, ignore_errors=True)
        shutil.rmtree(source, ignore_errors=True)


def run(part: Part) -> None:
    if part.dry:
        measure(part, "tiny", TINY, (1, 2), 1)
    else:
        with part.report.step("1B-shaped"):
            measure(part, "1B-shaped", SMALL, (1, 2, 4, 8, 16), REPEATS)
    lacking = room_for_large(part)
    if lacking:
        part.report.row("8B-shaped, 16 GB", f"not converted: {lacking}")
    else:
        measure(part, "8B-shaped", LARGE, (4, 16), 1)


if __name__ == "__main__":
    main(run)
