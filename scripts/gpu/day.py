"""Learn all there is to learn on a machine with a GPU, in one command and offline.

    scripts/gpu_wheels             # beforehand, where there is a network
    scripts/gpu_day OUT            # on the machine, at most 25 minutes

It makes an environment of its own from the wheels and this checkout and runs five parts, the most
valuable first, each a process that is ended at its limit. OUT then holds gpu_day.json, gpu_day.md
(a table for docs/measurements.md) and gpu_day.log (what failed, and how). A part can be run by
itself: `--parts check,tests`, then `--parts conversions` with the same OUT adds to what is there.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import environment

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
LIMITS = {"check": 150, "tests": 210, "conversions": 360, "bitsandbytes": 150, "calibration": 540}
"""Seconds of each part, in order; with the environment they are less than 25 minutes.

On an H200 with 16 cores they took 48, 67, 229, 49 and more than 240 seconds."""
_LEAST = 20  # seconds: with fewer left a part is not begun
_LOG = 200_000  # bytes of a part's output that are kept where it failed
TITLES = {
    "check": "Bytes, and the kernels' speed",
    "tests": "Tests on the device",
    "conversions": "Conversions from the page cache",
    "bitsandbytes": "bitsandbytes' own CUDA kernels",
    "calibration": "Calibration",
}


@dataclass(frozen=True)
class Day:
    """What is asked for.

    Attributes:
        out: for the three files.
        work: for the environment and the models.
        python: runs the parts.
        emulated: a library of emulated kernels, for the dry run.
        deadline: time.monotonic() at which everything must be over.
    """

    out: Path
    work: Path
    python: Path
    emulated: Path | None
    deadline: float

    @property
    def file(self) -> Path:
        return self.out / "gpu_day.json"

    def found(self) -> dict[str, Any]:
        """Return what is known so far, of earlier calls as well."""
        try:
            known: dict[str, Any] = json.loads(self.file.read_text())
        except (OSError, ValueError):
            known = {}
        return {"machine": {}, "parts": {}, **known}

    def keep(self, found: dict[str, Any]) -> None:
        """Write the three files."""
        fresh = self.file.with_suffix(".new")
        fresh.write_text(json.dumps(found, indent=1) + "\n")
        os.replace(fresh, self.file)  # noqa: PTH105 - what Path.replace does, said plainly
        self.file.with_suffix(".md").write_text(table(found))
        self.file.with_suffix(".log").write_text(failures(found))


def table(found: dict[str, Any]) -> str:
    """Return the Markdown table of all parts."""
    machine = found["machine"]
    lines = [f"{machine.get('gpu') or 'no GPU'}; {machine.get('cores')} cores", ""]
    lines += ["| what | measured |", "|---|---|"]
    for name, title in TITLES.items():
        part = found["parts"].get(name)
        if part is not None:
            lines.append(f"| **{title}** | {part['status']}, {part['seconds']:.0f} s |")
            lines += [f"| {what} | {measured} |" for what, measured in part["rows"]]
    return "\n".join(lines) + "\n"


def failures(found: dict[str, Any]) -> str:
    """Return the log of what failed."""
    lines: list[str] = [f"machine: {json.dumps(found['machine'], indent=1)}"]
    for name, part in found["parts"].items():
        for failure in part["failures"]:
            lines += ["", f"=== {name}: {failure['what']}", failure["detail"]]
        if part["log"]:
            lines += ["", f"=== {name}: the end of its output", part["log"]]
    return "\n".join(lines) + "\n"


def run_part(day: Day, name: str, limit: float) -> dict[str, Any]:
    """Run one part in a process group of its own, ended at its limit; returns what it found."""
    report, log = day.work / f"{name}.json", day.work / f"{name}.log"
    report.unlink(missing_ok=True)
    command = [str(day.python), str(HERE / f"part_{name}.py"), str(report), str(day.work / name),
               str(limit)]  # fmt: skip
    if day.emulated is not None:
        command += ["--emulate", str(day.emulated)]
    variables = environment.variables(day.python.parent)
    variables |= {
        "XDG_CACHE_HOME": str(day.work / "cache"), "HF_HOME": str(day.work / "hub"),
        "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1",
    }  # fmt: skip
    start = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            env=variables, preexec_fn=os.setpgrp,  # noqa: PLW1509 - no threads here
        )  # fmt: skip
        try:
            code = process.wait(limit)
            status = "done" if code == 0 else "not all of it succeeded"
        except subprocess.TimeoutExpired:
            code, status = None, f"ended at its limit of {limit:.0f} s"
        finally:
            end_group(process)
    try:
        found = json.loads(report.read_text())
    except (OSError, ValueError):
        found = {"rows": [], "figures": {}, "failures": []}
        status = f"failed at once, exit code {code}"
    for left in (day.work / name, Path(f"/dev/shm/nf4-gpu-day-{process.pid}")):
        shutil.rmtree(left, ignore_errors=True)  # of a part that was ended in the middle
    said = log.read_bytes()[-_LOG:].decode(errors="replace")
    return {"status": status, "seconds": round(time.monotonic() - start, 1), **found,
            "log": "" if code == 0 else said}  # fmt: skip


def end_group(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def machine(day: Day) -> dict[str, Any]:
    """Return what the machine is, and what it has installed."""
    found: dict[str, Any] = {"cores": os.cpu_count(), "python": sys.version.split()[0]}
    found["memory"] = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            found["processor"] = line.partition(":")[2].strip()
            break
    for key, command in (
        ("gpu", ["nvidia-smi", "--query-gpu=name,memory.total,driver_version",
                 "--format=csv,noheader"]),
        ("nvcc", ["nvcc", "--version"]),
        ("packages", [str(day.python), "-c", environment.CHECK]),
    ):  # fmt: skip
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
            found[key] = done.stdout.strip() or done.stderr.strip()[-2000:]
        except (OSError, subprocess.TimeoutExpired) as error:
            found[key] = "" if key == "gpu" else str(error)
    with suppress(ValueError):
        found["packages"] = json.loads(found["packages"])
    return found


def prepared(options: argparse.Namespace, work: Path) -> Path:
    """Return the interpreter for the parts; its environment is made at the first call only."""
    if options.here:
        return Path(sys.executable)
    place = work / "environment"
    if (place / ".complete").exists():
        return place / "bin" / "python"
    wheels = sorted(options.wheels.glob("*.whl"))
    if not wheels:
        print(f"note: no wheels in {options.wheels} (scripts/gpu_wheels)", file=sys.stderr)
    python = environment.make(place, wheels, ROOT)
    (place / ".complete").touch()
    return python


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/gpu_day", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("out", type=Path, nargs="?", default=Path("gpu-day"))
    parser.add_argument(
        "--wheels", type=Path, default=ROOT / ".gpu-wheels", help="default: .gpu-wheels"
    )
    parser.add_argument("--parts", default=",".join(LIMITS), help="default: all, in this order")
    parser.add_argument("--minutes", type=float, default=25, help="for all of them; default: 25")
    parser.add_argument("--work", type=Path, help="for what is large; default: OUT.work")
    parser.add_argument(
        "--here", action="store_true", help="with the packages that this Python has"
    )
    parser.add_argument(
        "--emulate", type=Path, metavar="LIBRARY", help="the dry run that the tests make"
    )
    options = parser.parse_args()
    options.parts = options.parts.split(",")
    unknown = [name for name in options.parts if name not in LIMITS]
    if unknown:
        parser.error(f"no part is called {unknown[0]}: they are {', '.join(LIMITS)}")
    return options


def main() -> int:
    options = arguments()
    deadline = time.monotonic() + 60 * options.minutes - 5
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the part that runs is ended as well
    out = options.out.resolve()
    work = (options.work or out.with_name(out.name + ".work")).resolve()
    for directory in (out, work):
        directory.mkdir(parents=True, exist_ok=True)
    try:
        python = prepared(options, work)
    except Exception:  # said where the results would be, which may be all that comes back
        (out / "gpu_day.log").write_text(traceback.format_exc())
        traceback.print_exc()
        return 1
    day = Day(out, work, python, options.emulate, deadline)
    found = day.found()
    found["machine"] = machine(day)
    day.keep(found)
    packages = found["machine"]["packages"]
    for line in packages["wrong"] if isinstance(packages, dict) else [packages]:
        print(f"note: {line}", file=sys.stderr)
    for name in options.parts:
        limit = min(LIMITS[name], deadline - time.monotonic())
        if limit < _LEAST:
            found["parts"].setdefault(name, {
                "status": "not begun: no time was left", "seconds": 0, "rows": [], "figures": {},
                "failures": [], "log": "",
            })  # fmt: skip
        else:
            print(f"{name}: at most {limit:.0f} s ...", file=sys.stderr, flush=True)
            found["parts"][name] = run_part(day, name, limit)
        day.keep(found)
    print(table(found))
    return 0 if all(found["parts"][name]["status"] == "done" for name in options.parts) else 1


if __name__ == "__main__":
    sys.exit(main())
