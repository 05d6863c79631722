"""A recipe as words for people: the options that ask for it, and what is unusual about it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields

from ..checkpoint.discovery import IMPORTANCE
from ..format.config import QuantConfig

_CHOICE = ("scale", "method", "importance")


def options_of(config: QuantConfig) -> Iterable[str]:
    """What quantize was asked, where it is not what it does anyway."""
    usual = QuantConfig()
    for field in fields(QuantConfig):
        value, default = getattr(config, field.name), getattr(usual, field.name)
        if value == default or field.name in ("keep", *_CHOICE):
            continue
        if field.name == "double_quant":
            yield "--no-double-quant"
        elif field.name == "asked":
            yield "--exact"
        else:
            yield from (f"--{field.name.replace('_', '-')}", str(value))
    yield from _chosen(config)


def _chosen(config: QuantConfig) -> Iterable[str]:
    """The options for scales and codes; the importance lies in the output itself."""
    if config.method == "gptq":
        return ("--calibration", "TEXT", "--method", "gptq")
    if config.importance:
        return ("--importance", IMPORTANCE)
    return () if config.scale == "absmax" else ("--scale", config.scale)


def how(config: QuantConfig) -> str:
    """How scales and codes were chosen, where it is not bitsandbytes' way."""
    if config.method == "gptq":
        return ", codes by GPTQ"
    if config.importance:
        return ", scales chosen by the importance of inputs"
    return ", scales chosen by loss" if config.scale == "search" else ""


def why_not_by_digests(config: QuantConfig, digest: str, on_a_hub: bool) -> str | None:
    """Why an output cannot be proved by the digests of what its source gives; None where it can.

    Args:
        digest: algorithm of the manifest's digests of files.
        on_a_hub: the output lies there, which states SHA-256.
    """
    if config.method == "gptq":
        return "its codes were chosen by gptq, so that a proof reads them from the output"
    if config.on_nonfinite == "keep":
        return "--on-nonfinite keep looks at all of the source before the first weight"
    if on_a_hub and digest != "sha256":
        return f"its manifest has {digest} digests, and a Hub states SHA-256"
    return None
