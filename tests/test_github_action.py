"""action.yml, run step by step as GitHub's runner would, on a small checkpoint."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from urllib.parse import quote

import pytest
from ci.commands import path_with_nf4, stand_in
from ci.context import alone
from ci.expressions import evaluate
from ci.github import Caches, Job
from helpers import LLAMA, llama_tensors, nf4_ok, same_files, write_checkpoint_dir
from hub_server import Fault
from hub_server.fixtures import SHARDS

from nf4cli import __version__

ROOT = Path(__file__).parent.parent
INSTALLED = {"Install nf4": None}  # the tests' own is on the PATH


@pytest.fixture
def job(work, tmp_path):
    """A job of a workspace with a small Llama in `model`, in which nf4 is installed."""
    return Job(ROOT, work, tmp_path / "runner-1", instead=INSTALLED)


def other_nf4(place: Path, script: str) -> dict[str, str]:
    """Environment of a job with another nf4."""
    return {"PATH": stand_in(place, "nf4", script)}


def test_convert_and_verify(job, work):
    nf4_ok("quantize", "model", "by-hand", "--keep", "lm_head", "--memory", "200MB", cwd=work)
    outputs = job.use(
        model="model", output="out", verify="source", memory="200MB", args="--keep  lm_head\n"
    )
    assert job.ok, job.log
    assert same_files(work / "out", work / "by-hand")
    assert outputs["path"] == "out"
    assert outputs["exit-code"] == "0"
    report = json.loads(Path(outputs["quantize-report"]).read_text())
    assert outputs["bits-per-weight"] == str(report["bits_per_weight"])
    proof = json.loads(Path(outputs["verify-report"]).read_text())
    assert proof["ok"]
    assert proof["source"] == "model"
    assert "<testsuites" in Path(outputs["junit"]).read_text()
    assert "### nf4 quantize: out" in job.summary
    assert "### nf4 verify: out: good" in job.summary
    assert "GB of disk free" in job.log
    assert "Publish" not in job.ran


def test_defaults(job, work):
    outputs = job.use(model="model")
    assert job.ok, job.log
    assert outputs["path"] == "model-nf4"
    assert json.loads(Path(outputs["verify-report"]).read_text())["source"] is None
    assert (work / "model-nf4" / "nf4_manifest.json").exists()


@pytest.mark.parametrize(
    "name", ["a b", "--plan", "$(touch hacked)", "x'; touch hacked; '", '"`touch hacked`"']
)
def test_no_input_is_a_command(job, work, name):
    (work / "model").rename(work / name)
    outputs = job.use(model=name, output=f"{name} out", verify="source")
    assert job.ok, job.log
    assert outputs["path"] == f"{name} out"
    assert not list(work.glob("hacked"))


def test_arguments_are_words(job, work):
    outputs = job.use(model="model", args="--keep $(touch${IFS}hacked) ; touch hacked")
    assert not job.ok
    assert outputs["exit-code"] == "2"
    assert not (work / "hacked").exists()
    assert "::error title=nf4::" in job.log


def test_a_name_is_no_order_to_the_runner(job, work):
    """What nf4 says is fenced off, and what the annotation quotes is escaped."""
    outputs = job.use(model="no%0A::set-env name=X::y")
    assert not job.ok
    assert outputs["exit-code"] == "3"
    assert "::error title=nf4::no%250A::set-env" in job.log
    fences = [line for line in job.log.splitlines() if line.startswith("::stop-commands::")]
    assert len(fences) == 1
    assert f"::{fences[0].removeprefix('::stop-commands::')}::" in job.log


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        ({"model": "model", "verify": "twice"}, "verify is 'twice'"),
        ({"model": "model", "minutes": "1h"}, "minutes is '1h'"),
        ({"model": ""}, "model is empty"),
        ({"model": "model", "output": "a\nb=c"}, "would hold a line break"),
    ],
)
def test_inputs_that_contradict_each_other(job, inputs, says):
    job.use(**inputs)
    assert not job.ok
    assert "Convert" not in job.ran
    assert says in job.log


def test_a_stopped_run_goes_on_in_the_next_job(work, tmp_path):
    caches = Caches(tmp_path / "caches", work)
    nf4_ok("quantize", "model", "by-hand", cwd=work)
    full = other_nf4(tmp_path / "full", 'exec "${TROUBLED[@]}" full "$1" --workers 1 "${@:2}"')
    first = Job(ROOT, work, tmp_path / "runner-1", caches, INSTALLED, full)
    outputs = first.use(model="model", output="out")
    assert not first.ok
    assert outputs["exit-code"] == "4"
    assert "Worth a re-run" in first.log
    assert "Keep an unfinished run" in first.ran
    assert "Verify" not in first.ran
    shutil.rmtree(work / ".out.partial")  # another runner
    second = Job(ROOT, work, tmp_path / "runner-2", caches, INSTALLED, run_id=2)
    outputs = second.use(model="model", output="out")
    assert second.ok, second.log
    assert "continuing an earlier run" in second.log
    assert "Keep an unfinished run" not in second.ran
    assert same_files(work / "by-hand", work / "out")
    other = Job(ROOT, work, tmp_path / "runner-3", caches, INSTALLED, run_id=3)
    other.use(model="model", output="out2", args="--blocksize 128")
    assert other.ok, other.log
    assert "continuing" not in other.log


def test_a_stopped_run_of_another_model_is_left(work, tmp_path):
    """The cache's key is the name of the model, which may change under it."""
    caches = Caches(tmp_path / "caches", work)
    full = other_nf4(tmp_path / "full", 'exec "${TROUBLED[@]}" full "$1" --workers 1 "${@:2}"')
    Job(ROOT, work, tmp_path / "runner-1", caches, INSTALLED, full).use(model="model")
    write_checkpoint_dir(work / "model", llama_tensors(seed=1), LLAMA)
    nf4_ok("quantize", "model", "by-hand", cwd=work)
    second = Job(ROOT, work, tmp_path / "runner-2", caches, INSTALLED, run_id=2)
    second.use(model="model")
    assert second.ok, second.log
    assert "beginning again without it" in second.log
    assert same_files(work / "by-hand", work / "model-nf4")
    third = Job(ROOT, work, tmp_path / "runner-3", None, INSTALLED)
    third.use(model="model", args="--blocksize 63")  # exit code 2 for another reason
    assert not third.ok
    assert "beginning again" not in third.log


def test_the_model_is_this_directory(work, tmp_path):
    job = Job(ROOT, work / "model", tmp_path / "runner", None, INSTALLED)
    assert job.use(model=".", output="../x")["path"] == "../x", job.log
    assert job.ok, job.log
    outputs = Job(ROOT, work, tmp_path / "runner-2", None, INSTALLED).use(model="./model/.")
    assert outputs["path"] == "model-nf4"


def test_downloads_are_kept_once(work, tmp_path):
    """What came from the Hub is cached for the next job; a bounded run has nothing to cache."""
    script = 'mkdir -p "$HF_HOME/hub/models--a--b"; echo \'{"nf4": "quantize"}\''
    caches = Caches(tmp_path / "caches", work)
    env = other_nf4(tmp_path / "hub", script) | {"HF_HOME": str(tmp_path / "hf")}
    keep = "Keep downloads"
    for run, (disk, kept) in enumerate([("10GB", False), ("", True), ("", False)]):
        one = Job(ROOT, work, tmp_path / f"runner-{run}", caches, INSTALLED, env, run)
        one.use(model="a/b", verify="none", disk=disk)
        assert one.ok, one.log
        assert (keep in one.ran) is kept
    assert [key for key in caches.entries if key.startswith("nf4-hub-")] != []


def test_from_hub_to_hub_in_two_jobs(work, tmp_path, hub, converted):
    """Within a bound; the Hub is away in the middle, and the second job's runner is a fresh one."""
    caches = Caches(tmp_path / "caches", work)
    asked = {"model": "org/model@main", "push_to": "me/it", "disk": "10MB", "verify": "source",
             "args": "--max-shard-size 1MB"}  # fmt: skip

    def job(number: int) -> Job:
        env = hub.environment(tmp_path / f"home-{number}", "hf_write")
        env |= {"NF4_HUB_WAIT": "0.01", "PATH": path_with_nf4()}
        return Job(ROOT, work, tmp_path / f"runner-{number}", caches, INSTALLED, env, number)

    hub.faults.add(Fault(r"GET /files/.*0001\d-of", after=10, status=503, times=10**6))
    first = job(1)
    assert first.use(**asked)["exit-code"] == "4", first.log
    assert "Keep an unfinished run" in first.ran
    assert hub.store.repos["me/it"].head == {}
    shutil.rmtree(work / ".models--me--it.partial")
    hub.faults.clear()
    hub.log.clear()
    second = job(2)
    outputs = second.use(**asked)
    assert second.ok, second.log
    assert "continuing an earlier run" in second.log
    pushed = hub.store.repos["me/it"]
    assert outputs["commit"] == pushed.branches["main"]
    for path in converted.glob("*.safetensors"):
        assert pushed.head[path.name].place.read_bytes() == path.read_bytes()
    source = rf"GET /files/{quote('org/model', '')}/.*safetensors"
    whole = [r for r in hub.requests(source) if r.range is None]
    assert SHARDS < len(whole) < 2 * SHARDS, "all for the proof, the rest to convert"
    assert "### nf4 quantize: me/it" in second.summary
    assert f"### nf4 verify: me/it&#64;{pushed.branches['main']}: good" in second.summary
    assert json.loads(Path(outputs["verify-report"]).read_text())["source"] == "org/model"
    assert not list(work.glob(".*"))


@pytest.mark.parametrize(("output", "published"), [("out", "nf4 push"), ("", "nf4 quantize")])
def test_publishing(work, tmp_path, output, published):
    """With an output it is verified first; without, shards leave as they are finished."""
    said = tmp_path / "said"
    script = (
        f'echo "nf4 $*" >>{said}; [ -z "$HF_TOKEN" ] || echo token >>{said}\n'
        'echo \'{"nf4": "push", "pushed": {"commit": "c0ffee"}}\''
    )
    job = Job(ROOT, work, tmp_path / "runner", None, INSTALLED, other_nf4(tmp_path / "bin", script))
    outputs = job.use(
        model="model", output=output, push_to="me/it", public="true", disk="2GB", hf_token="secret"
    )
    assert job.ok, job.log
    lines = [line for line in said.read_text().splitlines() if line != "token"]
    commands = [" ".join(line.split()[:2]) for line in lines]
    assert commands == (["nf4 quantize", "nf4 verify", "nf4 push"] if output else ["nf4 quantize"])
    line = next(line for line in lines if line.startswith(published))
    assert "me/it" in line
    assert "--public" in line
    assert "secret" not in said.read_text() + job.log
    assert said.read_text().count("token") == len(commands)
    assert "--disk 2GB" in lines[0]
    assert outputs["commit"] == "c0ffee"


def test_what_is_not_good_is_not_published(work, tmp_path):
    steps = {**INSTALLED, "Verify": lambda env: 1, "Publish": lambda env: pytest.fail("published")}
    job = Job(ROOT, work, tmp_path / "runner", None, steps)
    job.use(model="model", output="out", push_to="me/it")
    assert not job.ok
    assert "Publish" not in job.ran


def test_no_token_is_none(work, tmp_path):
    """An empty HF_TOKEN would be sent as one."""
    script = 'echo "{\\"nf4\\": \\"x\\"}"; [ -z "${HF_TOKEN+set}" ]'
    job = Job(ROOT, work, tmp_path / "runner", None, INSTALLED, other_nf4(tmp_path / "bin", script))
    job.use(model="a/b", verify="none")
    assert job.ok, job.log


def test_the_time_limit(work, tmp_path):
    """SIGTERM, early enough to keep what is finished; the exit code is nf4's."""
    env = other_nf4(tmp_path / "bin", "trap 'exit 130' TERM; sleep 20 & wait")
    stand_in(
        tmp_path / "bin",
        "timeout",
        f'''
        [[ "$*" == *"--signal=TERM --kill-after=2m 7m nf4 quantize"* ]] || exit 99
        exec {shutil.which("timeout")} "${{@/7m/0.4s}}"''',
    )
    job = Job(ROOT, work, tmp_path / "runner", None, INSTALLED, env)
    outputs = job.use(model="model", minutes="7")
    assert not job.ok
    assert outputs["exit-code"] == "130"
    assert "left no report" in job.log


def test_the_install_step(wheel, tmp_path):
    """nf4 in an environment of its own, on the PATH of the next step."""
    path = tmp_path / "path"
    done = subprocess.run(
        ["bash", ROOT / "scripts" / "ci" / "install.sh"],
        env=alone() | {"RUNNER_TEMP": str(tmp_path), "GITHUB_ACTION_PATH": str(ROOT),
                       "NF4_INSTALL": str(wheel), "GITHUB_PATH": str(path)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"nf4 {__version__}\n"
    place = Path(path.read_text().strip())
    assert (place / "nf4").is_file()
    assert list(place.parent.glob("lib/python*/site-packages/nf4cli/engines/_nf4.so"))


def test_expressions():
    contexts = {"inputs": {"a-b": "x", "e": ""}, "always": lambda: True}
    assert evaluate("inputs.a-b == 'X' && always()", contexts) is True
    assert evaluate("inputs.e == '' && inputs.a-b || 'y'", contexts) == "x"
    assert evaluate("inputs.e || inputs.none || 'it''s'", contexts) == "it's"
    with pytest.raises(KeyError):
        evaluate("secrets.HF_TOKEN", contexts)


def test_from_a_hub_to_a_hub(work, tmp_path, hub, converted):
    """The whole way, against a server: converted under a bound, nothing is left here."""
    env = {
        **hub.environment(tmp_path / "home"),
        "PATH": path_with_nf4(),
    }
    one = Job(ROOT, work, tmp_path / "runner-1", None, INSTALLED, env)
    options = {"model": "org/model", "push_to": "me/out", "args": "--max-shard-size 1MB"}
    outputs = one.use(**options, disk="10MB", hf_token="hf_write")
    assert one.ok, one.log
    repo = hub.store.repos["me/out"]
    assert repo.private
    assert outputs["commit"] == repo.branches["main"]
    assert outputs["path"] == ""
    for path in converted.glob("*.safetensors"):
        assert repo.head[path.name].place.read_bytes() == path.read_bytes()
    assert "### nf4 quantize" in one.summary
    two = Job(ROOT, work, tmp_path / "runner-2", None, INSTALLED, env)
    outputs = two.use(**options, output="out", verify="source", hf_token="hf_write")
    assert two.ok, two.log
    assert "Publish" in two.ran
    assert outputs["commit"] == repo.branches["main"]
