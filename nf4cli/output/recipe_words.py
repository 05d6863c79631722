"""Put a recipe into words: the options that ask for it, and how scales and codes were chosen."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields

from ..checkpoint.discovery import IMPORTANCE
from ..format.config import QuantConfig

_NO_OPTIONS = ("keep", "expert_layout", "shard_cuts", "adapters", "scale", "method", "importance")
"""Fields that options are not made of one by one."""


def options_of(config: QuantConfig) -> Iterable[str]:
    """Yield the options of `nf4 quantize` that ask for a recipe, without --keep and defaults."""
    defaults = QuantConfig()
    for field in fields(QuantConfig):
        value, default = getattr(config, field.name), getattr(defaults, field.name)
        if value == default or field.name in _NO_OPTIONS:
            continue
        if field.name == "formats":
            yield from ("--recipe", "RECIPE.toml")
        elif field.name == "double_quant":
            yield "--no-double-quant"
        elif field.name == "asked":
            yield "--exact"
        else:
            yield from (f"--{field.name.replace('_', '-')}", str(value))
    yield from adapter_options(config)
    if any(adapter.scale != 1 for adapter in config.adapters):
        for adapter in config.adapters:
            yield from ("--adapter-scale", str(adapter.scale))
    yield from _chosen(config)


def adapter_options(config: QuantConfig) -> Iterable[str]:
    """Yield the options that name the adapters of a recipe: repository and commit, or directory."""
    for adapter in config.adapters:
        place = f"{adapter.repo}@{adapter.commit}" if adapter.repo else adapter.name
        yield from ("--adapter", place)


def _chosen(config: QuantConfig) -> Iterable[str]:
    """Return the options that choose scales and codes; the importance lies in the output itself."""
    if config.feeds_back:
        return ("--calibration", "TEXT", "--method", config.method)
    if config.importance:
        return ("--importance", IMPORTANCE)
    return () if config.scale == "absmax" else ("--scale", config.scale)


def how_chosen(config: QuantConfig) -> str:
    """Return how scales and codes were chosen, "" for the way of bitsandbytes."""
    if config.feeds_back:
        return f", codes by {config.method.upper()}"
    if config.importance:
        return ", scales chosen by the importance of inputs"
    return ", scales chosen by loss" if config.scale == "search" else ""


def packing_words(config: QuantConfig) -> str:
    """Return how weights are packed: "blocksize 64, nested", and what a recipe sets apart."""

    def words(blocksize: int, nested: bool) -> str:
        return f"blocksize {blocksize}, {'nested' if nested else 'float32'}"

    apart = [
        f"{words(each.blocksize, each.double_quant)} for {len(each.modules):,} by the recipe"
        for each in config.formats
    ]
    return "; ".join([words(config.blocksize, config.double_quant), *apart])


def why_not_by_digests(config: QuantConfig, digest: str, on_a_hub: bool) -> str | None:
    """Return why an output cannot be proved by making it again for its digests; None if it can.

    Args:
        digest: algorithm of the manifest's digests of files.
        on_a_hub: whether the output lies on a Hub, which states SHA-256.
    """
    if config.feeds_back:
        return (
            f"its codes were chosen by {config.method}, so that a proof reads them from the output"
        )
    if config.on_nonfinite == "keep":
        return "--on-nonfinite keep looks at all of the source before the first weight"
    if on_a_hub and digest != "sha256":
        return f"its manifest has {digest} digests, and a Hub states SHA-256"
    return None
