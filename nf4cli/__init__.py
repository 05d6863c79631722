"""nf4: stream full-precision checkpoints into bitsandbytes NF4, and prove what was written.

The functions of nf4cli.api (quantize, plan, verify, dequantize, inspect, inspect_tensor) are here
as well. They are imported when they are used first: `import nf4cli` alone costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import dequantize, inspect, inspect_tensor, plan, quantize, verify
    from .convert.listener import Listener
    from .format.config import QuantConfig

__version__ = "0.2.0"

__all__ = [
    "Listener", "QuantConfig", "dequantize", "inspect", "inspect_tensor", "plan", "quantize",
    "verify",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import what was asked for."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "QuantConfig":
        from .format.config import QuantConfig

        return QuantConfig
    if name == "Listener":
        from .convert.listener import Listener

        return Listener
    from . import api

    return getattr(api, name)
