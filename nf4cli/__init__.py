"""nf4: stream full-precision checkpoints into bitsandbytes NF4, and prove what was written.

The functions of nf4cli.api (quantize, plan, verify and others) can be imported from here as well.
They are loaded at their first use, so that `import nf4cli` alone loads no numerical library.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .version import __version__ as __version__

if TYPE_CHECKING:
    from .api import (
        attest,
        dequantize,
        diff,
        evaluate,
        inspect,
        inspect_tensor,
        load,
        plan,
        push,
        quantize,
        verify,
        write_text,
    )
    from .convert.listener import Listener
    from .format.config import QuantConfig

__all__ = [
    "Listener", "QuantConfig", "attest", "dequantize", "diff", "evaluate", "inspect",
    "inspect_tensor", "load", "plan", "push", "quantize", "verify", "write_text",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Return a public name, loaded now.

    Raises:
        AttributeError: there is no such name.
    """
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
