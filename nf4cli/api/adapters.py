"""Find the adapters that a user names: directories, or `org/name@revision` on the Hub."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError, UsageError
from .sources import named

if TYPE_CHECKING:
    from ..checkpoint.adapter_files import Adapter
    from ..output.manifest import Manifest
    from .machine import Machine


def check_scales(adapters: Sequence[Path], scales: Sequence[float]) -> None:
    """Refuse what can be refused before an adapter is read.

    Args:
        scales: one for all adapters, or one for each; () for 1.

    Raises:
        UsageError: their number does not fit, or one is no number.
    """
    if scales and not adapters:
        raise UsageError("--adapter-scale needs --adapter")
    if len(scales) > 1 and len(scales) != len(adapters):
        raise UsageError(
            f"--adapter-scale is given {len(scales)} times for {len(adapters)} of --adapter: give "
            "it once for all, or once for each"
        )
    for scale in scales:
        if not math.isfinite(scale) or abs(scale) > 1e6:
            raise UsageError(f"--adapter-scale {scale} is out of range: expected a number like 0.5")


def read_adapters(
    adapters: Sequence[Path], scales: Sequence[float], machine: Machine
) -> tuple[Adapter, ...]:
    """Return adapters, in order; those on a Hub are fetched to the cache.

    Args:
        scales: see `check_scales`.

    Raises:
        UsageError: scales do not fit; or a cluster would have to fetch an adapter.
        InputError, MachineError: one cannot be read, or is none that nf4 merges.
    """
    check_scales(adapters, scales)
    factors = list(scales) * (len(adapters) if len(scales) == 1 else 1) or [1.0] * len(adapters)
    return tuple(_read(*each, machine) for each in zip(adapters, factors, strict=True))


def _read(path: Path, scale: float, machine: Machine) -> Adapter:
    from ..checkpoint.adapter_files import read_adapter

    if named(path) is None:
        return read_adapter(path.absolute(), str(path), scale)
    if machine.ray is not None:
        raise UsageError(
            f"--ray reads adapters from a directory that all nodes share, and {path} is on a Hub: "
            "download it there first, with hf download"
        )
    root, repo, commit = _fetch(path, machine)
    return read_adapter(root, str(path), scale, repo, commit)


def _fetch(path: Path, machine: Machine) -> tuple[Path, str, str]:
    """Fetch an adapter's files to the cache, and return (directory, repository, commit)."""
    from ..checkpoint.adapter_files import CONFIG, WEIGHTS
    from ..convert.listener import Stage
    from ..convert.transfers import Transfers
    from ..hub import client
    from ..hub.errors import report_to
    from ..hub.fetching import fetch_all
    from ..hub.retries import persist

    name, listener = named(path), machine.listener
    assert name is not None
    report_to(listener.note)
    with listener.stage(Stage(f"fetching adapter {name}")):
        snapshot = persist(partial(client.resolve, name), listener.note)
        lacking = [file for file in (CONFIG, WEIGHTS) if file not in snapshot.files]
        if lacking:
            held = ", ".join(sorted(f for f in snapshot.files if f.startswith("adapter"))[:5])
            raise InputError(
                f"{name} has no {' and no '.join(lacking)}"
                f"{f' (it has {held})' if held else ''}: expected a PEFT adapter in safetensors. "
                "A pickled one (adapter_model.bin) is not read: load it with PEFT where you trust "
                "it, and save_pretrained writes safetensors"
            )
        root = fetch_all(snapshot, [CONFIG, WEIGHTS], Transfers(), listener.note)
    return root, snapshot.repo, snapshot.commit


def as_merged(
    adapters: Sequence[Path], manifest: Manifest | None, machine: Machine
) -> tuple[Adapter, ...]:
    """Return the adapters that an output was made with, by its manifest, read from where a user
    says that they are.

    Raises:
        UsageError: there are more or fewer, or one is another adapter than the manifest names.
        InputError, MachineError: see `read_adapters`.
    """
    recorded = manifest.config.adapters if manifest else ()
    called = ", then ".join(
        f"{r.repo or r.name}{f'@{r.commit}' if r.commit else ''}" for r in recorded
    )
    if len(adapters) != len(recorded):
        raise UsageError(
            f"the manifest says that {len(recorded)} adapters were merged"
            f"{f' ({called}): give each with --adapter, in this order' if recorded else ''}"
            f"{'' if recorded else ': leave --adapter out'}; {len(adapters)} are given"
        )
    found = read_adapters(adapters, [record.scale for record in recorded], machine)
    for adapter, record in zip(found, recorded, strict=True):
        if adapter.record.identity != record.identity:
            differs = "weights" if adapter.record.weights != record.weights else "config"
            raise UsageError(
                f"{adapter.name} is not the adapter that was merged "
                f"({record.repo or record.name}): the SHA-256 of its {differs} is "
                f"{getattr(adapter.record, differs)}, the manifest has {getattr(record, differs)}"
            )
    return tuple(
        replace(adapter, record=record) for adapter, record in zip(found, recorded, strict=True)
    )
