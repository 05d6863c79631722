"""The recipes of docs/ci.md: checked against their formats, and run as far as it can be here."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from ci.commands import BIN, path_with_nf4, stand_in
from ci.github import Job
from helpers import nf4_ok, same_files, write_checkpoint_dir

from nf4cli.convert.output_place import workspace_of

ROOT = Path(__file__).parent.parent
RECIPES = ROOT / "docs" / "recipes"
PAGE = (ROOT / "docs" / "ci.md").read_text()
SCRIPTS = sorted([*RECIPES.glob("*.sh"), *(ROOT / "scripts" / "ci").glob("*.sh")])


def tool(name: str, *arguments: object) -> str:
    """Run a linter of the test environment, which needs no network; it must be content."""
    done = subprocess.run(
        [BIN / name, *map(str, arguments)], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("schema", "file"),
    [
        ("github-actions", "action.yml"),
        ("github-workflows", "docs/recipes/github.yml"),
        ("github-workflows", ".github/workflows/ci.yml"),
        ("github-workflows", ".github/workflows/release.yml"),
        ("gitlab-ci", "docs/recipes/gitlab-ci.yml"),
    ],
)
def test_formats(schema, file):
    tool("check-jsonschema", "--builtin-schema", f"vendor.{schema}", file)


def test_nobody_can_slip_a_command_into_a_workflow():
    tool(
        "zizmor", "--offline", "--config", ".github/zizmor.yml",
        "action.yml", "docs/recipes/github.yml", ".github/workflows/ci.yml",
        ".github/workflows/release.yml",
    )  # fmt: skip


def test_shell_scripts():
    tool("shellcheck", "-x", "-P", "scripts/ci", *SCRIPTS)
    for script in RECIPES.glob("*.sh"):
        assert os.access(script, os.X_OK), script


def test_the_page_has_the_recipes_as_they_are():
    shown = dict(
        re.findall(r"^\[`recipes/([\w.-]+)`\][^`]*?[^#]*?\n```\w+\n(.*?)^```$", PAGE, re.M | re.S)
    )
    assert set(shown) == {path.name for path in RECIPES.iterdir()}
    for name, text in shown.items():
        assert text == (RECIPES / name).read_text(), name


def test_the_page_names_every_input_and_output_of_the_action():
    document = yaml.safe_load((ROOT / "action.yml").read_text())
    rows = set(re.findall(r"^\| `([\w-]+)` \|", PAGE, re.M))
    assert rows == set(document["inputs"]) | set(document["outputs"])


def test_github(work, tmp_path, hub):
    """The step of the workflow, as the job of one model runs it: from Hub to Hub."""
    (job,) = yaml.safe_load((RECIPES / "github.yml").read_text())["jobs"].values()
    inputs = {k.replace("-", "_"): str(v) for k, v in job["steps"][0]["with"].items()}
    assert int(inputs["minutes"]) < int(job["timeout-minutes"]) - 10
    for name in ("model", "push_to", "hf_token"):
        assert inputs[name].startswith("${{")
    env = {**hub.environment(tmp_path / "home"), "PATH": path_with_nf4()}
    runner = Job(ROOT, work, tmp_path / "runner", instead={"Install nf4": None}, env=env)
    outputs = runner.use(
        **inputs | {"model": "org/model@main", "push_to": "me/it", "hf_token": "hf_write"}
    )
    assert runner.ok, runner.log
    assert outputs["commit"] == hub.store.repos["me/it"].branches["main"]
    assert hub.store.repos["me/it"].private
    assert "nf4 verify: me/it&#64;" in runner.summary
    reports = [outputs[name] for name in ("quantize-report", "verify-report", "junit")]
    assert all(Path(report).stat().st_size for report in reports)
    assert not [*work.glob(".*"), *work.glob("*nf4*")], "all of it has left"


def gitlab_script(place: Path, path: str = "") -> int:
    """The exit code of the job's script, for `model` in this directory."""
    job = yaml.safe_load((RECIPES / "gitlab-ci.yml").read_text())["nf4"]
    assert job["retry"]["exit_codes"] == [4, 130]
    done = subprocess.run(
        ["bash", "-c", "set -eo pipefail\n" + "\n".join(job["script"])],
        env={**os.environ, "MODEL": "model", "OUTPUT": "out",
             "PATH": path or path_with_nf4()},
        cwd=place, check=False, capture_output=True,
    )  # fmt: skip
    return done.returncode


def test_gitlab(work, tmp_path):
    """A full disk: the cache has what is finished, and the retry goes on and reports."""
    job = yaml.safe_load((RECIPES / "gitlab-ci.yml").read_text())["nf4"]
    cached = work / job["cache"][1]["paths"][0].replace("$OUTPUT", "out")
    path = stand_in(tmp_path / "bin", "nf4", 'exec "${TROUBLED[@]}" full "$1" --workers 1 "${@:2}"')
    assert gitlab_script(work, path) == 4
    assert (cached / "journal").exists()
    assert gitlab_script(work) == 0
    assert not cached.exists()
    for name in (*job["artifacts"]["paths"], job["artifacts"]["reports"]["junit"]):
        assert (work / name.replace("$OUTPUT", "out")).exists(), name
    assert "<testsuites" in (work / "junit.xml").read_text()


class Slurm:
    """A task of an array without a scheduler: `scontrol` writes down what it is told."""

    def __init__(self, place: Path, troubled: str = "") -> None:
        self._place, self.orders = place, place / "orders"
        script = f'exec "${{TROUBLED[@]}}" {troubled} "$@"' if troubled else 'exec "$REAL" "$@"'
        self._path = stand_in(place / "bin", "nf4", script)
        stand_in(place / "bin", "scontrol", f'echo "$*" >>{self.orders}')

    def start(self, task: int = 1, restarts: int = 0) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", RECIPES / "slurm.sh", "models.txt"], cwd=self._place, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env={**os.environ, "PATH": self._path, "SLURM_ARRAY_TASK_ID": str(task),
                 "SLURM_JOB_ID": "71", "SLURM_CPUS_PER_TASK": "1",
                 "SLURM_RESTART_COUNT": str(restarts)},
        )  # fmt: skip

    def stop(self, number: signal.Signals) -> tuple[int, str]:
        """A task that gets a signal when some weights are done: its exit code, what it said."""
        task = self.start()
        journal = workspace_of(self._place / "out") / "journal"
        deadline = time.monotonic() + 30
        while not journal.exists() or journal.read_bytes().count(b"\n") < 5:
            assert time.monotonic() < deadline, "nothing was finished in 30 s"
            time.sleep(0.05)
        task.send_signal(number)
        said, _ = task.communicate(timeout=30)
        return task.returncode, said


@pytest.fixture
def listed(work):
    (work / "models.txt").write_text("model out\nmodel second out\nmodel\n")
    return work


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM], ids=lambda s: s.name)
def test_slurm_stops_a_task_and_runs_it_again(listed, number):
    """USR1, before the time is up: back into the queue. TERM, from scancel: not."""
    slurm = Slurm(listed, "slow")
    code, said = slurm.stop(number)
    assert code == 130, said
    assert not (listed / "out").exists()
    again = number == signal.SIGUSR1
    assert slurm.orders.exists() is again
    if again:
        assert slurm.orders.read_text() == "requeue 71\n"
    task = Slurm(listed).start(restarts=1)
    said, _ = task.communicate(timeout=60)
    assert task.returncode == 0, said
    assert "continuing an earlier run" in said
    assert "out is good" in said
    nf4_ok("quantize", "model", "other", cwd=listed)
    assert same_files(listed / "out", listed / "other")


def test_slurm_and_a_full_disk(listed):
    for restarts, orders in ((0, "requeue 71\n"), (5, "requeue 71\n")):
        slurm = Slurm(listed, "full")
        task = slurm.start(restarts=restarts)
        said, _ = task.communicate(timeout=60)
        assert task.returncode == 4, said
        assert slurm.orders.read_text() == orders
        shutil.rmtree(workspace_of(listed / "out"))


def test_slurm_what_is_wrong_is_not_tried_again(listed):
    for task_id, code in ((3, 2), (4, 2)):
        task = Slurm(listed).start(task_id)
        said, _ = task.communicate(timeout=60)
        assert task.returncode == code
        assert f"models.txt has no line {task_id} with MODEL OUTPUT" in said
    (listed / "model" / "config.json").write_text("[")
    slurm = Slurm(listed)
    task = slurm.start()
    task.communicate(timeout=60)
    assert task.returncode == 3
    assert not slurm.orders.exists()


def run_loop(place: Path, path: str, *models: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", RECIPES / "loop.sh", *models], cwd=place, text=True, capture_output=True,
        check=False, env={**os.environ, "PATH": path, "PAUSE": "0"},
    )  # fmt: skip


def test_the_loop(work, tmp_path):
    """One good model whose disk is full at first, one that is none."""
    write_checkpoint_dir(work / "broken", {}, {"model_type": "llama"})
    once = work / "once"
    path = stand_in(
        tmp_path / "bin", "nf4",
        f'if [ -e {once} ]; then exec "$REAL" "$@"; fi; touch {once}\n'
        'exec "${TROUBLED[@]}" full "$1" --workers 1 "${@:2}"',
    )  # fmt: skip
    done = run_loop(work, path, "model", "broken")
    assert done.returncode == 3, done.stderr
    first, second = done.stdout.splitlines()
    document = json.loads((work / "model-nf4.json").read_text())
    size, bits = document["output_bytes"], document["bits_per_weight"]
    assert first == f"0\tmodel-nf4\t{size} bytes, {bits} bits a weight"
    assert second.startswith("3\tbroken-nf4\t")
    assert "continuing an earlier run" in done.stderr
    assert json.loads((work / "model-nf4.verify.json").read_text())["ok"]


def test_the_loop_ends_at_ctrl_c(work, tmp_path):
    error = '{"nf4": "error", "error": {"message": "interrupted"}}'
    path = stand_in(tmp_path / "bin", "nf4", f"echo '{error}'; exit 130")
    done = run_loop(work, path, "model", "model")
    assert done.returncode == 130
    assert done.stdout == "130\tmodel-nf4\tinterrupted\n"


def test_a_container(work, tmp_path):
    """All but the container: its nf4 works in the directory that is mounted on /models."""
    path = stand_in(tmp_path / "bin", "podman", f"""
        case $1 in
          build) [ "$*" = "build --tag nf4 --file {ROOT}/Containerfile {ROOT}" ] ;;
          run)
            [[ "$*" == *" --volume {work}:/models "* ]] || exit 99
            while [ "$1" != nf4 ]; do shift; done
            exec "$REAL" "${{@:2}}" ;;
        esac""")  # fmt: skip
    done = subprocess.run(
        ["bash", RECIPES / "container.sh", ROOT, "model", "out"], cwd=work, text=True,
        env={**os.environ, "PATH": path, "HOME": str(tmp_path)}, capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "out is good" in done.stdout


def test_the_example_in_python(work):
    """The page's few lines that read a document."""
    (code,) = re.findall(r"^```python\n(.*?)^```$", PAGE, re.M | re.S)
    report = work / "quantize.json"
    report.write_text(nf4_ok("quantize", "model", "out", "--json", cwd=work))

    def check() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", code], cwd=work, capture_output=True, text=True, check=False
        )

    assert check().returncode == 0
    document = json.loads(report.read_text())
    name = next(iter(document["errors"]))
    document["errors"][name]["rel_rmse"] = 0.3
    report.write_text(json.dumps(document))
    assert check().returncode == 1
    assert check().stderr == f"relative RMSE 0.3000 in {name}\n"
