"""A Hub that lies, a network that damages, a user who may no longer: words, and nothing lost."""

from __future__ import annotations

import json
import signal
import subprocess
import time

import pytest
from encoded_models import compressed_model, gpt_oss, weights
from float8_models import CASES, float8_model
from helpers import LLAMA, full_tmpfs, llama_tensors, nf4_ok, same_files, write_checkpoint_dir
from hub_server import Fault
from hub_server.fixtures import bytes_in

API = r"GET /api/models/org/model"
FILE = r"GET /files/.*00007-of"
PUSH = ("--push-to", "me/model-nf4", "--max-shard-size", "1MB")
BUT = ("nf4_manifest.json", "README.md")
COMMIT = "0" * 40


@pytest.mark.parametrize("bound", [("--disk", "10MB"), ()])
def test_a_header_that_was_damaged_on_its_way_makes_no_output(nf4_hub, hub, tmp_path, bound):
    """It comes alone, before there is a digest to compare; the file itself is right."""
    source = write_checkpoint_dir(tmp_path / "small", llama_tensors(), LLAMA)
    place = (source / "model.safetensors").read_bytes().index(b"q_proj")
    hub.add("org/small", source)
    hub.faults.add(Fault(r"GET /files/.*small", flip=place))
    stderr = nf4_hub.fails(3, "quantize", "org/small", "out", *bound, says=("header",))
    assert "is another than that of the whole file" in stderr
    assert not list(nf4_hub.work.iterdir())
    nf4_hub.ok("quantize", "org/small", "out", *bound)


def _answer(**more):
    return {"sha": COMMIT, "siblings": [], **more}


def _file(**more):
    lfs = {"sha256": "0" * 64, "size": 10**6}
    file = {"rfilename": "model.safetensors", "size": 10**6, "lfs": lfs, **more}
    return _answer(siblings=[file])


ANSWERS = {
    "no JSON": b"<html>log in to this network</html>",
    "a list": b"[]",
    "a number": b"7",
    "nothing": b"",
    "no text": b"\xff\xfe\x00",
    "deep": b"[" * 100_000,
    "no commit": _answer(sha=None),
    "a commit that is none": _answer(sha="main"),
    "no files": {"sha": COMMIT},
    "files that are none": _answer(siblings=7),
    "files of no shape": _answer(siblings=[1, 2]),
    "a file without a name": _answer(siblings=[{"size": 1}]),
    "a name that is a number": _file(rfilename=7),
    "a name that is no text": _file(rfilename="\ud800"),
    "a name that leads out": _file(rfilename="../model.safetensors"),
    "a name with a NUL": _file(rfilename="a\0b"),
    "an absolute name": _file(rfilename="/model.safetensors"),
    "a very long name": _file(rfilename="x" * 5000 + ".json", size=1, lfs=None),
    "a size below nothing": _file(size=-5),
    "a size beyond everything": _file(size=2**62),
    "a size that is text": _file(size="many"),
    "a digest that is none": _file(lfs={"sha256": "\x1b[31mzz"}),
    "a digest that is a list": _file(lfs={"sha256": [1]}),
    "LFS that is text": _file(lfs="yes"),
    "too many files": _answer(siblings=[{"rfilename": "x"}] * 100_001),
    "a file that is a directory as well": _answer(
        siblings=[{"rfilename": name, "size": 0} for name in ("a.json", "a.json/b.json")]
    ),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_answers_of_no_hub(nf4_hub, hub, name):
    answer = ANSWERS[name]
    body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
    hub.faults.add(Fault(API, status=200, body=body, times=99))
    done = nf4_hub("quantize", "org/model", "--plan", TMPDIR=str(nf4_hub.work))
    assert done.returncode in (3, 4), done.stderr
    assert "Traceback" not in done.stderr
    assert "\x1b" not in done.stderr
    assert "error: " in done.stderr
    assert not list(nf4_hub.work.iterdir())


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        (Fault(API, status=200, body=b"{", endless=True), 3),
        (Fault(r"GET .*/config.json", endless=True, times=99), 4),
        (Fault(API, status=302, headers={"Location": "/api/models/org/model"}, times=999), 4),
        (Fault(API, status=429, headers={"Retry-After": "9" * 15}, times=99), 4),
    ],
    ids=["an endless answer", "an endless small file", "a circle", "a wait of centuries"],
)
def test_what_never_ends(nf4_hub, hub, fault, code):
    hub.faults.add(Fault(**vars(fault)))
    arguments = ("quantize", "org/model", "out", "--disk", "40MB")
    process = nf4_hub.start(*arguments, TMPDIR=str(nf4_hub.work))
    most = 0
    while process.poll() is None:
        most = max(most, bytes_in(nf4_hub.work))
        time.sleep(0.01)
    _, stderr = process.communicate()
    assert process.returncode == code, stderr
    assert "Traceback" not in stderr
    assert most < 10**8
    assert not list(nf4_hub.work.iterdir())


@pytest.mark.parametrize("bound", [("--disk", "40MB")])
def test_a_weight_file_that_goes_on_behind_its_end(nf4_hub, hub, converted, bound):
    hub.faults.add(Fault(FILE, after=1, endless=True))
    nf4_hub.ok("quantize", "org/model", "out", *bound, "--max-shard-size", "1MB")
    assert hub.faults.seen == 1
    assert same_files(nf4_hub.work / "out", converted, but=BUT)


def test_a_token_that_expires_in_mid_run_costs_no_work(nf4_hub, hub, converted):
    hub.faults.add(Fault(r"GET /org/model/resolve/.*00019-of", after=1, status=401, times=10**6))
    arguments = ("quantize", "org/model", "--disk", "10MB", *PUSH)
    nf4_hub.fails(3, *arguments, says=("weights are done and kept", "--resume"))
    hub.faults.clear()
    hub.faults.add(Fault(r"POST .*/commit/main", status=403, times=10**6))
    before = len(hub.log)
    nf4_hub.fails(3, *arguments, "--resume", says=("75 of 75 weights are done and kept",))
    assert not [r for r in hub.log[before:] if "00002-of" in r.path and r.range is None]
    hub.faults.clear()
    before = len(hub.log)
    nf4_hub.ok(*arguments, "--resume")
    again = [r.path for r in hub.log[before:] if r.cdn and (r.method == "PUT" or r.range is None)]
    assert not again
    pushed = hub.store.repos["me/model-nf4"].head
    for path in converted.glob("*.safetensors"):
        assert pushed[path.name].place.read_bytes() == path.read_bytes()


def test_a_repository_without_lfs_does_not_hold_a_bounded_run_for_ever(nf4_hub, hub, monkeypatch):
    monkeypatch.setattr("hub_server.api.is_lfs", lambda name, size: False)
    nf4_hub.fails(
        2, "quantize", "org/model", "--disk", "10MB", *PUSH,
        says=("in git itself", ".gitattributes", "--resume"),
    )  # fmt: skip


@pytest.mark.parametrize(
    "fault",
    [
        Fault(API, drop=True, times=99),
        Fault(r"GET .*/resolve/.*/tokenizer.json", stall=30, times=99),
        Fault(r"GET /files/.*00003", stall=30, times=99),
        Fault(r"GET /files/.*00003", stall=30, times=99, after=1),
    ],
    ids=["no answer", "a small file", "a header", "a file"],
)
@pytest.mark.parametrize("bound", [("--disk", "40MB"), ()], ids=["bounded", "cache"])
def test_ctrl_c_while_the_network_is_waited_for(nf4_hub, hub, fault, bound):
    hub.faults.add(Fault(**vars(fault)))
    process = nf4_hub.start("quantize", "org/model", "out", *bound, NF4_HUB_WAIT="20")
    nf4_hub.wait_for_fault(process)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    begun = time.monotonic()
    _, stderr = process.communicate(timeout=60)
    assert time.monotonic() - begun < 2, stderr
    assert process.returncode == 130, stderr
    assert "interrupted" in stderr
    assert bool(list(nf4_hub.work.iterdir())) == ("--resume" in stderr)


@pytest.mark.parametrize("form", ["float8", "mxfp4", "int4"])
def test_scales_that_lie_in_another_file(nf4_hub, hub, tmp_path, form):
    """From the Hub where the file is not fetched yet, or is gone; offline from the cache."""
    source = tmp_path / "float8"
    if form == "float8":
        float8_model(source, *CASES["deepseek"])
    elif form == "mxfp4":
        gpt_oss(source)
    else:
        compressed_model(source, [weights(4, "int", "group", group_size=32)])
    hub.add("org/float8", source)
    nf4_ok("quantize", source, tmp_path / "local", "--digest", "sha256")
    for name, options in {"bounded": ("--disk", "2MB"), "online": ()}.items():
        nf4_hub.ok("quantize", "org/float8", name, "--workers", "1", *options)
        assert same_files(nf4_hub.work / name, tmp_path / "local", but=BUT)
    hub.log.clear()
    nf4_hub.ok("quantize", "org/float8", "offline", HF_HUB_OFFLINE="1")
    assert not hub.log
    assert same_files(nf4_hub.work / "offline", tmp_path / "local", but=BUT)


@pytest.mark.parametrize("wait", ["soon", "nan", "-1", "inf"])
def test_waits_that_are_none(nf4_hub, wait):
    nf4_hub.fails(2, "quantize", "org/model", says=("NF4_HUB_WAIT",), NF4_HUB_WAIT=wait)


@pytest.mark.parametrize("name", ["HF_HUB_DOWNLOAD_TIMEOUT", "HF_ENDPOINT"])
def test_a_variable_that_huggingface_hub_does_not_understand(nf4_hub, name):
    nf4_hub.fails(
        2, "quantize", "org/model", says=("variable of the environment",), **{name: "http://[x"}
    )


def test_a_disk_that_is_smaller_than_its_bound(nf4_hub, hub, converted, tmp_path):
    """Fetching ahead would fill it."""
    mount, size = full_tmpfs("20m")
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(
        [mount, "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk], check=False
    )  # fmt: skip
    if done.returncode:
        pytest.skip("this machine does not let us mount a tmpfs")
    try:
        nf4_hub.work = disk
        arguments = ("quantize", "org/model", "out", "--max-shard-size", "1MB")
        done = nf4_hub(*arguments, "--disk", "60MB")
        assert done.returncode == 0, done.stderr
        assert "the disk has 20,9" in done.stderr
        assert same_files(disk / "out", converted, but=BUT)
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("bound", [("--disk", "40MB"), ()], ids=["bounded", "cache"])
def test_signed_addresses_and_tokens_are_not_shown(nf4_hub, hub, bound):
    hub.faults.add(Fault(FILE, after=1, cut=1000, times=2))
    done = nf4_hub("quantize", "org/model", "out", *bound)
    assert done.returncode == 0, done.stderr
    assert "model-00007-of-00024.safetensors" in done.stderr
    written = [path.read_bytes() for path in (nf4_hub.work / "out").iterdir()]
    for secret in ("signature=", "hf_write"):
        assert secret not in done.stderr + done.stdout
        assert not any(secret.encode() in data for data in written)
