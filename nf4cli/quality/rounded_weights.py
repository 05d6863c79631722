"""Round weights once as a conversion would, and decode them as often as windows of text ask."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..errors import InputError, NonFiniteError
from .calibration.rounding import search_matrix, search_threads

if TYPE_CHECKING:
    from ..engines.protocol import F32, U8, Engine
    from ..format.config import QuantConfig


class RoundedWeights:
    """The weights of a model in one format, each rounded when it is asked for first.

    Their codes and scales are kept, 0.5 bytes a weight and 4 a block: a search for scales is too
    slow to be done again for every window.
    """

    def __init__(self, engine: Engine, config: QuantConfig) -> None:
        """Take what rounds.

        Args:
            engine: the one that will convert.
            config: its blocksize, quant_type, scale and, where scales are searched, double_quant.
                Scales that are not searched stay float32.
        """
        self._engine, self._config = engine, config
        self._kept: dict[str, tuple[U8, F32]] = {}

    def decoded(self, name: str, weight: F32) -> F32:
        """Return a weight as its codes decode, float32 [rows, columns].

        Args:
            weight: float32 [rows, columns], the same at every call with a name.

        Raises:
            InputError: it is not finite.
        """
        if name not in self._kept:
            try:
                self._kept[name] = self._rounded(weight)
            except NonFiniteError as error:
                raise InputError(
                    f"{name} has a NaN or an infinity, so that the model cannot be run with a "
                    "text: mend the source"
                ) from error
        packed, absmax = self._kept[name]
        out = np.empty(weight.shape, np.float32)
        self._engine.dequantize(
            packed, weight.size, self._config.blocksize, self._config.quant_type, absmax, "F32",
            out.reshape(-1).view(np.uint8),
        )  # fmt: skip
        return out

    def _rounded(self, weight: F32) -> tuple[U8, F32]:
        """Return the packed codes and the scales of a weight."""
        config, n = self._config, weight.size
        if config.scale == "search":
            alike = np.zeros(weight.shape[-1], np.float32)
            return search_matrix(weight, alike, self._engine, config, search_threads(self._engine))
        packed = np.empty((n + 1) // 2, np.uint8)
        absmax = np.empty(-(-n // config.blocksize), np.float32)
        raw = weight.reshape(-1).view(np.uint8)
        self._engine.quantize(raw, "F32", config.blocksize, config.quant_type, packed, absmax)
        return packed, absmax
