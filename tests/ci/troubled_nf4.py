"""nf4 on a machine with a fault: `python troubled_nf4.py full|slow ARGUMENTS`.

full: the disk is full when the eighth weight is quantized. slow: each weight takes 0.3 s.
"""

from __future__ import annotations

import errno
import itertools
import sys
import time
from typing import Any

from nf4cli.cli import main
from nf4cli.engines.cpu import CpuEngine

real = CpuEngine.quantize
count = itertools.count(1)


def full(*arguments: Any) -> Any:
    if next(count) == 8:
        raise OSError(errno.ENOSPC, "No space left on device")
    return real(*arguments)


def slow(*arguments: Any) -> Any:
    time.sleep(0.3)
    return real(*arguments)


CpuEngine.quantize = {"full": full, "slow": slow}[sys.argv.pop(1)]  # type: ignore[method-assign]
sys.argv[0] = "nf4"
main()
