"""Show the result of nf4 quantize, on one screen of 24 lines and 80 columns."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...process_memory import peak_bytes
from ...units import format_duration, format_size, plural
from .. import step_summary
from . import terminal, views
from .listener import TerminalListener, tell_resources
from .outlook import outlook_document, show_outlook
from .progress import count, shorten
from .rows import Row, print_rows
from .terminal import plain

if TYPE_CHECKING:
    from rich.console import Console

    from ...api.quantizing import Job, Quantized
    from ...convert.transfers import Transfers
    from ...hub.publish import Published
    from ...output.manifest import Manifest, TensorError
    from ...planning.plan import Plan

_ROWS = 6  # kinds of weights, and components, that are shown
_WORST = 3
_NOTABLE = 0.01  # a share of outlier blocks that is worth a word


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of a run.

    Attributes:
        source: as the user named it.
        output: the output's directory; it holds nothing where `leaving`.
        parts: plans and manifests by component; "" is a checkpoint without a pipeline.
        config: config.json of the output, {} for a pipeline.
        notes: sentences that a user should know.
        copied: bytes of a pipeline's other files, None for a checkpoint.
        engine, by: the name of the engine, and its threads or the nodes of its cluster.
        seconds: time of converting and writing.
        ledger: counts of what this run converted itself.
        transfers: bytes that were fetched, uploaded and held, None for a run without a Hub.
        published: the commit on the Hub, None where nothing was published.
        leaving: the output is on the Hub alone.
        disk: value of --disk for the command that proves the output, None for none.
        adapters: those that were merged, as the user named them.
    """

    source: str
    output: Path
    parts: Mapping[str, tuple[Plan, Manifest]]
    config: Mapping[str, Any]
    notes: tuple[str, ...]
    copied: int | None
    engine: str
    by: str
    seconds: float
    ledger: TerminalListener
    transfers: Transfers | None = None
    published: Published | None = None
    leaving: bool = False
    disk: str | None = None
    adapters: tuple[str, ...] = ()

    @property
    def plans(self) -> list[Plan]:
        return [plan for plan, _ in self.parts.values()]

    @property
    def place(self) -> str:
        """The output as a user names it: a directory, or a repository on the Hub."""
        if self.leaving and self.published:
            return self.published.repo
        return str(self.output)

    @property
    def errors(self) -> dict[str, TensorError]:
        """Errors of the 4-bit weights by name; in a pipeline COMPONENT/NAME."""
        return {
            f"{part}/{name}" if part else name: record.error
            for part, (_, manifest) in self.parts.items()
            for name, record in manifest.tensors.items()
            if record.error is not None
        }


def _workers(job: Job) -> str:
    """Return who converted: threads of this process, or the nodes of a cluster."""
    crowd = job.request.machine.crowd
    return plural(job.limits.workers, "worker") if crowd is None else plural(crowd.nodes, "node")


def tell_plan(job: Job) -> None:
    """Print the plan's kinds of weights, and what the run may take of the machine, on stderr."""
    console = terminal.err_console()
    for name, plan in job.model.parts.items():
        if name:
            console.print(f"[bold]{plain(name)}[/]")
        views.print_groups(console, plan)
    tell_resources(job.request.machine.engine.name, job.limits)


def show_plan(job: Job, json: bool) -> None:
    """Print what the run would write, as a document or in words."""
    outlook = outlook_document(job)
    if json:
        document = views.model_plan_document(job.model, job.limits, job.stays)
        document["source"] = job.source.name
        terminal.print_json("plan", {**document, **({"hub": outlook} if outlook else {})})
        return
    views.print_model_plan(terminal.out_console(), job.model, job.limits, job.destination)
    if outlook:
        show_outlook(outlook)


def page_of(job: Job, done: Quantized) -> bytes:
    """Return the page of --html."""
    from ...pictures.pages import of_quantize

    parts = {name: (job.model.parts[name], found) for name, found in done.manifests.items()}
    return of_quantize(job.destination, parts)


def conclude(
    job: Job, done: Quantized, listener: TerminalListener, disk: str | None, json: bool, quiet: bool
) -> None:
    """Show the result of a run: as JSON or as a summary, and on the page of a CI job.

    Args:
        disk: value of --disk as the user wrote it.
    """
    from ..step_summary import conversion_section

    model = job.model
    parts = {name: (model.parts[name], manifest) for name, manifest in done.manifests.items()}
    step_summary.append(lambda: conversion_section(job.destination, parts))
    if json:
        run = {"engine": done.engine, "seconds": round(done.seconds, 3)}
        pushed = {"pushed": asdict(done.published)} if done.published else {}
        document = views.model_document(model, done.manifests, done.output)
        terminal.print_json("quantize", {**document, **run, **pushed})
    elif not quiet:
        outcome = Outcome(
            source=job.source.name,
            output=job.output,
            parts=parts,
            config={} if model.is_pipeline else model.parts[""].output_config or {},
            notes=tuple(model.notes),
            adapters=tuple(map(str, job.request.adapters)),
            copied=model.copies.nbytes if model.is_pipeline else None,
            engine=done.engine,
            by=_workers(job),
            seconds=done.seconds,
            ledger=listener,
            transfers=job.transport.transfers if job.transport else None,
            published=done.published,
            leaving=job.request.leaving,
            disk=disk if _proved_within_a_bound(job, done) else None,
        )
        print_outcome(terminal.out_console(), outcome)


def _proved_within_a_bound(job: Job, done: Quantized) -> bool:
    """Return whether `nf4 verify` can prove the output with the same --disk."""
    from ...output.recipe_words import why_not_by_digests

    manifest, leaving = done.manifests.get(""), job.request.leaving
    if manifest is None or (job.source.snapshot is None and not leaving):
        return False  # a pipeline, or both models are on this disk
    return why_not_by_digests(manifest.config, manifest.digest, leaving) is None


def print_outcome(console: Console, outcome: Outcome) -> None:
    """Print the summary of a run; names are cut to the terminal's width, commands are not."""
    width = console.width
    views.print_notes(console, outcome.notes)  # first, since they may tell what to do otherwise
    console.print(f"[bold]{plain(outcome.source)}[/] -> [bold]{plain(outcome.place)}[/]")
    for line in (*_sizes(outcome), *_speeds(outcome)):
        console.print(plain(line))
    console.print()
    if len(outcome.parts) > 1 or "" not in outcome.parts:
        print_rows(console, _components(outcome))
    print_rows(console, _kinds(outcome.plans))
    console.print()
    for line in _errors(outcome.errors, width):
        console.print(plain(line))
    if outcome.published is not None:
        seen = "private" if outcome.published.private else "public"
        commit = outcome.published.commit[:12]
        console.print(
            f"pushed  {plain(outcome.published.url)} ({seen}, commit {commit})", soft_wrap=True
        )
    command = f"nf4 verify {_word(outcome.place)} --source {_word(outcome.source)}"
    for adapter in outcome.adapters:
        command += f" --adapter {_word(adapter)}"
    if outcome.disk is not None:
        command += f" --disk {_word(outcome.disk)}"
    console.print(f"next    {plain(command)}", soft_wrap=True)
    if call := _loading(outcome):
        console.print(f"load    {plain(call)}", soft_wrap=True)


def _word(text: str) -> str:
    """Return a text quoted for a shell; one that cannot be printed is escaped elsewhere."""
    return shlex.quote(text) if text.isprintable() else text


def _sizes(outcome: Outcome) -> Iterator[str]:
    """Yield lines with the sizes before and after, and bits a weight."""
    plans = outcome.plans
    before = sum(plan.source_bytes for plan in plans)
    after = sum(plan.shard_bytes for plan in plans)
    files = plural(sum(len(plan.shards) for plan in plans), "file")
    copied = f", and {format_size(outcome.copied)} copied" if outcome.copied is not None else ""
    yield (
        f"size    {format_size(before)} -> {format_size(after)} ({after / before:.0%}) in "
        f"{files}{copied}"
    )
    yield f"bits    {views.bits(plans)}"


def _speeds(outcome: Outcome) -> Iterator[str]:
    """Yield lines with the time, speed, engine, memory and transfers."""
    ledger, seconds = outcome.ledger, max(outcome.seconds, 1e-9)
    took = f"time    {seconds:.2f} s" if seconds < 60 else f"time    {format_duration(seconds)}"
    if ledger.nbytes:
        took += (
            f", {format_size(ledger.nbytes / seconds)}/s, {count(ledger.weights / seconds)} "
            "weights/s"
        )
        if ledger.earlier:
            took += f"; {plural(ledger.earlier, 'weight')} were there already"
    else:
        took += "; all of it was there already"
    yield took
    memory = peak_bytes()
    most = f", memory at most {format_size(memory)}" if memory else ""
    yield f"engine  {outcome.engine}, {outcome.by}{most}"
    moved = outcome.transfers
    if moved is not None:
        facts = []
        if moved.to_download:
            facts.append(f"{format_size(moved.downloaded)} fetched")
        if moved.to_upload:
            facts.append(f"{format_size(moved.uploaded)} uploaded")
        if moved.disk_limit is not None:
            facts.append(
                f"disk at most {format_size(moved.most_disk)} of {format_size(moved.disk_limit)}"
            )
        if facts:
            yield f"moved   {', '.join(facts)}"


def _kinds(plans: list[Plan]) -> list[Row]:
    """Return rows of what became 4-bit and what was kept why, the largest first."""
    sums: dict[tuple[str, str], list[int]] = {}
    for plan in plans:
        for action, reason, *numbers in plan.groups():
            kind = views.WORDS[action] if action != "cast" else f"to {plan.config.dtype}"
            sum_of_kind = sums.setdefault((kind, reason), [0, 0, 0])
            for i, number in enumerate(numbers):
                sum_of_kind[i] += number
    order = sorted(sums.items(), key=lambda item: (item[0][0] != "4-bit", -item[1][2]))
    rest = order[_ROWS - 1 :] if len(order) > _ROWS else []
    rows = [(*key, *_numbers(numbers)) for key, numbers in order[: len(order) - len(rest)]]
    if rest:
        kept = [sum(numbers[i] for _, numbers in rest) for i in range(3)]
        rows.append(("...", f"for {len(rest)} other reasons (--plan has all)", *_numbers(kept)))
    return [("what", "why", "tensors", "weights", "bytes"), *rows]


def _numbers(numbers: list[int]) -> tuple[str, str, str]:
    """Return the cells of [tensors, weights, bytes]."""
    return f"{numbers[0]:,}", count(numbers[1]), format_size(numbers[2])


def _components(outcome: Outcome) -> list[Row]:
    """Return a row for each component of a pipeline."""
    from statistics import median  # see views

    rows: list[Row] = [("component", "", "bits", "before", "after", "error")]
    for name, (plan, manifest) in outcome.parts.items():
        errors = [r.error.rel_rmse for r in manifest.tensors.values() if r.error is not None]
        rows.append((
            name,
            "",
            f"{plan.bits_per_weight:.2f}",
            format_size(plan.source_bytes),
            format_size(plan.shard_bytes),
            f"{median(errors):.4f}" if errors else "-",
        ))  # fmt: skip
    if len(rows) > _ROWS + 1:
        hidden = len(rows) - _ROWS
        rows[_ROWS:] = [(f"... and {hidden} more", *[""] * 5)]
    return rows


def _errors(errors: Mapping[str, TensorError], width: int) -> Iterator[str]:
    """Yield lines with the median error, the worst weights, and the share of outlier blocks."""
    if not errors:
        return
    from statistics import median  # see views

    middle = median(error.rel_rmse for error in errors.values())
    worst = sorted(errors, key=lambda name: (-errors[name].rel_rmse, name))[:_WORST]
    yield f"error   relative RMSE {middle:.4f} (median weight), the worst:"
    for name in worst:
        error = errors[name]
        notable = f"  ({error.outlier_share:.1%} outlier blocks)" * (
            error.outlier_share >= _NOTABLE
        )
        yield f"        {error.rel_rmse:.4f}  {shorten(name, width - 17 - len(notable))}{notable}"
    blocks = sum(error.blocks or 0 for error in errors.values())
    outliers = sum(error.outlier_blocks or 0 for error in errors.values())
    if outliers:
        most = max(errors, key=lambda name: errors[name].outlier_share)
        line = f"        outlier blocks {outliers / max(1, blocks):.2%}, most "
        line += f"{errors[most].outlier_share:.2%} in "
        yield f"{line}{shorten(most, max(12, width - len(line) - 1))}"


def _loading(outcome: Outcome) -> str | None:
    """Return the line of Python that loads the output, None where there is none."""
    from ...output.load_line import loading_call

    manifests = {part: manifest for part, (_, manifest) in outcome.parts.items()}
    return loading_call(outcome.place, manifests, outcome.config)
