"""nf4 push: a finished output, checked and published on a Hub in one commit."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .. import stopping
from .options import JsonOption, QuietOption, WorkersOption
from .show import terminal, views
from .show.progress import ProgressDisplay

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
    from ..api.machine import processors
    from ..api.sources import require_repository
    from ..errors import UsageError
    from ..hub.errors import report_to
    from ..hub.publish import Publication
    from ..hub.push import check
    from ..hub.push import push as send
    from ..hub.repository import require_access

    if message is not None and not message.strip():
        raise UsageError("--message is empty: leave it out, or say what the commit is")
    require_repository(repo)
    notify, show = terminal.notices(quiet), not (quiet or json)
    report_to(notify)
    require_access(repo)
    total = _bytes_in(output)
    with ProgressDisplay(total, "checking", show) as display:
        checked = check(output, workers or processors(), display)
    if checked.findings:
        _refuse(checked, json)
    if checked.left:
        names = f"{', '.join(checked.left[:5])}{', ...' if checked.left[5:] else ''}"
        notify(f"not pushed, since no manifest lists it: {names}")
    with ProgressDisplay(checked.nbytes, "pushing", show) as display:
        shown = _Shown(display)
        publication = Publication(repo, public, replace_card, notify, shown.sent)
        publication.prepare()
        with stopping.finishing():
            published = send(checked, publication, message, shown.begun)
    if json:
        terminal.print_json("push", {**_document(checked), "pushed": asdict(published)})
    elif not quiet:
        _show(checked, published)


class _Shown:
    """What is sent, on a display: the file that was begun last, of several at a time."""

    def __init__(self, display: ProgressDisplay) -> None:
        self._display, self._name = display, ""

    def begun(self, name: str, _: int) -> None:
        self._name = name

    def sent(self, count: int) -> None:
        self._display(self._name, count)


def _bytes_in(output: Path) -> int:
    """Of the weight files, about all that will be read."""
    from ..planning.pipeline_plan import part_shards

    return sum(file.stat().st_size for file in part_shards(output)) if output.is_dir() else 0


def _refuse(checked: Checked, json: bool) -> None:
    if json:
        terminal.print_json("push", {**_document(checked), "pushed": None})
    else:
        views.print_verdict(terminal.out_console(), checked.findings, str(checked.path))
        terminal.note(
            "nothing was pushed; nf4 verify says more of what differs, nf4 quantize makes it anew"
        )
    raise typer.Exit(1)


def _document(checked: Checked) -> dict[str, object]:
    return {
        "path": str(checked.path),
        "ok": not checked.findings,
        "files": len(checked.sha256),
        "bytes": checked.nbytes,
        "left_files": checked.left,
        "findings": views.finding_documents(checked.findings),
    }


def _show(checked: Checked, published: Published) -> None:
    console = terminal.out_console()
    seen = "private" if published.private else "public"
    what = f"commit {published.commit[:12]}" if published.changed else "all of it was there already"
    files = terminal.plural(len(checked.sha256), "file")
    console.print(
        f"[bold]{terminal.plain(published.url)}[/]: {files}, "
        f"{terminal.format_size(checked.nbytes)}, {seen}, {what}"
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
