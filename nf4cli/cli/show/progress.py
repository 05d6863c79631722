"""Show the progress of a run: as a bar on a terminal, as a line now and then in a log."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from ... import stopping
from ...checkpoint.untrusted import printable
from ...errors import UsageError
from ...units import format_duration, format_size, plural
from . import terminal
from .meter import Flow, Meter, Reading

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.live import Live
    from rich.text import Text

    from ...convert.tasks import Crowd
    from ...convert.transfers import Transfers

_HEARTBEAT = 30.0  # seconds
_LOG_WIDTH = 149  # characters of a log's line
_WIDE = 150  # columns from which one line is enough for all
_STILL = 10.0  # seconds without a move that are worth a word
_HERTZ = 8


class ProgressDisplay:
    """A display on stderr of how far a run is; any thread calls it with (name, bytes done).

    On a terminal it is a bar of one to three lines that is gone at the end. Elsewhere, and where
    TERM is dumb, it is a line at the beginning, one every NF4_HEARTBEAT seconds (30; 0 for none)
    whether anything moves or not, and one at the end.

    Args:
        total: bytes of work; 0 if not known, then only the time is shown.
        label: name of the work ("quantizing").
        show: False to show nothing.
        what: its source and output.
        weights: parameters in the work, 0 where they do not matter.
        transfers: counters of what the run fetches and uploads.
        place: a path on the disk whose free bytes are shown.
        crowd: the machines that do it, and its files; None where this machine does it all.

    Raises:
        UsageError: NF4_HEARTBEAT is no number.
    """

    def __init__(
        self,
        total: int,
        label: str,
        show: bool,
        *,
        what: str = "",
        weights: int = 0,
        transfers: Transfers | None = None,
        place: Path | None = None,
        crowd: Crowd | None = None,
    ) -> None:
        self._meter = Meter(total, weights, transfers, place, crowd=crowd)
        self._total, self._label, self._what = total, label, what
        self._heartbeat = heartbeat()
        self._stop = threading.Event()
        self._printing = threading.Lock()
        self._thread: threading.Thread | None = None
        self._live: Live | None = None
        self._console = terminal.err_console() if show else None
        if self._console is not None and draws(self._console):
            from rich.live import Live

            bar = _Bar(self._meter, label)
            self._live = Live(bar, console=self._console, refresh_per_second=_HERTZ, transient=True)

    def __call__(self, what: str, count: int) -> None:
        self._meter.add(what, count)

    def skip(self, count: int) -> None:
        """Count the next `count` bytes as done by an earlier run."""
        self._meter.skip(count)

    def __enter__(self) -> ProgressDisplay:
        try:
            with stopping.held_back():
                self._begin()
        except BaseException:
            self._end()
            raise
        return self

    def _begin(self) -> None:
        if self._live is not None:
            self._live.start(refresh=True)
        elif self._console is not None:
            what = f" {self._what}" if self._what else ""
            size = f", {format_size(self._total)}" if self._total else ""
            self._print(f"{self._label}{what}{size}")
            if self._heartbeat:
                self._thread = threading.Thread(
                    target=self._beat, name="nf4-heartbeat", daemon=True
                )
                self._thread.start()

    def __exit__(self, kind: object, *_: object) -> None:
        with stopping.held_back():
            self._end()
        logged = self._live is None and self._console is not None and self._total
        if kind is None and logged:
            self._print(self._last_line())

    def _end(self) -> None:
        """Remove the bar and end the thread; nothing is printed from then on."""
        with self._printing:
            self._stop.set()
        if self._live is not None:
            try:
                self._live.stop()
            finally:
                self._live.console.show_cursor(True)  # rich does not where the terminal failed
        if self._thread is not None:
            self._thread.join()

    def _beat(self) -> None:
        """Print a line every NF4_HEARTBEAT seconds; read the counters once a second."""
        left = self._heartbeat
        while not self._stop.wait(min(1.0, left)):
            reading = self._meter.read()
            left -= min(1.0, left)
            if left <= 0:
                left = self._heartbeat
                with self._printing:
                    if not self._stop.is_set():
                        patience = min(5.0, self._heartbeat)
                        self._print(log_line(self._label, reading, self._width(), patience))

    def _width(self) -> int:
        """Return the largest width of a log's lines; a dumb terminal has its own."""
        assert self._console is not None
        return min(_LOG_WIDTH, self._console.width - 1)

    def _last_line(self) -> str:
        seconds, done = self._meter.seconds, min(self._meter.done, self._total)
        speed = f", {format_size(done / seconds)}/s" if seconds >= 1 else ""
        return f"{self._label} done: {format_size(done)} in {format_duration(seconds)}{speed}"

    def _print(self, line: str) -> None:
        assert self._console is not None
        with suppress(OSError):  # nobody reads stderr: no reason to end the work
            self._console.print(printable(line), markup=False, soft_wrap=True)


class _Bar:
    """The bar for rich, which draws it several times a second at the terminal's present width."""

    def __init__(self, meter: Meter, label: str) -> None:
        self._meter, self._label = meter, label

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        reading = self._meter.read()
        ascii_only = options.ascii_only or ascii_locale()
        yield from bar_lines(self._label, reading, options.max_width, ascii_only)


def draws(console: Console) -> bool:
    """Return whether a bar can be drawn; FORCE_COLOR asks for colours where none can."""
    real = console.file.isatty()
    return real and console.is_terminal and not console.is_dumb_terminal


def ascii_locale() -> bool:
    """Return whether the user's locale is C, in which a terminal may show ASCII only."""
    named = os.environ.get("LC_ALL") or os.environ.get("LANG") or "C"
    coerced = os.environ.get("LC_CTYPE", "") in ("", "C.UTF-8")  # Python itself sets that one
    return named in ("C", "POSIX") and coerced


def heartbeat() -> float:
    """Return the seconds between two lines of a log (NF4_HEARTBEAT), 0 for no lines.

    Raises:
        UsageError: NF4_HEARTBEAT is no number of seconds.
    """
    text = os.environ.get("NF4_HEARTBEAT", "").strip()
    try:
        seconds = float(text) if text else _HEARTBEAT
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise UsageError(
            f"the environment has NF4_HEARTBEAT={text!r}, which is no number of seconds: set it to "
            "the seconds between two lines of progress, 0 for none"
        )
    return max(0.1, seconds) if seconds else 0.0


def of(done: int, total: int) -> str:
    """Return `1.2 of 2.5 GB`."""
    whole = format_size(total)
    unit = whole.rpartition(" ")[2]
    part = format_size(done)
    return f"{part.removesuffix(' ' + unit)} of {whole}"


def count(number: float) -> str:
    """Return a number of weights as models count them: `655M`, `1.2B`."""
    for unit in ("", "k", "M"):
        if number < 999.5:
            return f"{number:.0f}{unit}" if number >= 10 or not unit else f"{number:.1f}{unit}"
        number /= 1000
    return f"{number:,.1f}B" if number < 100 else f"{number:,.0f}B"


def shorten(name: str, cells: int) -> str:
    """Return a tensor's name in at most `cells` columns; the layer's number and the end stay.

    model.layers.17.mlp.down_proj.weight -> layers.17.mlp.down_proj -> 17.mlp.down_proj
    -> 17...down_proj.
    """
    from rich.cells import cell_len

    name = printable(name)
    if cell_len(name) <= cells:
        return name
    parts = name.removesuffix(".weight").split(".")
    number = next((i for i, part in enumerate(parts) if part.isdecimal()), 0)
    for _ in range(number):  # remove the parts before the layer's number
        if cell_len(".".join(parts)) <= cells:
            break
        del parts[0]
    name = ".".join(parts)
    if cell_len(name) <= cells:
        return name
    head = parts[0] if number else _first_cells(name, (cells - 3) // 3)
    room = cells - 3 - cell_len(head)
    return f"{head}...{_last_cells(name, room)}" if room >= 4 else _last_cells(name, cells)


def _first_cells(text: str, cells: int) -> str:
    from rich.cells import cell_len

    while text and cell_len(text) > cells:
        text = text[:-1]
    return text


def _last_cells(text: str, cells: int) -> str:
    from rich.cells import cell_len

    while text and cell_len(text) > cells:
        text = text[1:]
    return text


def log_line(label: str, reading: Reading, width: int = _LOG_WIDTH, patience: float = 5.0) -> str:
    """Return a line of a log about a run at one moment.

    Args:
        label: name of the work.
        width: most characters.
        patience: seconds without a move from which the line says so.
    """
    if not reading.work.total:
        return f"{label}, {format_duration(reading.seconds)} so far"[:width]
    still = reading.still >= patience
    facts = [f"{reading.share:.0%}", of(reading.work.done, reading.work.total)]
    facts += _crowd(reading)
    if still:
        facts.append(f"nothing moved for {reading.still:.0f} s")
    moves = _moves(reading)
    facts += [fact for _, fact in moves] or [_speed(reading.work)]
    if reading.left is not None and not still:
        facts.append(f"{format_duration(reading.left)} left")
    if reading.memory is not None and reading.crowd is None:
        facts.append(f"memory {format_size(reading.memory)}")
    if reading.weights and not moves:
        facts.append(f"{count(reading.weights)} weights/s")
    line = f"{label} {facts[0]}"
    for fact in filter(None, facts[1:]):
        if len(line) + 2 + len(fact) <= width:
            line += f", {fact}"
    room = width - len(line) - 2
    if reading.current and room >= 12:
        line += f", {shorten(reading.current, room)}"
    return line[:width]


def bar_lines(label: str, reading: Reading, width: int, ascii_only: bool) -> Iterator[Text]:
    """Yield the lines of the bar, each narrower than the terminal of `width` columns.

    One line on a wide terminal, two on a narrow one, and one more where files are fetched or
    uploaded.
    """
    from rich.text import Text

    wide = width >= _WIDE
    width = max(1, width - 1)  # a terminal that is written full may wrap
    if not reading.work.total:
        yield _cut(
            Text(f"{label}  {format_duration(reading.seconds)}", "bold", no_wrap=True), width
        )
        return
    still = f"nothing moved for {reading.still:.0f} s" if reading.still >= _STILL else ""
    left = f"{format_duration(reading.left)} left" if reading.left is not None else ""
    facts = [of(reading.work.done, reading.work.total), still or left, _speed(reading.work)]
    more = _state(reading)
    shown: list[str] = []
    room = width - len(label) - 5 - 12  # the share, and a bar of ten
    for fact in [*facts, *(more if wide else ())]:
        if fact and len(fact) + 2 <= room:
            shown.append(fact)
            room -= len(fact) + 2
    line = Text(no_wrap=True, overflow="crop", end="\n")
    line.append(label[:width], "bold")
    drawn = min(40, max(10, room - 32) if wide else room + 10)  # a name takes about 40
    if drawn >= 4:
        _draw(line, reading.share, drawn, ascii_only)
    line.append(f" {reading.share:4.0%}")
    for fact in shown:
        line.append(f"  {fact}", "yellow" if fact == still else "")
    if wide:
        rest = width - line.cell_len - 2
        if rest >= 12:
            line.append(f"  {shorten(reading.current, rest)}", "dim")
        yield _cut(line, width)
    else:
        yield _cut(line, width)
        yield _cut(_second(reading, more, width), width)
    moves = _moves(reading)
    if moves:
        yield _cut(Text(_row(moves, width), no_wrap=True, overflow="crop"), width)


def _row(moves: list[tuple[str, str]], width: int) -> str:
    """Return the transfers in a line of at most `width`: the amounts, and speeds where they fit."""
    shown: list[tuple[str, str]] = []
    room = width
    for short, whole in moves:
        if len(short) + 2 <= room:
            shown.append((short, whole))
            room -= len(short) + 2
    row = ""
    for short, whole in shown:
        more = len(whole) - len(short)
        row += f"  {whole if more <= room else short}"
        room -= more if more <= room else 0
    return row


def _second(reading: Reading, more: list[str], width: int) -> Text:
    """Return the second line: the tensor's name, and facts that leave it 28 columns."""
    from rich.text import Text

    tail = ""
    for fact in more:
        if width - 2 - len(tail) - len(fact) - 2 >= 28:
            tail += f"  {fact}"
    name = shorten(reading.current, max(1, width - 2 - len(tail)))
    line = Text(f"  {name}", "dim", no_wrap=True, overflow="crop")
    line.append(tail, "not dim")
    return line


def _cut(line: Text, width: int) -> Text:
    line.truncate(width, overflow="crop")
    return line


def _draw(line: Text, share: float, cells: int, ascii_only: bool) -> None:
    """Append a bar of `cells` columns to a line."""
    full = int(share * cells)
    done, rest = ("#", ".") if ascii_only else ("━", "─")
    line.append(" ")
    line.append(done * full, "green")
    line.append(rest * (cells - full), "dim")


def _state(reading: Reading) -> list[str]:
    """Return what is shown where there is room: weights a second, memory, free disk."""
    facts = _crowd(reading)
    if reading.weights:
        facts.append(f"{count(reading.weights)} weights/s")
    if reading.memory is not None and reading.crowd is None:
        facts.append(f"memory {format_size(reading.memory)}")
    if reading.free is not None and not reading.disk_limit:
        facts.append(f"{format_size(reading.free)} free")
    return facts


def _crowd(reading: Reading) -> list[str]:
    """Return the files that are finished, and the machines that work on the others."""
    crowd = reading.crowd
    if crowd is None or not crowd.total:
        return []
    files, nodes = plural(crowd.total, "file"), plural(crowd.nodes, "node")
    return [f"{crowd.done} of {files}", nodes]


def _moves(reading: Reading) -> list[tuple[str, str]]:
    """Return each transfer as (amount, amount with speed), and the disk held under --disk."""
    facts = []
    for word, flow in (("down", reading.download), ("up", reading.upload)):
        if flow is not None:
            amount = f"{word} {of(flow.done, flow.total)}"
            facts.append((amount, f"{amount} {speed}" if (speed := _speed(flow)) else amount))
    if reading.disk_limit is not None:
        held = f"disk {of(reading.disk, reading.disk_limit)}"
        facts.append((held, held))
    return facts


def _speed(flow: Flow) -> str:
    return "" if flow.speed is None or not flow.done else f"{format_size(flow.speed)}/s"
