"""Ctrl-C and SIGTERM: heard once, wherever they come, and nothing is broken off by them."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BEGIN = """
import gc, os, signal, sys, threading, time
from nf4cli import stopping
from nf4cli.errors import InterruptedRunError, MachineError
from nf4cli.threads import run

def send(number=signal.SIGTERM):
    os.kill(os.getpid(), number)
    time.sleep(0.05)  # the main thread hears it at the next line

stopping.listen()
"""


def ends(script: str) -> str:
    """What a process says that runs a script with signals taken, and must end by itself."""
    done = subprocess.run(
        [sys.executable, "-c", BEGIN + textwrap.dedent(script)],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_no_thread_outlives_the_run_that_a_signal_stops(workers):
    """An exception within Thread.join has Python take a thread for ended that goes on: its files
    were closed under it, and a set changed while it was looped over ended a run with exit code 1.
    """
    said = ends(f"""
        left = []
        def make_worker():
            def worker(item):
                time.sleep(0.5)
                left.append(item)
            return worker
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
        try:
            with stopping.hearing():
                run(range(100), make_worker, {workers}, lambda: print("abort"))
        except InterruptedRunError:
            print(sorted(left))
        """)
    assert said == f"abort\n{list(range(workers))}\n"


def test_it_waits_for_the_end_of_what_holds_it_back():
    said = ends("""
        try:
            with stopping.hearing():
                with stopping.held_back():
                    send()
                    with stopping.held_back():
                        send(signal.SIGINT)
                    print("cleaned")
                print("never")
        except InterruptedRunError as error:
            print(error)
        send()  # the run is over
        """)
    assert said == "cleaned\ninterrupted\n"


def test_what_holds_it_back_may_hear_it_between_two_steps():
    said = ends("""
        try:
            with stopping.hearing(), stopping.held_back():
                send()
                print("step")
                stopping.check()
                print("never")
        except InterruptedRunError as error:
            print(error)
        """)
    assert said == "step\ninterrupted\n"


def test_it_comes_too_late_when_the_work_is_done():
    said = ends("""
        with stopping.hearing():
            with stopping.finishing():
                with stopping.finishing():
                    pass
                send()
            send()
            stopping.check()
        print("done")
        """)
    assert said == "done\n"


def test_an_error_of_the_work_is_told_as_it_is():
    said = ends("""
        try:
            with stopping.hearing(), stopping.finishing():
                send()
                raise MachineError("the disk is full")
        except MachineError as error:
            print(error)
        """)
    assert said == "the disk is full\n"


@pytest.mark.parametrize("made", ['ImportError("of it")', "SystemExit(1)"])
def test_what_a_library_makes_of_it_is_still_that(made):
    said = ends(f"""
        try:
            with stopping.hearing():
                try:
                    send()
                except BaseException as error:
                    raise {made} from error
        except InterruptedRunError as error:
            print(error)
        """)
    assert said == "interrupted\n"


def test_a_library_that_goes_on_after_every_exception_does_not_get_it():
    said = ends("""
        try:
            with stopping.hearing():
                try:
                    send()
                except Exception:
                    print("swallowed")
        except InterruptedRunError as error:
            print(error)
        """)
    assert said == "interrupted\n"


def test_a_destructor_does_not_swallow_it():
    """Python cannot raise there: it says "Exception ignored", and would go on."""
    said = ends("""
        class Thing:
            def __del__(self):
                send()
        begin = time.monotonic()
        try:
            with stopping.hearing():
                thing = Thing()
                del thing
                time.sleep(50)  # which the stop ends, as it ends a wait for the network
        except InterruptedRunError as error:
            print(error, time.monotonic() - begin < 25)
        """)
    assert said == "interrupted True\n"


def test_a_call_that_waits_for_the_network_is_left_behind():
    said = ends("""
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
        print(stopping.leave_behind(lambda: 6 * 7))
        try:
            with stopping.hearing():
                stopping.leave_behind(lambda: time.sleep(600))
        except InterruptedRunError as error:
            print(error)
        """)
    assert said == "42\ninterrupted\n"


def test_what_a_context_manager_makes_it_removes():
    said = ends("""
        class Place:
            def __enter__(self):
                send()
                print("made")
            def __exit__(self, *_):
                print("removed")
        try:
            with stopping.hearing(), stopping.whole(Place):
                print("never")
        except InterruptedRunError as error:
            print(error)
        """)
    assert said == "made\nremoved\ninterrupted\n"


def test_the_handlers_of_a_caller_come_back():
    said = ends("""
        stopping.ignore()  # as it was before, for this test
        stopping._state.reset()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with stopping.listening():
            assert signal.getsignal(signal.SIGTERM) is signal.getsignal(signal.SIGINT)
        print(int(signal.getsignal(signal.SIGTERM)), signal.getsignal(signal.SIGINT).__name__)
        """)
    assert said == "0 default_int_handler\n"


def test_signals_at_random_moments_of_runs_from_a_hub_to_a_hub():
    """scripts/signals.py, shortened."""
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "signals.py", "--signals", "10", "--busy", "0",
         "--seed", str(os.getpid())],
        capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 failures" in done.stdout
