"""Check the headers, index, configuration and copied files of an output against what its source
gives."""

from __future__ import annotations

import json
from pathlib import Path

from ..checkpoint import bnb_format
from ..checkpoint.digest import digest_file
from ..checkpoint.discovery import index_name
from ..checkpoint.types import Checkpoint
from ..checkpoint.untrusted import INDEX, read_json
from ..planning.plan import Plan
from .manifest import Manifest
from .report import Report

_WRITERS_OWN = {"quantization_config", "transformers_version", "dtype", "torch_dtype"}
"""Fields of config.json that describe the program that wrote it, not the model."""


def compare_beside(
    checkpoint: Checkpoint, plan: Plan, manifest: Manifest | None, report: Report
) -> None:
    """Check everything but the tensors' bytes: headers, index, configuration, copied files.

    Args:
        checkpoint: the output.
        plan: of its conversion from the source.
        manifest: None for the output of another program.
        report: takes the findings.
    """
    if manifest is not None:
        _compare_layout(checkpoint, plan, report)
    _compare_headers(checkpoint, plan, report)
    _compare_config(checkpoint, plan, manifest, report)
    _compare_copies(checkpoint, plan, manifest, report)


def _compare_layout(checkpoint: Checkpoint, plan: Plan, report: Report) -> None:
    """Check that each of our own shards begins with the planned header, and that the index is the
    planned one."""
    shards = {shard.path.name: shard for shard in checkpoint.shards}
    for layout in plan.shards:
        shard = shards.pop(layout.filename, None)
        if shard is None:
            report.add(
                "source", layout.filename, f"{layout.filename} is missing: the source gives it"
            )
            continue
        with shard.path.open("rb") as file:
            same = file.read(len(layout.header)) == layout.header
        if not same or shard.size != layout.size:
            report.add(
                "source",
                layout.filename,
                f"{layout.filename}: its header is not the one that the source gives",
            )
    for name in sorted(shards):
        report.add("source", name, f"{name} is there, but the source gives no such file")
    if plan.index is None or checkpoint.is_file:
        return
    name = index_name(plan.checkpoint.stem)
    path = checkpoint.root / name
    if not path.is_file() or read_json(path, INDEX) != plan.index:
        report.add("source", name, f"{name} is not the index that the source gives")


def _compare_headers(checkpoint: Checkpoint, plan: Plan, report: Report) -> None:
    """Check that the tensors have the planned keys, dtypes and shapes."""
    expected = {key: spec for t in plan.tensors for key, spec in t.outputs.items()}
    for key, (dtype, shape) in expected.items():
        placed = checkpoint.tensors.get(key)
        if placed is None:
            report.add("source", key, f"{key} is missing: the source gives {dtype} {list(shape)}")
        elif not bnb_format.is_state_key(key) and (placed[1].dtype, placed[1].shape) != (
            dtype,
            shape,
        ):
            report.add(
                "source",
                key,
                f"{key} is {placed[1].dtype} {list(placed[1].shape)}: the source gives {dtype} "
                f"{list(shape)}",
            )
    for key in sorted(checkpoint.tensors.keys() - expected.keys()):
        report.add("source", key, f"{key} is there, but the source gives no such tensor")


def _compare_config(
    checkpoint: Checkpoint, plan: Plan, manifest: Manifest | None, report: Report
) -> None:
    """Check that config.json is the planned one.

    Of another program's only the fields that both have are compared.
    """
    expected = plan.output_config
    if expected is None:
        return
    if not checkpoint.config:
        report.add("source", "config.json", "config.json is missing: the source has one")
        return
    actual = dict(checkpoint.config)
    if manifest is not None and manifest.config.asked:
        # Its skip list has names that transformers answered, and it is not asked again.
        expected, actual = (bnb_format.without_skip_list(config) for config in (expected, actual))
    keys = set(expected) | set(actual)
    if not manifest:
        keys = set(expected) & set(actual) - _WRITERS_OWN
        stated = {key for key, value in expected.items() if value is not None}
        lacking = sorted(stated - set(actual) - _WRITERS_OWN)
        if lacking:
            report.unchecked.append(
                f"fields of the source's config.json that this one lacks: {', '.join(lacking)} "
                "(another version of its writer may spell them otherwise)"
            )
    for key in sorted(keys):
        if json.dumps(actual.get(key)) != json.dumps(expected.get(key)):  # a NaN equals itself
            report.add(
                "source",
                "config.json",
                f"config.json: {key} is {actual.get(key)!r}, the source gives "
                f"{expected.get(key)!r}",
            )


def _compare_copies(
    checkpoint: Checkpoint, plan: Plan, manifest: Manifest | None, report: Report
) -> None:
    """Check that tokenizer, chat template and so on are the source's files.

    A difference is a finding only in our own output: other programs write these files anew.
    """
    if checkpoint.is_file:
        return
    changed = []
    for name in plan.checkpoint.extra_files:
        if name == "config.json":
            continue
        copy = checkpoint.root / name
        if not copy.is_file():
            message = f"{name} is missing: the source has it"
        elif digest_file(copy, "blake3") == digest_file(plan.checkpoint.root / name, "blake3"):
            continue
        elif Path(name).name == "README.md":
            continue  # a model card is edited; the manifest's check says so
        else:
            message = f"{name} is not the source's file"
        changed.append(name)
        if manifest is not None:
            report.add("source", name, message)
    if changed and manifest is None:
        report.unchecked.append(
            f"files that are not, byte for byte, the source's: {', '.join(changed[:10])} (another "
            "program writes them anew)"
        )
