"""The names of all kernels of cuda/gpu_kernels.cu, as C++ writes them."""

from __future__ import annotations

import itertools

from nf4cli.engines.launches import CODE_SOURCES, STEPS
from nf4cli.engines.protocol import DTYPE_CODES

_FLAGS = ("false", "true")
_NEEDED = ("fold_errors", "measure_blocks", "widest_of_runs")
"""Kernels that run before or after others."""
SAMPLE_PARTS = (
    "quantize<2, 2, 1",
    "quantize<3, 2, 1",
    "quantize<0, 0, 2",
    "nested_quantize",
    "dequantize<2",
    "search_scales<2, 1",
)
"""Parts of the names of a kernel of every shape; the others differ in a constant or a
conversion."""


def every_kernel() -> tuple[str, ...]:
    """Return the names of all kernels there are."""
    kinds = [(d, d, tail) for d in DTYPE_CODES.values() for tail in _FLAGS]
    kinds += [(c, d, "false") for c in CODE_SOURCES.values() for d in DTYPE_CODES.values()]
    return (
        "fold_errors",
        *(f"nested_quantize<{tail}>" for tail in _FLAGS),
        *(f"dequantize<{d}, {nested}>" for d in DTYPE_CODES.values() for nested in _FLAGS),
        *(
            f"quantize<{source}, {to}, {steps}, {small}, {tail}>"
            for source, to, tail in kinds
            for steps in STEPS.values()
            for small in _FLAGS
        ),
        "widest_of_runs",
        *(f"measure_blocks<{d}, {small}>" for d in DTYPE_CODES.values() for small in _FLAGS),
        *(
            f"search_scales<{d}, {steps}, {small}, {plain}>"
            for d in DTYPE_CODES.values()
            for steps in STEPS.values()
            for small in _FLAGS
            for plain in _FLAGS
        ),
    )


def sample_of_kernels() -> tuple[str, ...]:
    """Return the names of the kernels of SAMPLE_PARTS, and of those that they need."""
    return kernels_of(SAMPLE_PARTS)


def kernels_of(parts: tuple[str, ...]) -> tuple[str, ...]:
    """Return the kernels with one of these parts in their names, and those that all need."""
    wanted = (k.startswith(_NEEDED) or any(part in k for part in parts) for k in every_kernel())
    return tuple(itertools.compress(every_kernel(), wanted))
