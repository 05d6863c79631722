"""nf4 push: check a finished output and publish it on a Hub in one commit."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from ..units import format_size, plural
from .options import JsonOption, QuietOption, WorkersOption
from .show import terminal, views
from .show.listener import TerminalListener

if TYPE_CHECKING:
    from ..hub.publish import Published
    from ..hub.push import Checked


def push(
    output: Annotated[
        Path, typer.Argument(help="A directory that nf4 quantize wrote", show_default=False)
    ],
    repo: Annotated[
        str,
        typer.Argument(
            metavar="ORG/NAME", help="The repository; made where there is none", show_default=False
        ),
    ],
    public: Annotated[bool, typer.Option("--public", help="Make a new repository public")] = False,
    replace_card: Annotated[
        bool,
        typer.Option("--replace-card", help="Replace the repository's README.md"),
    ] = False,
    message: Annotated[
        str | None,
        typer.Option("--message", metavar="TEXT", help="The commit's message", show_default=False),
    ] = None,
    workers: WorkersOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Publish a finished output on the Hub, in one commit, private if it is new.

    Every file is read first. Unless all are what the manifest says, nothing
    is sent (exit code 1).
    """
    from ..api.sources import require_repository
    from ..checkpoint.discovery import require_output

    require_repository(repo)
    require_output(output)  # before what publishes is imported, and a Hub is asked

    from ..api.pushing import Push, publish

    listener = TerminalListener(quiet or json, notes=not quiet)
    done = publish(Push(output, repo, public, replace_card, message, workers, listener))
    if done.published is None:
        _refuse(done.checked, json)
    elif json:
        pushed = {"pushed": asdict(done.published)}
        terminal.print_json("push", {**_document(done.checked), **pushed})
    elif not quiet:
        _show(done.checked, done.published)


def _refuse(checked: Checked, json: bool) -> NoReturn:
    """Say what is wrong with the output, and end the command with exit code 1."""
    if json:
        terminal.print_json("push", {**_document(checked), "pushed": None})
    else:
        views.print_verdict(terminal.out_console(), checked.findings, str(checked.path))
        terminal.note(
            "nothing was pushed; nf4 verify says more of what differs, nf4 quantize makes it anew"
        )
    raise typer.Exit(1)


def _document(checked: Checked) -> dict[str, object]:
    """Return what --json says of the output itself."""
    return {
        "path": str(checked.path),
        "ok": not checked.findings,
        "files": len(checked.sha256),
        "bytes": checked.nbytes,
        "left_files": checked.left,
        "findings": views.finding_documents(checked.findings),
    }


def _show(checked: Checked, published: Published) -> None:
    """Print where the output is now, and what to do next."""
    console = terminal.out_console()
    seen = "private" if published.private else "public"
    what = f"commit {published.commit[:12]}" if published.changed else "all of it was there already"
    files = plural(len(checked.sha256), "file")
    console.print(
        f"[bold]{terminal.plain(published.url)}[/]: {files}, "
        f"{format_size(checked.nbytes)}, {seen}, {what}"
    )
    if published.deleted:
        console.print(f"gone    {terminal.plain(', '.join(published.deleted))}")
    first = next(iter(checked.manifests.values()))
    source = ""
    if first.source_repo and first.source_commit:
        source = f" --source {first.source_repo}@{first.source_commit}"
    console.print(f"next    nf4 verify {terminal.plain(published.repo + source)}")
    if published.private:
        console.print("        private: its settings on that page make it public")
