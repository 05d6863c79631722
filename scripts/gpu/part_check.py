"""Part 1 of scripts/gpu_day: gpu_check.py, byte equality first, then each kernel's speed."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import sys
from pathlib import Path
from types import ModuleType

from report import ROOT, Part, main


def gpu_check() -> ModuleType:
    """Return the script as a module."""
    spec = importlib.util.spec_from_file_location("gpu_check", ROOT / "scripts" / "gpu_check.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_check"] = module  # its dataclasses look for it
    spec.loader.exec_module(module)
    return module


def emulate(library: Path) -> None:
    """Put an emulated GPU in the place of a real one, in this process."""
    from emulator.build import Kernels
    from emulator.device import EmulatedDevice

    from nf4cli.engines import cuda

    device = EmulatedDevice(Kernels(library))
    cuda.open_devices = lambda indices: [device]


def run(part: Part) -> None:
    sizes = ["--megabytes", "512", "--repeats", "15"]
    if part.emulated is not None:
        emulate(part.emulated)
        sizes = ["--check-elements", "65", "--elements", "65536", "--megabytes", "1",
                 "--repeats", "1"]  # fmt: skip
    found = part.work / "gpu_check.json"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        code = gpu_check().main([*sizes, "--json", str(found)])
    print(printed.getvalue(), flush=True)
    for line in printed.getvalue().splitlines():
        cells = line.strip("| ").split(" | ")
        if line.startswith("| ") and len(cells) == 2 and cells[0] != "what":
            part.report.row(cells[0], cells[1])
    if found.exists():
        part.report.figures(json.loads(found.read_text()))
    if code:
        part.report.failed("gpu_check.py", f"exit code {code}\n{printed.getvalue()[-15_000:]}")


if __name__ == "__main__":
    main(run)
