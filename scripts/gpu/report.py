"""What a part of scripts/gpu_day found: kept on the disk after every step, whatever comes next."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent


class Report:
    """Rows for a table, figures for JSON, and what failed.

    Args:
        path: the file that holds them, written anew with every change.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._rows: list[tuple[str, str]] = []
        self._figures: dict[str, Any] = {}
        self.failures: list[dict[str, str]] = []
        self._save()

    def row(self, what: str, measured: str) -> None:
        """Add a row to the table."""
        print(f"{what}: {measured}", flush=True)
        self._rows.append((what, measured))
        self._save()

    def figures(self, values: Mapping[str, Any]) -> None:
        """Add figures to the JSON document."""
        self._figures |= values
        self._save()

    def failed(self, what: str, detail: str) -> None:
        """Note that something failed, and what was said."""
        print(f"FAILED {what}\n{detail}", flush=True)
        self.failures.append({"what": what, "detail": detail[-20_000:]})
        self._save()

    @contextmanager
    def step(self, what: str) -> Iterator[None]:
        """Run a step; where it fails this is noted, and the next one begins all the same."""
        started = time.perf_counter()
        try:
            yield
        except Exception:
            self.failed(what, traceback.format_exc())
        print(f"({what}: {time.perf_counter() - started:.1f} s)", flush=True)

    def _save(self) -> None:
        document = {"rows": self._rows, "figures": self._figures, "failures": self.failures}
        fresh = self._path.with_suffix(".new")
        fresh.write_text(json.dumps(document, indent=1) + "\n")
        os.replace(fresh, self._path)  # noqa: PTH105 - what Path.replace does, said plainly


@dataclass(frozen=True)
class Part:
    """What a part is given.

    Attributes:
        report: takes what it finds.
        work: a directory for its files.
        emulated: a library of emulated kernels in place of a GPU, for the dry run.
        deadline: time.monotonic() at which it will be ended.
    """

    report: Report
    work: Path
    emulated: Path | None
    deadline: float

    @property
    def dry(self) -> bool:
        """Whether this is the dry run, in which everything is small."""
        return self.emulated is not None

    @property
    def left(self) -> float:
        """Seconds until the part is ended."""
        return self.deadline - time.monotonic()

    @property
    def device(self) -> str:
        """Where torch computes."""
        return "cpu" if self.dry else "cuda"

    def nf4(self) -> list[str]:
        """Return the command that runs nf4, on an emulated GPU in the dry run."""
        if self.emulated is None:
            return [sys.executable, "-m", "nf4cli"]
        return [sys.executable, "-m", "emulator.cli", str(self.emulated), "1", str(1 << 30)]


def main(run: Callable[[Part], None]) -> None:
    """Run a part as a program: REPORT WORK SECONDS [--emulate LIBRARY]; 1 says that it failed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("report", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("seconds", type=float)
    parser.add_argument("--emulate", type=Path)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    # The tests' emulated GPU and models.
    sys.path.insert(0, str(ROOT / "tests"))
    part = Part(
        Report(options.report), options.work, options.emulate, time.monotonic() + options.seconds
    )
    with part.report.step("the part as a whole"):
        run(part)
    sys.exit(1 if part.report.failures else 0)
