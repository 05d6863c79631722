"""Break nf4 in mid-run, in every way a machine can, and see that nothing is lost or wrong.

    python scripts/faults.py [--kills 200] [--points 150] [--seed 0] [--megabytes 450]

Runs the installed `nf4` on a checkpoint made for it.  After every fault the output must be absent
or whole; `--resume` must give the files of a run that nothing happened to, byte for byte; work that
an earlier run finished must not be done again.  Prints a table; ends with 1 if that did not hold.
Faults come from signals and from tests/faults/faulty_io.c, preloaded under the real process.  Linux
only; needs a C compiler.  The full disk needs root (a small tmpfs).
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from faults_bench import (
    INPUT,
    INTERRUPTED,
    MACHINE,
    NF4,
    USAGE,
    Bench,
    BrokenError,
    contents,
    make_bench,
    require,
)


@dataclass
class Row:
    """A line of the table: a kind of fault, how often it was tried and survived."""

    what: str
    tried: int = 0
    survived: int = 0
    failures: list[str] = field(default_factory=list)


# -- the faults: each does one thing to a run, then everything must still hold ---------------------


def kill(bench: Bench) -> None:
    """kill -9 at a random moment, and again while it is continued."""
    wanted = bench.random.choice((1, 1, 2, 3))
    while wanted:
        process = bench.start(*(("--resume",) if bench.workspace.exists() else ()))
        time.sleep(bench.random.uniform(0.05, bench.seconds))
        process.kill()
        process.communicate()
        bench.check_half()
        if process.returncode == 0:  # it was quicker than we
            bench.clean()
        else:
            wanted -= 1
    bench.finish()


def kill_at(bench: Bench) -> None:
    """kill -9 instead of a random write, sync, rename or removal of the run."""
    number = bench.random.randint(1, bench.calls)
    code, _ = bench.run(fault=f"any kill {number} out")
    require(code in (-signal.SIGKILL, 0), f"ended with {code}")
    bench.check_half()
    bench.finish()


def interrupt(bench: Bench) -> None:
    """Ctrl-C or a polite kill: within a second, with a message that says how to go on."""
    process = bench.start()
    time.sleep(bench.random.uniform(0.25, 0.9 * bench.seconds))
    sent = time.monotonic()
    process.send_signal(bench.random.choice((signal.SIGINT, signal.SIGTERM)))
    _, stderr = process.communicate(timeout=60)
    took = time.monotonic() - sent
    if process.returncode != 0:  # it had not finished
        require(process.returncode == INTERRUPTED, f"ended with {process.returncode}: {stderr}")
        require(took < 1.0, f"it took {took:.2f} s to stop")
        kept = "--resume" in stderr
        require(kept or "nothing was left behind" in stderr, f"it does not say: {stderr}")
        require(kept == bench.workspace.exists(), "what it says is not so")
    bench.check_half()
    bench.finish()


def failing(operation: str, mode: str, where: str, most: int) -> Callable[[Bench], None]:
    def fail(bench: Bench) -> None:
        number = bench.random.randint(1, most)
        code, stderr = bench.run(fault=f"{operation} {mode} {number} {where}")
        words = "No space left" if mode == "enospc" else "Input/output error"
        require(code == MACHINE, f"ended with {code}: {stderr}")
        require(words in stderr, f"the message is: {stderr}")
        bench.check_half()
        bench.finish()

    return fail


def short(operation: str, where: str) -> Callable[[Bench], None]:
    def run(bench: Bench) -> None:
        code, stderr = bench.run(fault=f"{operation} short 1 {where}")
        require(code == 0, f"ended with {code}: {stderr}")
        bench.require_same()
        bench.clean()

    return run


def change_source(bench: Bench) -> None:
    """Something writes to the source while it is read: never an output of half this, half that."""
    original, kept = bench.source, bench.place / "changing"
    shutil.copytree(original, kept / original.name)
    bench.source = kept / original.name
    try:
        shards = sorted(bench.source.glob("*.safetensors"))
        process = bench.start()
        time.sleep(bench.random.uniform(0.1, bench.seconds))
        shard = bench.random.choice(shards)
        before = shard.read_bytes()
        how = bench.random.choice(("byte", "append", "truncate", "replace"))
        if how == "byte":
            with shard.open("r+b") as file:
                file.seek(bench.random.randrange(len(before) // 2, len(before)))
                file.write(b"\x11")
        elif how == "append":
            with shard.open("ab") as file:
                file.write(b"more")
        elif how == "truncate":
            os.truncate(shard, len(before) // 2)
        else:
            (kept / "new").write_bytes(before[:-2] + b"\x11\x3c")
            (kept / "new").replace(shard)
        _, stderr = process.communicate(timeout=60)
        require("Traceback" not in stderr, stderr)
        if process.returncode == 0:  # it had read that file already, or not begun to
            if contents(bench.output) != contents(bench.reference):
                command = [NF4, "verify", "-q", bench.output, "--source", bench.source]
                require(subprocess.run(command, check=False).returncode == 0, "it is half and half")
        else:
            require(process.returncode in (INPUT, USAGE), f"{process.returncode}: {stderr}")
            require("changed" in stderr or "truncated" in stderr or "complete" in stderr, stderr)
            require(not bench.output.exists(), "an output is there")
    finally:
        bench.source = original
        shutil.rmtree(kept)
        bench.clean()


def change_source_between(bench: Bench) -> None:
    """A source changed while a run lay unfinished: refused, even when its times were put back."""
    original, kept = bench.source, bench.place / "changing"
    shutil.copytree(original, kept / original.name)
    bench.source = kept / original.name
    try:
        while not bench.done() or bench.output.exists():  # killed behind the last rename, too late
            bench.clean()
            process = bench.start()
            time.sleep(bench.random.uniform(0.4, 1.0) * bench.seconds)
            process.kill()
            process.communicate()
            if bench.output.exists():
                bench.require_same()
        first = sorted(bench.source.glob("*.safetensors"))[0]
        times = first.stat()
        with first.open("r+b") as file:  # the first weight, which is finished
            start = 8 + int.from_bytes(file.read(8), "little")
            file.seek(start + 2)
            file.write(b"\x11\x3c")
        os.utime(first, ns=(times.st_atime_ns, times.st_mtime_ns))
        code, stderr = bench.run("--resume")
        require(code == USAGE, f"ended with {code}: {stderr}")
        require("the source changed" in stderr, stderr)
        shutil.copyfile(original / first.name, first)
        bench.finish()
    finally:
        bench.source = original
        shutil.rmtree(kept)
        bench.clean()


def two_runs(bench: Bench) -> None:
    """A second run on the same output is refused; a killed one holds no lock."""
    first = bench.start()
    while not (bench.workspace / "files").exists():
        time.sleep(0.001)
    first.send_signal(signal.SIGSTOP)  # it is alive, and holds still
    code, stderr = bench.run("--resume")
    require(code == USAGE, f"the second ended with {code}: {stderr}")
    require("another run is writing" in stderr, stderr)
    first.kill()
    first.communicate()
    bench.check_half()
    bench.finish()


def damage(bench: Bench) -> None:
    """Finished work is damaged before the run is continued: found, and done again."""
    while not bench.done() or bench.output.exists():
        bench.clean()
        process = bench.start()
        time.sleep(bench.random.uniform(0.4, 1.0) * bench.seconds)
        process.kill()
        process.communicate()
    for shard in sorted((bench.workspace / "files").glob("*.safetensors")):
        with shard.open("r+b") as file:
            for _ in range(20):
                file.seek(bench.random.randrange(shard.stat().st_size))
                file.write(bytes([bench.random.randrange(256)]))
    code, stderr = bench.run("--resume")
    require(code == 0, f"ended with {code}: {stderr}")
    bench.require_same()
    bench.clean()


def full_disk(bench: Bench) -> None:
    """Another program fills the disk in mid-run; space comes back, and the run goes on."""
    original = bench.place
    with tmpfs(bench.place / "disk", sum(len(b) for b in contents(bench.reference).values())):
        bench.place = original / "disk"
        try:
            process = bench.start()
            while not list(bench.workspace.glob("files/*.safetensors")):
                require(process.poll() is None, "it ended too early")
                time.sleep(0.001)
            filler = bench.place / "filler"
            try:
                with filler.open("wb", buffering=0) as file:
                    while True:
                        file.write(b"\0" * 65536)
            except OSError:
                pass  # full
            _, stderr = process.communicate(timeout=60)
            require("Traceback" not in stderr, stderr)
            require(process.returncode in (0, MACHINE), f"{process.returncode}: {stderr}")
            require(process.returncode == 0 or "No space left" in stderr, stderr)
            bench.check_half()
            filler.unlink(missing_ok=True)
            bench.finish()
        finally:
            bench.place = original


@contextmanager
def tmpfs(place: Path, need: int) -> Iterator[None]:
    place.mkdir()
    size = int(need * 1.1) + 4_000_000
    try:
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)], check=True
        )
        try:
            yield
        finally:
            subprocess.run(["umount", "-l", str(place)], check=True)
    finally:
        place.rmdir()


# -- the table -------------------------------------------------------------------------------------


def plan(kills: int, points: int, others: int) -> list[tuple[str, int, Callable[[Bench], None]]]:
    rows = [
        ("kill -9 at a random moment", kills, kill),
        ("kill -9 in place of a random write, sync, rename or removal", points, kill_at),
        ("Ctrl-C or kill at a random moment", others, interrupt),
        ("disk full at a write", others, failing("write", "enospc", "out", 200)),
        ("disk full when room is reserved", 1, failing("allocate", "enospc", "out", 4)),
        ("disk full on a real file system, in mid-run", others, full_disk),
        ("I/O error at a write", others, failing("write", "eio", "out", 200)),
        ("I/O error at a sync", others, failing("sync", "eio", "out", 6)),
        ("I/O error at a read of the source", others, failing("read", "eio", "model-", 100)),
        ("I/O error at a rename", 1, failing("rename", "eio", "out", 1)),
        ("every write short", 1, short("write", "out")),
        ("every read short", 1, short("read", "model-")),
        ("the source changes while it is read", others, change_source),
        ("the source changes before the run is continued", others, change_source_between),
        ("finished work damaged before the run is continued", others, damage),
        ("two runs on one output", 1, two_runs),
    ]
    if os.geteuid() != 0:
        rows = [row for row in rows if row[2] is not full_disk]
        print("left out: the full disk on a real file system, which needs root to mount one")
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--points", type=int, default=150, help="kills at a system call")
    parser.add_argument("--others", type=int, default=10, help="faults of each other kind")
    parser.add_argument("--megabytes", type=int, default=450)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="nf4-faults-") as place:
        bench = make_bench(Path(place), arguments.megabytes, arguments.seed)
        print(f"a run takes {bench.seconds:.2f} s; seed {arguments.seed}", flush=True)
        rows = []
        for what, times, fault in plan(arguments.kills, arguments.points, arguments.others):
            row = Row(what)
            for _ in range(times):
                row.tried += 1
                try:
                    fault(bench)
                    row.survived += 1
                except BrokenError as broken:
                    row.failures.append(str(broken))
                    bench.clean()
            rows.append(row)
            print(f"{row.survived}/{row.tried} {row.what}", file=sys.stderr, flush=True)
    print("\n| fault | tried | survived |\n|---|---|---|")
    for row in rows:
        print(f"| {row.what} | {row.tried} | {row.survived} |")
    print(
        f"| all | {sum(r.tried for r in rows)} | {sum(r.survived for r in rows)} |\n\n"
        f"{bench.resumed:,} finished weights were found again, none was converted twice."
    )
    for row in rows:
        for failure in row.failures:
            print(f"FAILED: {row.what}: {failure}")
    return int(any(row.failures for row in rows))


if __name__ == "__main__":
    sys.exit(main())
