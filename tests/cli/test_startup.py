"""What a command imports before it answers, values that typer need not convert, and the end."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from helpers import LLAMA, llama_tensors, nf4_ok, write_checkpoint_dir
from typer.main import get_command

from nf4cli.cli import app, quick_typer

NUMERICAL = {"numpy", "torch", "safetensors", "blake3", "xxhash", "yaml"}
OF_SHELL = {"pydantic", "rich.markdown", "rich.traceback", "pygments"}
ELSEWHERE = {"huggingface_hub", "asyncio", "transformers", "cupy", "urllib.request"}
COMMANDS = "quantize verify dequantize inspect attest push eval".split()
RUN = """
import atexit, sys
def tell():
    print("MODULES", *sys.modules, file=sys.stderr)
atexit.register(tell)
from nf4cli.__main__ import main
sys.argv = ["nf4", *sys.argv[1:]]
main()
"""


def modules_of(*words: object) -> tuple[int, set[str]]:
    """Return a command's exit code, and the modules that it imported."""
    done = subprocess.run(
        [sys.executable, "-I", "-c", RUN, *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
    )
    *_, last = done.stderr.splitlines()
    first, *modules = last.split()
    assert first == "MODULES", done.stderr
    return done.returncode, set(modules)


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--version"], 0),
        (["--help"], 0),
        *[([name, "--help"], 0) for name in COMMANDS],
        (["nosuch"], 2),
        (["--bogus"], 2),
        *[([name, "--bogus"], 2) for name in COMMANDS],
        (["inspect"], 2),
        (["inspect", "", "--json"], 2),
        (["inspect", "/nowhere/at/all"], 3),
        (["inspect", "/nowhere/at/all", "--json"], 3),
        (["inspect", "/nowhere/at/all", "a.weight"], 3),
        (["quantize", "/nowhere/at/all", "out"], 3),
        (["quantize", "/nowhere/at/all", "out", "--blocksize", "128", "--workers", "2"], 3),
        (["quantize", "/nowhere/at/all", "out", "--public"], 2),
        (["quantize", "/nowhere/at/all", "out", "--memory", "much"], 2),
        (["quantize", "/", "out", "--blocksize", "33"], 2),
        (["quantize", "/", "out", "--max-shard-size", "1"], 2),
        (["verify", "/nowhere/at/all"], 3),
        (["verify", "/nowhere/at/all", "--seed", "1"], 2),
        (["dequantize", "/nowhere/at/all", "out"], 3),
        (["attest", "/nowhere/at/all"], 3),
        (["push", "/nowhere/at/all", "me/model"], 3),
        (["quantize", "/nowhere/at/all", "--blocksize", "x"], 2),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_help_and_refusals_import_nothing_heavy(words, code):
    found, modules = modules_of(*words)
    assert found == code
    assert not modules & (NUMERICAL | OF_SHELL | ELSEWHERE)


def test_the_command_that_is_asked_for_is_imported_alone():
    _, modules = modules_of("push", "--help")
    assert "nf4cli.cli.push" in modules
    assert not {f"nf4cli.cli.{name}" for name in COMMANDS} & modules - {"nf4cli.cli.push"}


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_a_look_at_an_output_imports_no_framework(tmp_path, command):
    write_checkpoint_dir(tmp_path / "model", llama_tensors(), LLAMA)
    nf4_ok("quantize", tmp_path / "model", tmp_path / "out")
    code, modules = modules_of(command, tmp_path / "out")
    assert code == 0
    assert not modules & (ELSEWHERE | OF_SHELL | {"torch"})


TEXTS = [
    *("", "x", "there", "./there/", "a/../b", "0", "7", "007", "-3", "+5", "1.5", ".5", "5."),
    *("1e3", "1_000", " 8 ", "\u00b2", "9" * 40, "nan", "inf", "nf4", "5GB"),
]


def options() -> list:
    """Every option and argument of the commands, with the name of its command."""
    command = get_command(app)
    return [
        pytest.param(name, number, id=f"{name} {param.name}")
        for name in COMMANDS
        for number, param in enumerate(command.commands[name].params)
    ]


@pytest.mark.parametrize(("name", "number"), options())
def test_a_value_is_what_typer_makes_of_it(tmp_path, monkeypatch, name, number):
    """Plain values too are converted as typer converts them, and it refuses all that it would."""
    monkeypatch.chdir(tmp_path)
    Path("there").mkdir()
    own = get_command(app).commands[name].params[number]
    (quick,) = quick_typer.converting_quickly([own])
    plain = get_command(app).commands[name].params[number]
    for text in TEXTS:
        value = [text, text] if own.multiple else text
        found, expected = outcome(quick, value), outcome(plain, value)
        if "number" in found:  # in shorter words
            found, expected = (words.partition(":")[0] for words in (found, expected))
        assert found == expected, text
    assert outcome(quick, own.default) == outcome(plain, own.default)


def outcome(param, value) -> str:
    """The value of a parameter with its type, or the message that refuses it."""
    try:
        return repr(param.get_runtime_param().coerce(value, param=param, ctx=None))
    except Exception as error:
        return f"{type(error).__name__}: {error}"


@pytest.mark.parametrize(
    ("late", "code", "out"),
    [
        ("sys.exit(3)", 3, ""),
        ("print('all', end=''); sys.exit(0)", 0, "all"),
        ("sys.exit('why')", 1, ""),
        ("sys.exit(300)", 300 & 0xFF, ""),
        ("threading.Timer(0.2, print, ['later']).start(); sys.exit(2)", 2, "later\n"),
        ("atexit.register(print, 'end'); sys.exit()", 0, "end\n"),
        ("raise ValueError", 1, ""),
    ],
)
def test_the_process_ends_with_nothing_left_out(late, code, out):
    text = (
        "import atexit, sys, threading, nf4cli.cli, nf4cli.__main__\n"
        f"def command(): {late}\n"
        "nf4cli.cli.main = command\n"
        "nf4cli.__main__.main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", text], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (code, out)
    assert ("why" in done.stderr) == ("why" in late)
    assert ("ValueError" in done.stderr) == ("ValueError" in late)


@pytest.mark.parametrize("stopped", [False, True])
def test_threads_left_behind_are_not_broken_off_in_native_code(stopped):
    """Python's own end once did that to an upload, and the process ended by SIGSEGV."""
    text = (
        "import os, sys, threading, nf4cli.cli, nf4cli.__main__\n"
        "end = os._exit\n"
        "os._exit = lambda code: (os.write(1, b'at once'), end(code))\n"
        "def command():\n"
        "    threading.Thread(target=threading.Event().wait, daemon=True).start()\n"
        f"    nf4cli.stopping.was_raised = lambda: {stopped}\n"
        "    sys.exit(3)\n"
        "nf4cli.cli.main = command\n"
        "nf4cli.__main__.main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", text], capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (3, "at once", "")
