"""The names of all kernels of cuda/gpu_kernels.cu, as C++ writes them."""

from __future__ import annotations

from nf4cli.engines.launches import CODE_SOURCES, STEPS
from nf4cli.engines.protocol import DTYPE_CODES

_FLAGS = ("false", "true")
SAMPLE_PARTS = (
    "quantize<2, 2, 1",
    "quantize<3, 2, 1",
    "quantize<0, 0, 2",
    "nested_quantize",
    "dequantize<2",
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
    )


def sample_of_kernels() -> tuple[str, ...]:
    """Return the names of the kernels of SAMPLE_PARTS, and of the one that all of them need."""
    return tuple(
        kernel
        for kernel in every_kernel()
        if kernel == "fold_errors" or any(part in kernel for part in SAMPLE_PARTS)
    )
