"""The names of all kernels of cuda/gpu_kernels.cu, as C++ writes them."""

from __future__ import annotations

from nf4cli.engines.launches import CODE_SOURCES, STEPS
from nf4cli.engines.protocol import DTYPE_CODES

_FLAGS = ("false", "true")


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
