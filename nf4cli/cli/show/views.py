"""Show plans, outputs and reports: as tables on a console, and as documents of --json."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...output.recipe_words import packing_words
from ...units import format_size, plural
from .rows import Row, print_names, print_rows
from .terminal import plain

if TYPE_CHECKING:
    from rich.console import Console

    from ...output.inspection import Overview
    from ...output.manifest import Manifest, TensorError
    from ...output.report import Finding, Report, Sample
    from ...planning.model_plan import ModelPlan
    from ...planning.plan import Plan
    from ...planning.resources import Resources

_SHOWN = 20  # findings printed
WORDS = {"quantize": "4-bit", "cast": "cast", "copy": "kept", "drop": "left out"}
"""The words for actions in tables."""


def _groups(plan: Plan) -> list[dict[str, Any]]:
    return [
        {
            "action": action,
            "reason": reason,
            "tensors": count,
            "elements": elements,
            "bytes": nbytes,
        }
        for action, reason, count, elements, nbytes in plan.groups()
    ]


def model_plan_document(model: ModelPlan, limits: Resources, output: Path | None) -> dict[str, Any]:
    """Return the document of --plan --json.

    Args:
        output: the output's directory, None where the output goes to the Hub alone.
    """
    from ...convert.output_place import disk_bytes

    parts = {
        name: _plan_document(plan, limits, None if output is None else output / name)
        for name, plan in model.parts.items()
    }
    if not model.is_pipeline:
        return parts[""]
    return {
        "source": str(model.root),
        "output": None if output is None else str(output),
        "source_bytes": model.source_bytes,
        "output_bytes": model.shard_bytes,
        "peak_memory_bytes": limits.memory,
        "peak_disk_bytes": disk_bytes(model, limits.workers),
        "workers": limits.workers,
        "components": parts,
        "copied_files": sorted([*model.copies.files, *model.copies.texts]),
        "copied_bytes": model.copies.nbytes,
        "left_files": model.left_files,
        "notes": list(model.notes),
    }


def _plan_document(plan: Plan, limits: Resources, output: Path | None) -> dict[str, Any]:
    """Return the document of one checkpoint's plan."""
    from ...convert.output_place import disk_bytes
    from ...planning.model_plan import ModelPlan

    return {
        "source": str(plan.checkpoint.root),
        "output": None if output is None else str(output),
        "source_bytes": plan.source_bytes,
        "output_bytes": plan.shard_bytes,
        "files": [{"name": s.filename, "bytes": s.size} for s in plan.shards],
        "parameters": plan.parameters,
        "quantized_parameters": plan.quantized_parameters,
        "bits_per_weight": round(plan.bits_per_weight, 4),
        "peak_memory_bytes": limits.memory,
        "peak_disk_bytes": disk_bytes(ModelPlan.of(plan), limits.workers),
        "workers": limits.workers,
        "groups": _groups(plan),
        "tensors": [
            {
                "name": t.name, "action": t.action, "rule": t.rule, "reason": t.reason,
                "dtype": t.weight.stored.dtype, "shape": list(t.weight.shape),
                "bytes": t.nbytes_out,
            }
            for t in plan.tensors
        ],
        "skip_modules": (plan.output_config or {})
        .get("quantization_config", {})
        .get("llm_int8_skip_modules", []),
        "copied_files": list(plan.checkpoint.extra_files),
        "left_files": list(plan.checkpoint.left_files),
        "notes": list(plan.notes),
    }  # fmt: skip


def print_groups(console: Console, plan: Plan) -> None:
    """Print a table of the kinds of weights: what becomes of them, and why."""
    rows: list[Row] = [("what", "why", "tensors", "weights", "bytes")]
    words = WORDS | {"cast": f"to {plan.config.dtype}"}
    for action, reason, count, elements, nbytes in plan.groups():
        rows.append((words[action], reason, f"{count:,}", f"{elements:,}", format_size(nbytes)))
    print_rows(console, rows)


def print_notes(console: Console, notes: Iterable[str]) -> None:
    """Print sentences that a user should know."""
    for note in notes:
        console.print(f"[yellow]note:[/] {plain(note)}")


def print_model_plan(console: Console, model: ModelPlan, limits: Resources, output: str) -> None:
    """Print what a run would write, and the memory and disk that it would take."""
    from ...convert.output_place import disk_bytes

    if model.is_pipeline:
        _print_pipeline(console, model, output)
    else:
        _print_checkpoint(console, model.parts[""], output)
    console.print(
        f"memory  at most {format_size(limits.memory)} with {plural(limits.workers, 'worker')}"
    )
    console.print(f"disk    {format_size(disk_bytes(model, limits.workers))} at the peak")
    if model.is_pipeline:
        copied: Iterable[str] = sorted((*model.copies.files, *model.copies.texts))
    else:
        copied = model.parts[""].checkpoint.extra_files
    for label, names in (("copied  ", list(copied)), ("left    ", model.left_files)):
        if names:
            print_names(console, label, names)


def _print_pipeline(console: Console, model: ModelPlan, output: str) -> None:
    console.print(f"[bold]{plain(model.root)}[/] -> [bold]{plain(output)}[/]")
    print_notes(console, model.notes)
    for name, part in model.parts.items():
        files = plural(len(part.shards), "file")
        console.print(f"[bold]{plain(name)}[/]: {part.shard_bytes:,} bytes in {files}")
        print_groups(console, part)
    console.print(
        f"output  {model.shard_bytes:,} bytes in {plural(len(model.parts), 'component')}, from "
        f"{model.source_bytes:,}, and {model.copies.nbytes:,} bytes copied"
    )


def _print_checkpoint(console: Console, plan: Plan, output: str) -> None:
    config = plan.config
    scales = "absmax" if config.scale == "absmax" else "chosen scales"
    console.print(
        f"[bold]{plain(plan.checkpoint.name)}[/] -> [bold]{plain(output)}[/]: "
        f"{config.quant_type}, {packing_words(config)} {scales}"
    )
    print_notes(console, plan.notes)
    console.print()
    print_groups(console, plan)
    console.print()
    console.print(
        f"output  {plan.shard_bytes:,} bytes in {plural(len(plan.shards), 'file')}, from "
        f"{plan.source_bytes:,}"
    )
    console.print(f"bits    {bits([plan])}")


def model_document(
    model: ModelPlan, manifests: Mapping[str, Manifest], output: Path | None
) -> dict[str, Any]:
    """Return the document of a finished run.

    Args:
        output: the output's directory, None where the output is on the Hub alone.
    """
    parts = {
        name: _result_document(model.parts[name], manifest, output and output / name)
        for name, manifest in manifests.items()
    }
    if not model.is_pipeline:
        return parts[""]
    return {
        "output": None if output is None else str(output),
        "source_bytes": model.source_bytes,
        "output_bytes": model.shard_bytes,
        "components": parts,
        "copied_bytes": model.copies.nbytes,
        "notes": list(model.notes),
    }


def _result_document(plan: Plan, manifest: Manifest, output: Path | None) -> dict[str, Any]:
    return {
        "output": None if output is None else str(output),
        "source_bytes": plan.source_bytes,
        "output_bytes": plan.shard_bytes,
        "files": [
            {"name": name, "bytes": record.size, manifest.digest: record.digest}
            for name, record in sorted(manifest.output_files.items())
        ],
        "parameters": plan.parameters,
        "quantized_parameters": plan.quantized_parameters,
        "bits_per_weight": round(plan.bits_per_weight, 4),
        "groups": _groups(plan),
        "errors": {
            name: record.error.as_dict()
            for name, record in manifest.tensors.items()
            if record.error is not None
        },
        "notes": list(plan.notes),
    }


def outliers(errors: Mapping[str, TensorError]) -> str | None:
    """Return how many blocks hold an outlier, None where none does or it is not known."""
    blocks = sum(error.blocks or 0 for error in errors.values())
    outlier_blocks = sum(error.outlier_blocks or 0 for error in errors.values())
    if not outlier_blocks:
        return None
    return (
        f"outlier blocks (absmax above 10 times the RMS of the rest): {outlier_blocks:,} of "
        f"{blocks:,} ({outlier_blocks / max(1, blocks):.2%})"
    )


def most_outliers(errors: Mapping[str, TensorError]) -> list[str]:
    """Return the weights with outlier blocks and their shares, the largest first."""
    ranked = sorted(errors.items(), key=lambda item: -item[1].outlier_share)
    return [
        f"{error.outlier_share:.2%} in {plain(name)}"
        for name, error in ranked
        if error.outlier_blocks
    ]


def bits(plans: list[Plan]) -> str:
    """Return `5.19 a weight, 4.13 in the 75% that are 4-bit`."""
    packed = [t for plan in plans for t in plan.tensors if t.state is not None]
    quantized = sum(plan.quantized_parameters for plan in plans)
    parameters = sum(plan.parameters for plan in plans)
    whole = 8 * sum(t.nbytes_out for plan in plans for t in plan.tensors) / max(1, parameters)
    own = 8 * sum(t.nbytes_out for t in packed) / max(1, quantized)
    return (
        f"{whole:.2f} a weight, {own:.2f} in the {quantized / max(1, parameters):.0%} that are "
        "4-bit"
    )


def report_document(report: Report) -> dict[str, Any]:
    """Return a report as a document."""
    sample = report.sample
    return {
        "ok": report.ok,
        "checks": [asdict(check) for check in report.checks],
        "unchecked": report.unchecked,
        "notes": report.notes,
        "sample": sample and {**asdict(sample), "share": sample.share},
        "findings": finding_documents(report.findings),
    }


def finding_documents(findings: Iterable[Finding]) -> list[dict[str, Any]]:
    """Return findings as documents."""
    return [asdict(finding) for finding in findings]


def print_checks(console: Console, report: Report) -> None:
    """Print each check of a report with its result, what was not checked, and notes."""
    for check in report.checks:
        mark = "[green]ok[/]    " if check.ok else "[bold red]FAILED[/]"
        console.print(f"{mark}  {plain(check.what)}")
    for sentence in report.unchecked:
        console.print(f"[yellow]not checked:[/] {plain(sentence)}")
    print_notes(console, report.notes)


def print_verdict(
    console: Console, findings: list[Finding], path: str, sample: Sample | None = None
) -> None:
    """Print the first findings, and whether the output is good.

    Args:
        path: as messages call the output.
        sample: the part that was checked, None for all.
    """
    for finding in findings[:_SHOWN]:
        console.print(f"[bold red]{finding.level}[/]  {plain(finding.message)}")
    hidden = len(findings) - _SHOWN
    if hidden > 0:
        console.print(f"... and {plural(hidden, 'finding')} more; --json has them all")
    if findings:
        count = plural(len(findings), "finding")
        console.print(f"[bold red]{plain(path)} is NOT good: {count}[/]")
    elif sample is not None:
        console.print(
            f"[bold green]{plain(path)} is good in the sample[/]: {sample.share:.1%} of the bytes, "
            f"{sample.tensors:,} of {plural(sample.of_tensors, 'tensor')}, --seed {sample.seed}"
        )
    else:
        console.print(f"[bold green]{plain(path)} is good[/]")


def print_overview(console: Console, seen: Overview, path: str) -> None:
    """Print an overview of a checkpoint: sizes, kinds of weights, errors and problems.

    Args:
        path: as messages call the checkpoint.
    """
    from rich import box
    from rich.table import Table

    share = seen.quantized_parameters / max(1, seen.parameters)
    console.print(
        f"[bold]{plain(seen.name)}[/] ({plain(seen.model_type or 'no model_type')}): "
        f"{seen.parameters:,} weights, {share:.1%} in 4 bit, "
        f"{seen.bits_per_weight:.2f} bits a weight, "
        f"{format_size(seen.nbytes)} in {plural(seen.files, 'file')}"
    )
    table = Table(box=box.SIMPLE, pad_edge=False)
    for heading in ("kind", "tensors", "weights", "bytes", "for example"):
        right = heading in ("tensors", "weights", "bytes")
        table.add_column(heading, justify="right" if right else "left", no_wrap=right)
    for group in seen.groups:
        table.add_row(
            ("4-bit: " if group.packed else "kept: ") + group.kind, f"{group.tensors:,}",
            f"{group.elements:,}", format_size(group.nbytes), plain(group.example),
            style="bold" if group.packed else None,
        )  # fmt: skip
    console.print(table)
    if seen.quant_method is not None:
        kept = ", ".join(plain(k) for k in seen.kept_modules) or "nothing of this model"
        console.print(f"config.json: {plain(seen.quant_method)}; kept out of 4 bit: {kept}")
    if seen.errors:
        ranked = sorted(seen.errors.items(), key=lambda item: -item[1].rel_rmse)
        from statistics import median  # its import takes as long as the rest of this module's

        middle = median(error.rel_rmse for error in seen.errors.values())
        console.print(f"error against the source: relative RMSE {middle:.4f} (median); the worst:")
        for name, error in ranked[:3]:
            console.print(f"  {error.rel_rmse:.4f}, largest {error.max_abs:.3g}, {plain(name)}")
        if (sentence := outliers(seen.errors)) is not None:
            console.print(f"{sentence}; the most:")
            for line in most_outliers(seen.errors)[:3]:
                console.print(f"  {line}")
    elif any(group.packed for group in seen.groups):
        console.print("error against the source: not known, there is no manifest")
    for problem in seen.problems[:5]:
        console.print(f"[bold red]problem[/]  {plain(problem)}")
    if seen.problems:
        count = plural(len(seen.problems), "problem")
        console.print(f"{count}: nf4 verify {plain(path)} shows all")
