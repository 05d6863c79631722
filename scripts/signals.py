"""Stop nf4 by SIGINT and SIGTERM at random moments of runs from a Hub to a Hub.

    python scripts/signals.py [--signals 300] [--lanes 4] [--busy 2] [--seed 0]

Runs the installed `nf4` against the tests' own Hub, some lanes at a time, beside processes that
keep the processors busy.  A moment is a random time after the start, or a random one of the
requests that the command sends, so that planning, fetching, converting, uploading and publishing
are all met; every third signal has a second one behind it.

After each signal the exit code must be 130, or 0 where the work was done before; nothing may be
said beside the command's own messages; what it says of kept work must be true; and the repository
is empty or whole.  The same command with --resume must then find all finished weights, send no file
twice, publish what an undisturbed run publishes, byte for byte, and leave nothing on the disk.
Prints a table; ends with 1 if that did not hold.  Linux only.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from faults_bench import INTERRUPTED, NF4, ROOT, THERE, BrokenError, contents, make_source, require

sys.path.insert(0, str(ROOT / "tests"))

from hub_server import Hub
from hub_server.faults import Fault, Faults

REPO = "me/model-nf4"
STOP = (signal.SIGINT, signal.SIGTERM)
SMALL = ("--max-shard-size", "1MB")
LONGEST = 20.0  # seconds from the signal to the end, on a machine with far too much to do


@dataclass(frozen=True)
class Route:
    """A way from a Hub to a Hub.

    Attributes:
        arguments: of nf4; `push` takes the output of an undisturbed run.
        output: its name in the directory of the run, None where nothing stays there.
        workspace: where unfinished work is kept.
        phases: patterns of the requests that it sends.
    """

    name: str
    arguments: tuple[str, ...]
    output: str | None
    workspace: str
    phases: tuple[str, ...]


PHASES = {
    "looking": r"GET /api/models/org|GET /org/model/resolve",
    "fetching": r"GET /files/org",
    "preparing": r"POST /api/repos/create|POST .*/preupload/",
    "uploading": r"POST .*/objects/batch|PUT /upload",
    "publishing": r"POST .*/commit/main",
}
ROUTES = (
    Route("leaves", ("quantize", "org/model", "--push-to", REPO, *SMALL), None,
          ".models--me--model-nf4.partial", tuple(PHASES)),
    Route("stays", ("quantize", "org/model", "out", "--push-to", REPO, *SMALL), "out",
          ".out.partial", tuple(PHASES)),
    Route("push", ("push", "made", REPO), None, "", ("preparing", "uploading", "publishing")),
)  # fmt: skip


class Trigger(Faults):
    """Call back at one of the requests; answer a commit as late as told."""

    def __init__(self) -> None:
        super().__init__()
        self._waiting: tuple[re.Pattern[str], int, Callable[[], None]] | None = None
        self._turn = threading.Lock()
        self.pause = 0.0

    def arm(self, pattern: str, passed: int, call: Callable[[], None]) -> None:
        with self._turn:
            self._waiting = re.compile(pattern), passed, call

    def disarm(self) -> None:
        with self._turn:
            self._waiting = None

    def take(self, request: str) -> Fault | None:
        with self._turn:
            call = None
            if self._waiting is not None and self._waiting[0].search(request):
                pattern, passed, call = self._waiting
                self._waiting = None if passed == 0 else (pattern, passed - 1, call)
                call = call if passed == 0 else None
        if call is not None:
            threading.Thread(target=call, daemon=True).start()
        if "commit" in request:
            time.sleep(self.pause)
        return super().take(request)


@dataclass
class Tally:
    """What came of the signals of a kind of moment."""

    sent: int = 0
    stopped: int = 0
    finished: int = 0


@dataclass
class Bench:
    """What all lanes share.

    Attributes:
        model: on the Hub as org/model.
        made: an output of it, for `push`.
        disk: the smallest bound under which it can be converted and leave.
        seconds: that an undisturbed run takes.
        published, here: by route, what an undisturbed run publishes, and leaves here.
    """

    place: Path
    model: Path
    made: Path
    wanted: int
    disk: str = ""
    seconds: dict[str, float] = field(default_factory=dict)
    published: dict[str, dict[str, bytes]] = field(default_factory=dict)
    here: dict[str, dict[str, bytes]] = field(default_factory=dict)
    tallies: dict[str, Tally] = field(default_factory=dict)
    kinds: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    resumed: int = 0
    slowest: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def sent(self) -> int:
        return sum(tally.sent for tally in self.tallies.values())


class Round:
    """One output, from the first attempt to the last: a Hub and a directory of its own."""

    def __init__(self, bench: Bench, route: Route, place: Path, chance: random.Random) -> None:
        self.bench, self.route, self.random = bench, route, chance
        self.work, self.home, self.temporary = place / "work", place / "home", place / "tmp"
        for directory in (self.work, self.temporary):
            directory.mkdir(parents=True)
        if route.name == "push":
            shutil.copytree(bench.made, self.work / "made")
        self.trigger = Trigger()
        self.hub = Hub(place / "hub")
        self.hub.faults = self.trigger
        self.hub.add("org/model", bench.model)

    def __enter__(self) -> Round:
        return self

    def __exit__(self, *_: object) -> None:
        self.hub.__exit__()

    @property
    def workspace(self) -> Path:
        return self.work / self.route.workspace

    def start(self, *options: str) -> subprocess.Popen[str]:
        disk = (
            ("--disk", self.bench.disk) if self.bench.disk and self.route.name == "leaves" else ()
        )
        environment = self.hub.environment(self.home)
        return subprocess.Popen(
            [NF4, *self.route.arguments, *disk, *options], cwd=self.work, text=True,
            env={**environment, "TMPDIR": str(self.temporary)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def published(self) -> dict[str, bytes]:
        repo = self.hub.store.repos.get(REPO)
        return {n: f.place.read_bytes() for n, f in repo.head.items()} if repo else {}

    def here(self) -> dict[str, bytes]:
        return contents(self.work / self.route.output) if self.route.output else {}

    def done(self) -> int:
        """Return how many weights the journal says are finished."""
        journal = self.workspace / "journal"
        if not self.route.workspace or not journal.exists():
            return 0
        lines = journal.read_bytes().split(b"\n")[1:-1]
        return len({json.loads(line[17:])["weight"] for line in lines if b'"weight":' in line})

    def interrupt(self, *options: str) -> bool:
        """Start, stop at a random moment, look; returns whether it was stopped, not finished."""
        bench, before, there = self.bench, self.done(), self.left() or bool(self.here())
        process = self.start(*options)
        moment, sent = Moment(self, process), -1.0
        try:
            moment.wait()
            if not moment.fire():
                stdout, stderr = process.communicate(timeout=300)
                require(process.returncode == 0, f"undisturbed: {process.returncode}: {stderr}")
                return False
            sent = time.monotonic()
            if moment.second is not None:
                time.sleep(moment.second)
                moment.fire()
            stdout, stderr = process.communicate(timeout=300)
        finally:
            self.trigger.disarm()
            process.kill()
        took = time.monotonic() - sent
        with bench.lock:
            tally = bench.tallies.setdefault(moment.phase, Tally())
            tally.sent += 1
            tally.stopped += process.returncode == INTERRUPTED
            tally.finished += process.returncode == 0
            bench.kinds[moment.number.name] += 1
            bench.slowest = max(bench.slowest, took)
        what = f"{self.route.name}, {moment}: exit code {process.returncode}, {took:.1f} s"
        self.check(process.returncode, stderr, stdout, before, there, what)
        require(took < LONGEST, f"{what}: too slow")
        return process.returncode != 0

    def left(self) -> bool:
        """Return whether unfinished work is kept."""
        return bool(self.route.workspace) and self.workspace.exists()

    def check(
        self, code: int, stderr: str, stdout: str, before: int, there: bool, what: str
    ) -> None:
        """Raise BrokenError unless what a signal left is as it must be.

        Args:
            before: finished weights that were kept when the run began.
            there: whether anything was.
        """
        left = [str(path.relative_to(self.work.parent)) for path in self.temporary.rglob("*")]
        what = f"{what}\nleft: {left}\n{stdout}{stderr}"
        require(code in (0, INTERRUPTED), what)
        require(not re.search("Traceback|Exception|Aborted|Fatal", stderr), f"noise: {what}")
        published, here = self.published(), self.here()
        require(not published or published == self.expected, f"half is published: {what}")
        require(not here or here == self.bench.here[self.route.name], f"half is here: {what}")
        require(not list(self.temporary.iterdir()), f"temporary files are left: {what}")
        kept = self.left()
        if code == 0:
            require(published == self.expected, f"0, and not published: {what}")
            require(not kept, f"0, and a workspace is left: {what}")
            return
        require("interrupted" in stderr, f"no word of it: {what}")
        told = "same command and --resume" in stderr
        require(kept == told or there, f"kept: {kept}, before: {there}: {what}")
        if "nothing was left behind" in stderr:
            require(there or not (here or kept), f"something was left: {what}")
        if here:
            require(
                "Publish it with nf4 push" in stderr or there,
                f"it does not say how to go on: {what}",
            )
        elif not published:
            require(self.done() >= before, f"finished weights are lost: {what}")

    @property
    def expected(self) -> dict[str, bytes]:
        return self.bench.published[self.route.name]

    def finish(self) -> None:
        """Go on to the end, and compare."""
        done, here = self.done(), self.here()
        process = self.start(*(("--resume",) if self.route.name != "push" else ()))
        stdout, stderr = process.communicate(timeout=300)
        what = f"{self.route.name}, continued: {process.returncode}\n{stdout}{stderr}"
        require(process.returncode == 0, what)
        require(self.published() == self.expected, f"other bytes are published: {what}")
        require(self.here() == self.bench.here[self.route.name], f"other bytes are here: {what}")
        names = {p.name for p in self.work.iterdir()} - {self.route.output, "made"}
        require(not names, f"{names} are left: {what}")
        require(not list(self.temporary.iterdir()), f"temporary files are left: {what}")
        if done and not here:
            found = THERE.search(stderr)
            there = int(found[1].replace(",", "")) if found else 0
            require(there == done, f"{done} weights were done, {there} were kept: {what}")
            with self.bench.lock:
                self.bench.resumed += done
        puts = [r for r in self.hub.requests("PUT /upload") if r.status == 200]
        sent = Counter(r.path.split("?")[0] for r in puts)
        twice = [path for path, count in sent.items() if count > 1]
        require(not twice, f"sent twice: {twice}: {what}")


class Moment:
    """When a process is stopped, and by what."""

    def __init__(self, turn: Round, process: subprocess.Popen[str]) -> None:
        self._turn, self._process, self.random = turn, process, turn.random
        self.number = self.random.choice(STOP)
        self.second = self.random.uniform(0, 0.3) if self.random.random() < 1 / 3 else None
        self._due = threading.Event()
        self.phase = self.random.choice(("at any time", "starting", *turn.route.phases))
        turn.hub.rate = self.random.choice((None, 3e6, 10e6))
        turn.trigger.pause = self.random.choice((0.0, 0.1, 0.4))
        self.delay = self.random.choice((0.0, self.random.uniform(0, 0.3)))
        if self.phase in PHASES:
            passed = 0 if self.phase == "publishing" else int(self.random.expovariate(1 / 5))
            turn.trigger.arm(PHASES[self.phase], passed, self._due.set)
        elif self.phase == "starting":
            self.delay = self.random.uniform(0, 1.5)
            self._due.set()
        else:
            self.delay = self.random.uniform(0, 1.5 * turn.bench.seconds[turn.route.name])
            self._due.set()

    def __str__(self) -> str:
        return f"{self.number.name} {self.phase} + {self.delay:.3f} s, then {self.second}"

    def wait(self) -> None:
        """Wait until it has come, or the process has ended."""
        while self._process.poll() is None and not _catches(self._process.pid):
            time.sleep(0.001)
        while self._process.poll() is None and not self._due.wait(0.01):
            pass
        until = time.monotonic() + self.delay
        while self._process.poll() is None and (left := until - time.monotonic()) > 0:
            time.sleep(min(0.01, left))

    def fire(self) -> bool:
        """Send the signal; False where nobody is there any more."""
        if self._process.poll() is not None:
            return False
        self._process.send_signal(self.number)
        return True


def _catches(pid: int) -> bool:
    """Return whether a process takes SIGTERM itself; before that Python itself begins, and nothing
    is there to be lost."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return True
    caught = re.search(r"^SigCgt:\s*([0-9a-f]+)", status, re.MULTILINE)
    return caught is None or bool(int(caught[1], 16) >> (signal.SIGTERM - 1) & 1)


def undisturbed(bench: Bench) -> None:
    """Learn what a run publishes that nothing happens to."""
    for route in ROUTES:
        with new_round(bench, route, random.Random(0), "undisturbed") as turn:
            if not bench.disk:
                done = turn.start("--plan", "--json").communicate()[0]
                bench.disk = str(json.loads(done)["hub"]["smallest_disk_bytes_when_pushed"])
            started = time.monotonic()
            process = turn.start()
            _, stderr = process.communicate(timeout=300)
            require(process.returncode == 0, stderr)
            bench.seconds[route.name] = time.monotonic() - started
            bench.published[route.name] = turn.published()
            bench.here[route.name] = turn.here()


@contextmanager
def new_round(bench: Bench, route: Route, chance: random.Random, name: str) -> Iterator[Round]:
    place = bench.place / name
    try:
        with Round(bench, route, place, chance) as turn:
            yield turn
    finally:
        shutil.rmtree(place, ignore_errors=True)


def lane(bench: Bench, number: int, seed: int) -> None:
    """Run round after round, until enough signals were sent."""
    chance = random.Random(f"{seed} {number}")
    while bench.sent < bench.wanted:
        route = chance.choice((*ROUTES[:1], *ROUTES))  # the first twice as often
        try:
            with new_round(bench, route, chance, f"lane-{number}") as turn:
                going_on = route.name != "push"
                options: tuple[str, ...] = ()
                for _ in range(chance.choice((1, 2, 4, 6))):
                    if not turn.interrupt(*options) or bench.sent >= bench.wanted:
                        break
                    options = ("--resume",) if going_on else ()
                turn.finish()
        except BrokenError as broken:
            bench.failures.append(str(broken))
            print(f"FAILED: {broken}", file=sys.stderr, flush=True)


@contextmanager
def busy(count: int) -> Iterator[None]:
    """Run processes that do nothing but take the processors."""
    burning = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in burning:
            process.kill()
            process.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--signals", type=int, default=300)
    parser.add_argument("--lanes", type=int, default=4, help="runs at a time")
    parser.add_argument("--busy", type=int, default=2, help="processes that load the machine")
    parser.add_argument("--megabytes", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="nf4-signals-") as name:
        place = Path(name)
        model, made = make_source(place, arguments.megabytes, shards=8), place / "made"
        subprocess.run([NF4, "quantize", "-q", model, made, *SMALL], check=True)
        bench = Bench(place, model, made, arguments.signals)
        undisturbed(bench)
        lanes = [
            threading.Thread(target=lane, args=(bench, number, arguments.seed))
            for number in range(arguments.lanes)
        ]
        with busy(arguments.busy):
            for thread in lanes:
                thread.start()
            for thread in lanes:
                thread.join()
    print("| moment | signals | stopped with 130 | had finished, 0 |\n|---|---|---|---|")
    for phase, tally in sorted(bench.tallies.items()):
        print(f"| {phase} | {tally.sent} | {tally.stopped} | {tally.finished} |")
    stopped = sum(tally.stopped for tally in bench.tallies.values())
    finished = sum(tally.finished for tally in bench.tallies.values())
    print(f"| all | {bench.sent} | {stopped} | {finished} |\n")
    print(
        f"{dict(bench.kinds)}; {bench.resumed:,} finished weights were found again; the slowest "
        f"took {bench.slowest:.1f} s to stop; seed {arguments.seed}, "
        f"{time.monotonic() - started:.0f} s, {len(bench.failures)} failures"
    )
    return int(bool(bench.failures))


if __name__ == "__main__":
    sys.exit(main())
