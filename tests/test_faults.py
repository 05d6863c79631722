"""scripts/faults.py, shortened: every kind of fault, and 5 + 5 runs that are killed.

scripts/nightly makes hundreds.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.skipif(sys.platform != "linux", reason="faults come from a preloaded library of Linux")
def test_nothing_is_lost_whatever_happens():
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "faults.py",
         "--kills", "5", "--points", "5", "--others", "1", "--megabytes", "30"],
        capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| kill -9 at a random moment | 5 | 5 |" in done.stdout
