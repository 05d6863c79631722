"""Hostile directories and hostile sizes: links, devices, files of 100 MB, time."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from attacks.make import one, raw
from attacks.running import COMMANDS, CPU, check, job, run
from fuzz.targets import tiny_model
from helpers import LLAMA, nf4, nf4_ok

from nf4cli.checkpoint import untrusted
from nf4cli.checkpoint.discovery import open_checkpoint
from nf4cli.checkpoint.reader import read_shard
from nf4cli.errors import InputError
from nf4cli.planning.skip_list import Names, hits_v5, skip_modules


@pytest.fixture
def place(tmp_path: Path, llama: Path) -> Path:
    """A directory with a model `m`, and secrets in `outside`."""
    shutil.copytree(llama, tmp_path / "m")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret.json").write_text('{"token": "hunter2"}')
    return tmp_path


def attack(place: Path, good: Path, code: int, words: str, *commands: str) -> None:
    for command in commands or ("quantize", "inspect"):
        (result,) = run([job(place, *COMMANDS[command])], good)
        check(result, place, {code})
        assert words in result.stderr, result.stderr


@pytest.mark.parametrize("target", ["../outside/secret.json", "/etc/passwd"])
def test_a_link_that_leads_out_is_not_published(place, llama_nf4, target):
    (place / "m" / "tokenizer.json").unlink()
    (place / "m" / "tokenizer.json").symlink_to(target)
    (place / "m" / "sub").mkdir()
    (place / "m" / "sub" / "vocab.txt").symlink_to(place / "outside" / "secret.json")
    (place / "m" / "all").symlink_to(place / "outside")
    (result,) = run([job(place, *COMMANDS["quantize"])], llama_nf4)
    check(result, place, {0})
    assert not (place / "out-quantize" / "tokenizer.json").exists()
    assert not (place / "out-quantize" / "sub").exists()
    assert not (place / "out-quantize" / "all").exists()
    assert {"all", "sub/vocab.txt", "tokenizer.json"} <= {*open_checkpoint(place / "m").left_files}
    assert "lead to something that is not the model's" in result.stdout


def test_a_config_that_leads_out_is_refused(place, llama_nf4):
    (place / "m" / "config.json").unlink()
    (place / "m" / "config.json").symlink_to("../outside/secret.json")
    attack(place, llama_nf4, 3, "which is not beside the model's weights")


def test_links_of_the_hubs_cache_are_the_models_own(place, llama_nf4):
    blobs, snapshot = place / "models--a--b" / "blobs", place / "models--a--b" / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    shutil.move(place / "m", blobs)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    nf4_ok("quantize", snapshot, "out", cwd=place)
    assert (place / "out" / "tokenizer.json").is_file()
    shutil.move(place / "out", place / "n")
    (place / "n").rename(blobs.parent / "new")
    other = blobs.parent / "snapshots" / "2"
    other.mkdir()
    for number, file in enumerate((blobs.parent / "new").iterdir()):
        file.rename(blobs / str(number))
        (other / file.name).symlink_to(Path("../../blobs") / str(number))
    nf4_ok("verify", other, "--source", snapshot, cwd=place)
    (snapshot / "evil.json").symlink_to(place / "outside" / "secret.json")
    assert open_checkpoint(snapshot).left_files == ("evil.json",)


def test_links_to_where_the_weights_lie_are_the_models_own(place):
    (place / "farm").mkdir()
    for file in (place / "m").iterdir():
        (place / "farm" / file.name).symlink_to(file)
    os.link(place / "outside" / "secret.json", place / "farm" / "vocab.json")
    seen = open_checkpoint(place / "farm")
    assert seen.extra_files == ("config.json", "tokenizer.json", "vocab.json")
    assert seen.config["model_type"] == "llama"


def test_a_fifo_and_a_loop_are_left(place, llama_nf4):
    os.mkfifo(place / "m" / "vocab.txt")
    os.mkfifo(place / "m" / "modules.json")
    (place / "m" / "loop.txt").symlink_to("loop.txt")
    (result,) = run([job(place, *COMMANDS["quantize"])], llama_nf4)
    check(result, place, {0})
    left = {"loop.txt", "modules.json", "vocab.txt"}
    assert left <= {*open_checkpoint(place / "m").left_files}


def put_no_file(path: Path, kind: str) -> None:
    path.unlink(missing_ok=True)
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to({"loop": path.name, "device": "/dev/zero", "fd": "/dev/stdin"}[kind])


def test_what_is_no_file(place, llama_nf4):
    """Where a file belongs: nothing waits, nothing is read."""
    jobs, cases = [], []
    for kind in ("fifo", "directory", "loop", "device", "fd"):
        for name in ("model.safetensors", "config.json", "model_index.json"):
            root = place / f"{kind}-{name}"
            shutil.copytree(place / "m", root / "m")
            put_no_file(root / "m" / name, kind)
            pipeline = name == "model_index.json"  # there is none then
            for command in ("quantize", "inspect", "verify", "dequantize"):
                jobs.append(job(root, *COMMANDS[command]))
                cases.append((root, {0, 3} if pipeline else {1, 3}))
            jobs.append(job(root, "inspect", f"m/{name}"))
            cases.append((root, {3}))
    for (root, codes), result in zip(cases, run(jobs, llama_nf4), strict=True):
        check(result, root, codes)


# -- sizes ------------------------------------------------------------------------------------


def header_of(count: int, entry: bytes) -> bytes:
    return b"{" + b",".join(entry % number for number in range(count)) + b"}"


EMPTY = b'"a.%d.weight":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'


def big(kind: str) -> bytes:
    """A safetensors file whose header is large."""
    if kind == "100 MB of tensors":
        return raw(header_of(1_500_000, EMPTY))
    if kind == "99 MB of metadata":
        return raw(b'{"__metadata__":{"a":"' + b"x" * 99_000_000 + b'"}}')
    if kind == "31 MB of metadata":
        return raw(b'{"__metadata__":{"a":"' + b"x" * 31_000_000 + b'"},' + EMPTY % 1 + b"}")
    if kind == "as many tensors as are read":
        return raw(header_of(untrusted.MAX_TENSORS, EMPTY))
    if kind == "as many dimensions as are read":
        shape = "[" + ",".join(["1"] * 1_900_000) + "]"
        return raw(one(shape=shape), bytes(4))
    assert kind == "one tensor more"
    return raw(header_of(untrusted.MAX_TENSORS + 3, EMPTY))


BIG_HEADERS = {
    "100 MB of tensors": ({3}, "no model has such a header"),
    "99 MB of metadata": ({3}, "no model has such a header"),
    "31 MB of metadata": ({0, 3}, ""),
    "as many tensors as are read": ({0, 3}, ""),
    "as many dimensions as are read": ({0, 3}, ""),
    "one tensor more": ({3}, "more than 100,000 tensors"),
}
INDEX = "model.safetensors.index.json"
BIG_JSON = {
    "config of 100 MB": ("config.json", b'{"a": "' + b"x" * 100_000_000 + b'"}', "larger than"),
    "config of lists": ("config.json", b'{"a": [' + b"[]," * 5_000_000 + b"0]}", "values"),
    "index of lists": (INDEX, b'{"a": [' + b"[]," * 19_000_000 + b"0]}", "values"),
    "index of spaces": (INDEX, b" " * 240_000_001, "larger than"),
}


def test_memory_on_large_files(place, llama_nf4):
    """No more than `MEMORY`, whatever the header's or the JSON's size."""
    jobs, cases = [], []
    for kind, (codes, words) in BIG_HEADERS.items():
        root = place / kind
        shutil.copytree(place / "m", root / "m")
        (root / "m" / "model.safetensors").write_bytes(big(kind))
        jobs += [job(root, *COMMANDS["inspect"]), job(root, *COMMANDS["quantize"])]
        cases += [(root, codes, words)] * 2
    for kind, (name, data, words) in BIG_JSON.items():
        root = place / kind
        shutil.copytree(place / "m", root / "m")
        if name == INDEX:
            (root / "m" / "model.safetensors").rename(root / "m" / "a.safetensors")
        (root / "m" / name).write_bytes(data)
        jobs.append(job(root, *COMMANDS["inspect"]))
        cases.append((root, {3}, words))
    for (root, codes, words), result in zip(cases, run(jobs, llama_nf4), strict=True):
        check(result, root, codes)
        assert words in result.stderr


def test_a_state_of_a_gigabyte(place, llama_nf4):
    """The file is sparse: a kilobyte in an archive."""
    key, size = "x.weight.quant_state.bits" + "andbytes__nf4", 1 << 30
    header = json.dumps({key: {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}})
    path = place / "m" / "model.safetensors"
    path.write_bytes(raw(header))
    os.truncate(path, path.stat().st_size + size)
    attack(place, llama_nf4, 3, "", "quantize", "dequantize")
    (result,) = run([job(place, *COMMANDS["inspect"])], llama_nf4)
    check(result, place, {0})


def test_names_that_would_match_for_ever():
    with pytest.raises(InputError, match="may never finish"):
        hits_v5("(a|aa)+$", "a" * 60 + "!")
    with pytest.raises(InputError, match="may never finish"):
        hits_v5("a*a*a*a*b", "a" * 60)
    assert hits_v5("model.layers.0", "model.layers.0.mlp")
    assert hits_v5(r".*\.proj", "model.x.proj")
    assert not hits_v5("model.layers.1", "model.layers.0.mlp")


def test_modules_that_have_nothing_in_common():
    """Telling every kept name from every packed one is quadratic."""
    words = ["".join(p) for p in itertools.product("abcdefghij", repeat=4)]
    kept, packed = [f"{w}.lm_head" for w in words[:5000]], [f"{w}.q" for w in words[5000:]]
    with pytest.raises(InputError, match="no model has that many"):
        skip_modules(kept, packed, Names())


def test_a_file_that_grows_while_it_is_read(place):
    path = place / "m" / "model.safetensors"
    stop = threading.Event()

    def grow() -> None:
        while not stop.is_set():
            with path.open("ab") as file:
                file.write(bytes(1000))
            time.sleep(0.0005)

    thread = threading.Thread(target=grow)
    thread.start()
    try:
        done = nf4("quantize", "m", "out", cwd=place)
    finally:
        stop.set()
        thread.join()
    assert done.returncode == 3, done.stderr
    assert "Traceback" not in done.stderr
    assert not (place / "out").exists()


# -- the limits themselves ---------------------------------------------------------------------


def test_what_we_write_stays_within_the_limits(place, monkeypatch):
    """A file is cut before it has more tensors, or a longer header, than we would read."""
    monkeypatch.setattr("nf4cli.checkpoint.writer.MAX_TENSORS", 10)
    from nf4cli.checkpoint.writer import fill_shards

    entries = [(f"a.{i}.weight", "F32", (1,)) for i in range(95)]
    assert max(map(len, fill_shards(entries, lambda e: [e], 10**9))) == 10
    monkeypatch.setattr("nf4cli.checkpoint.writer.MAX_TENSORS", 10**9)
    monkeypatch.setattr("nf4cli.checkpoint.writer._HEADER_ROOM", 2000)
    from nf4cli.checkpoint.writer import lay_out

    for part in fill_shards(entries, lambda e: [e], 10**9):
        assert len(lay_out("x", part, ()).header) <= 2000 + 8 + 100


def test_a_duplicate_name_with_braces_is_none(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(raw(one("{{{{.weight"), bytes(4)))
    assert [t.name for t in read_shard(path).tensors] == ["{{{{.weight"]


def test_printable():
    shown = untrusted.printable("a\x1b[31m\n\u202e\u200b\x9b\ud800 \u00e9\u4e2d ok")
    assert shown == r"a\x1b[31m\n\u202e\u200b\x9b\ud800" + " \u00e9\u4e2d ok"
    assert untrusted.printable("plain") == "plain"


def test_a_full_disk_behind_stdout(place):
    with Path("/dev/full").open("w") as full:
        command = [Path(sys.executable).with_name("nf4"), "quantize", "m", "out"]
        done = subprocess.run(
            command, cwd=place, stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == 4
    assert "the work is done, but its result cannot be written to stdout" in done.stderr
    nf4_ok("verify", "out", "--source", "m", cwd=place)


def test_no_code_of_a_checkpoint_runs(place):
    """Pickles and modeling code beside the weights are neither opened nor run nor published."""
    config = {**LLAMA, "auto_map": {"AutoModelForCausalLM": "modeling_x.X", "AutoConfig": "c.C"}}
    (place / "m" / "config.json").write_text(json.dumps(config))
    for name in ("modeling_x.py", "c.py", "sitecustomize.py", "setup.py"):
        (place / "m" / name).write_text("open('pwned', 'w')\nraise SystemExit(0)\n")
    (place / "m" / "pytorch_model.bin").write_bytes(b"\x80\x04cposix\nsystem\n(S'touch pwned'\ntR.")
    nf4("quantize", ".", "../out", "--exact", *CPU, cwd=place / "m")
    assert not list(place.rglob("pwned"))
    assert not list((place / "out").glob("*.bin"))


def test_a_component_that_is_a_link(place, llama_nf4):
    (place / "p").mkdir()
    (place / "p" / "unet").symlink_to("../m")
    index = {"_class_name": "X", "unet": ["diffusers", "UNet2DModel"]}
    (place / "p" / "model_index.json").write_text(json.dumps(index))
    (result,) = run([job(place, "quantize", "p", "out", *CPU)], llama_nf4)
    check(result, place, {3})
    assert "no directory of its own" in result.stderr


def test_a_tiny_model_is_good(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(tiny_model())
    assert len(open_checkpoint(tmp_path).tensors) == 4
