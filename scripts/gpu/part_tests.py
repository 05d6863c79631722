"""Part 2 of scripts/gpu_day: the CUDA engine's tests on the real device, and compute-sanitizer."""

from __future__ import annotations

import shutil
import sys
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path

from report import Part, main
from running import run as run_command

FILES = (
    "engines/test_cuda_kernels.py", "engines/test_cuda_engine.py", "engines/test_cupy_device.py",
    "test_gpu_check.py", "engines/test_engines.py", "engines/test_cuda_cli.py",
    "engines/test_scale_search.py", "engines/test_cuda_machine_code.py",
    "engines/test_cuda_missing.py", "engines/test_cuda_mutations.py",
)  # fmt: skip
"""Of tests/, where the command runs."""
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
SANITIZED = (
    "quantize<2, 2, 1", "quantize<3, 2, 1", "dequantize<2", "nested_quantize", "search_scales<2, 1",
)  # fmt: skip
"""A kernel of every shape, as test_cuda_kernels.py has them."""


def tests(part: Part) -> None:
    junit = part.work / "junit.xml"
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "--junit-xml", junit, "-o",
               "junit_family=xunit2", "--timeout", "120", "-p", "no:cacheprovider"]  # fmt: skip
    if part.dry:
        command += ["engines/test_cuda_engine.py", "-k", "names_its_devices"]
    else:
        command += ["--real-gpu", "-n", "4", "--dist", "loadfile", *FILES]
    error, limit = "", 0.55 * part.left
    try:  # the session ends itself, so that its report is written
        run_command(part, *command, "--session-timeout", limit, seconds=limit + 60)
    except Exception as raised:  # red tests, or no time left: what was reported counts all the same
        error = str(raised)
    summarize(part, junit, error)


def summarize(part: Part, junit: Path, error: str) -> None:
    """Report what a JUnit file says of each test."""
    outcomes: Counter[str] = Counter()
    why: Counter[str] = Counter()
    if junit.exists():
        for case in ET.parse(junit).getroot().iter("testcase"):
            kinds = [c for c in case if c.tag in ("failure", "error", "skipped")]
            kind = kinds[0].tag if kinds else "passed"
            outcomes[kind] += 1
            if kind in ("failure", "error"):
                name = f"{case.get('classname')}::{case.get('name')}"
                part.report.failed(name, kinds[0].text or kinds[0].get("message") or "")
            elif kind == "skipped":
                why[kinds[0].get("message") or "no reason"] += 1
    told = ", ".join(f"{count:,} {kind}" for kind, count in sorted(outcomes.items())) or "none ran"
    where = "the emulated device" if part.dry else "the real device"
    part.report.row(f"tests of the CUDA engine on {where}", told)
    part.report.figures({"tests": dict(outcomes), "skipped": dict(why)})
    if error and not (outcomes["failure"] or outcomes["error"]):
        part.report.failed("pytest", error)


def sanitizers(part: Part) -> None:
    program = shutil.which("compute-sanitizer")
    if program is None or part.dry:
        part.report.row("compute-sanitizer", "not run: a dry run" if part.dry else "not here")
        return
    parts = [word for name in SANITIZED for word in ("--kernel", name)]
    for tool in TOOLS:
        with part.report.step(f"compute-sanitizer {tool}"):
            done = run_command(
                part, program, "--tool", tool, "--error-exitcode", "9", sys.executable, "-m",
                "emulator.exercise", "gpu", "--quick", *parts, seconds=60,
            )  # fmt: skip
            lines = done.out.strip().splitlines()
            summary = next((x for x in reversed(lines) if "SUMMARY:" in x), "no summary")
            checks = next((x for x in lines if x.endswith(" checks")), "")
            found = summary.rpartition("=========")[2].strip()
            part.report.row(f"compute-sanitizer {tool}", f"{found}; {checks}")


def run(part: Part) -> None:
    tests(part)
    sanitizers(part)


if __name__ == "__main__":
    main(run)
