"""What machines read: documents that match their schemas, and every exit code, provoked."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import LLAMA, UP, llama_tensors, nf4, nf4_ok, nf4_process, write_checkpoint_dir
from schemas import SCHEMAS, closed, document, validator

from nf4cli.checkpoint.discovery import MANIFEST
from nf4cli.cli.show import terminal

PAGE = (SCHEMAS.parent / "machine.md").read_text()


# -- documents --------------------------------------------------------------------------------


def test_every_command_of_a_checkpoint(llama, tmp_path):
    out = tmp_path / "out"
    document(nf4_ok("quantize", llama, out, "--plan", "--json"), "plan")
    done = document(nf4_ok("quantize", llama, out, "--json"), "quantize")
    assert len(done["errors"]) == 14
    assert document(nf4_ok("verify", out, "--json"), "verify")["source"] is None
    document(nf4_ok("verify", out, "--source", llama, "--json"), "verify")
    document(nf4_ok("inspect", out, "--json"), "inspect")
    document(nf4_ok("inspect", llama, "--json"), "inspect")
    for tensor in (UP, f"{UP}.absmax", "lm_head.weight"):
        document(nf4_ok("inspect", out, tensor, "--json"), "tensor")
    document(nf4_ok("dequantize", out, tmp_path / "back", "--json"), "dequantize")
    made = document(nf4_ok("attest", out, tmp_path / "a.json", "--json"), "attest")
    assert made["statement"] == str(tmp_path / "a.json")


def test_every_command_of_a_pipeline(pipeline, tmp_path):
    pipe, out = pipeline / "pipe", pipeline / "out"
    document(nf4_ok("quantize", pipe, tmp_path / "x", "--plan", "--json"), "plan")
    assert document(nf4_ok("verify", out, "--json"), "verify")["components"]
    assert document(nf4_ok("inspect", out, "--json"), "inspect")["components"]
    document(nf4_ok("inspect", out, "transformer.proj_out", "--json"), "tensor")
    back = document(nf4_ok("dequantize", out, tmp_path / "back", "--json"), "dequantize")
    assert back["decoded"] == sum(part["decoded"] for part in back["components"].values())
    assert document(nf4_ok("attest", out, tmp_path / "a.json", "--json"), "attest")["ok"]


def test_a_failed_check_is_a_document_with_ok_false(llama_nf4, tmp_path):
    out = shutil.copytree(llama_nf4, tmp_path / "out")
    (out / "tokenizer.json").write_text("[]")
    for command, kind in (("verify", "verify"), ("attest", "attest")):
        done = nf4(command, out, "--json")
        assert done.returncode == 1
        found = document(done.stdout, kind)
        assert not found["ok"]
        assert [f["where"] for f in found["findings"]] == ["tokenizer.json"]


def test_closing_a_schema_closes_all_of_it():
    schema = {"properties": {"a": {"items": [{"properties": {"b": {}}}]}}, "$defs": {"c": {}}}
    assert closed(schema) == {
        "properties": {
            "a": {"items": [{"properties": {"b": {}}, "additionalProperties": False}]}
        },
        "$defs": {"c": {}}, "additionalProperties": False,
    }  # fmt: skip
    with pytest.raises(Exception, match="Additional properties"):
        validator("error").validate(
            {"nf4": "error", "version": 1, "error": {"exit_code": 2, "message": "", "more": 1}}
        )


def test_the_page_names_every_schema_and_every_schema_is_used():
    names = {path.name for path in SCHEMAS.iterdir()}
    assert names == {f"{kind}.schema.json" for kind in
                     ("plan", "quantize", "verify", "dequantize", "inspect", "tensor", "attest",
                      "push", "error", "statement", "eval", "diff", "recipe")}  # fmt: skip
    missing = [name for name in names if f"schemas/{name}" not in PAGE]
    assert not missing


def test_a_document_is_ascii_and_has_no_lone_surrogate(capsys):
    terminal.print_json("inspect", {"name": "é\udcff\U0001f600\x7f"})
    text = capsys.readouterr().out
    assert text.isascii()
    assert json.loads(text)["name"] == "é\ufffd\U0001f600\x7f"


def test_a_figure_that_json_cannot_hold_is_a_bug_not_a_document(capsys):
    with pytest.raises(ValueError, match="not JSON compliant"):
        terminal.print_json("inspect", {"bits_per_weight": float("inf")})
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("value", ["NaN", "Infinity", "1e999", "true", '"0.1"'])
def test_a_manifest_cannot_bring_infinity_into_a_document(llama_nf4, tmp_path, value):
    out = shutil.copytree(llama_nf4, tmp_path / "out")
    manifest = json.loads((out / MANIFEST).read_text())
    manifest["tensors"][UP]["error"]["rel_rmse"] = "HERE"
    (out / MANIFEST).write_text(json.dumps(manifest).replace('"HERE"', value))
    done = nf4("inspect", out, "--json")
    assert done.returncode == 3
    assert "damaged" in document(done.stdout, "error")["error"]["message"]


# -- exit codes -------------------------------------------------------------------------------

COMMANDS = {
    "quantize": ("quantize", "model", "new"),
    "plan": ("quantize", "model", "new", "--plan"),
    "verify": ("verify", "out"),
    "dequantize": ("dequantize", "out", "new"),
    "inspect": ("inspect", "out"),
    "tensor": ("inspect", "out", UP),
    "attest": ("attest", "out", "new"),
}


@pytest.fixture(scope="module")
def place(llama, llama_nf4, tmp_path_factory) -> Path:
    """A working directory that no command here changes: a source, an output, and what is wrong."""
    root = tmp_path_factory.mktemp("codes")
    (root / "model").symlink_to(llama)
    shutil.copytree(llama_nf4, root / "out")
    shutil.copytree(llama_nf4, root / "bad")
    data = bytearray((root / "bad/model.safetensors").read_bytes())
    data[-20_000] ^= 1
    (root / "bad/model.safetensors").write_bytes(data)
    (root / "empty").mkdir()
    write_checkpoint_dir(root / "cut", llama_tensors(), LLAMA)
    with (root / "cut/model.safetensors").open("r+b") as file:
        file.truncate(20_000)
    return root


def fails(code: int, place: Path, *arguments: str, env: dict[str, str] | None = None) -> None:
    """The command ends with `code`, a message and a document.

    Without --json the same end has no document: test_bad_input.py and test_bad_places.py have many.
    """
    before = sorted(place.rglob("*"))
    if env is None:
        done = nf4(*arguments, "--json", cwd=place)
    else:
        done = nf4_process(*arguments, "--json", cwd=place, env={**os.environ, **env})
    assert done.returncode == code, f"{done.returncode}: {done.stdout}{done.stderr}"
    assert "Traceback" not in done.stderr
    if code == 1:
        assert not json.loads(done.stdout)["ok"]
    else:
        error = document(done.stdout, "error")["error"]
        assert error["exit_code"] == code
        assert " ".join(error["message"].split())[:40] in " ".join(done.stderr.split())
    assert sorted(place.rglob("*")) == before


@pytest.mark.parametrize("command", ["verify", "attest"])
def test_exit_code_1_a_check_failed(place, command):
    fails(1, place, command, "bad")
    assert nf4(command, "bad", cwd=place).returncode == 1


@pytest.mark.parametrize("command", COMMANDS)
def test_exit_code_2_usage(place, command):
    fails(2, place, *COMMANDS[command], "--bogus")
    done = nf4(*COMMANDS[command], "--bogus", cwd=place)
    assert (done.returncode, done.stdout) == (2, "")


@pytest.mark.parametrize("words", [("inspect", ""), ("verify", "out", "--source=")], ids=repr)
def test_exit_code_2_a_variable_of_the_shell_that_is_not_set(place, words):
    """As a path, nothing is the directory we are in: a model, here."""
    fails(2, place, *words)
    done = nf4(*words, cwd=place / "out")
    assert done.returncode == 2
    assert "is its shell variable set?" in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("quantize",),
        ("quantize", "model", "out"),
        ("quantize", "model", "new", "--keep", "nothing.like.this"),
        ("verify", "out", "--workers", "many"),
        ("verify", "out", "--junit", "empty"),
        ("verify", "out", "--junit", "out/report.xml"),
        ("verify", "out", "--memory", "much"),
        ("dequantize", "out", "model"),
        ("inspect", "out", "no.such.tensor"),
        ("attest", "out", "out/statement.json"),
        ("attest", "out", "cut/config.json"),
        ("attest", "out", "new", "--builder-id", "me"),
        ("unknown",),
    ],
    ids=" ".join,
)
def test_exit_code_2_options_that_do_not_fit(place, arguments):
    fails(2, place, *arguments)


@pytest.mark.parametrize(
    ("command", "path"),
    [*((command, "cut") for command in COMMANDS if command != "verify"),
     *((command, "nowhere") for command in ("quantize", "verify", "inspect", "attest")),
     ("verify", "empty"), ("attest", "empty")],
)  # fmt: skip
def test_exit_code_3_bad_input(place, command, path):
    words = COMMANDS[command]
    fails(3, place, words[0], path, *words[2:])


@pytest.mark.parametrize(
    ("command", "options"), [*((command, ("--json",)) for command in COMMANDS), ("inspect", ())]
)
def test_exit_code_4_stdout_is_a_full_disk(place, tmp_path, command, options):
    words = [str(place / w) if w in ("model", "out") else w for w in COMMANDS[command]]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [Path(sys.executable).with_name("nf4"), *words, *options],
            stdout=full, stderr=subprocess.PIPE, text=True, cwd=tmp_path, check=False,
        )  # fmt: skip
    assert done.returncode == 4, done.stderr
    assert "cannot be written to stdout: No space left" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("quantize", "model", "new", "--engine", "cuda"),
        ("verify", "out", "--engine", "cuda"),
        ("verify", "out", "--junit", "nowhere/report.xml"),
        ("dequantize", "out", "new", "--engine", "cuda"),
        ("attest", "out", "nowhere/statement.json"),
    ],
    ids=" ".join,
)
def test_exit_code_4_the_machine(place, arguments):
    fails(4, place, *arguments, env={"CUDA_VISIBLE_DEVICES": ""})


SIGNALLED = """
import os, signal, time
import nf4cli.output.listed_files, nf4cli.checkpoint.discovery
def interrupted(*_):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(1)  # the main thread hears it, wherever this runs
nf4cli.checkpoint.discovery.read_shard = nf4cli.output.listed_files.digests_of_file = interrupted
from nf4cli.cli import main
main()
"""


@pytest.mark.parametrize("command", COMMANDS)
def test_exit_code_130_interrupted(place, command):
    """A polite kill in the middle of the reading; test_bad_places.py has the writing."""
    before = sorted(place.rglob("*"))
    done = subprocess.run(
        [sys.executable, "-c", SIGNALLED, *COMMANDS[command], "--json"],
        cwd=place, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 130, done.stderr
    assert document(done.stdout, "error")["error"]["exit_code"] == 130
    assert "interrupted" in done.stderr
    assert sorted(place.rglob("*")) == before
