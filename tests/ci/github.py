"""A job on GitHub's runner that uses a composite action: files, expressions, steps, caches.

The steps' scripts run as the runner runs them. Actions that they use are stood in for: of
actions/cache what the action relies on (exact key, then the newest of a prefix; a key is written
once), of setup-python nothing, since a Python is there.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from .commands import path_with_nf4
from .expressions import evaluate, render

Action = Callable[[dict[str, str]], dict[str, str]]


class Caches:
    """What actions/cache keeps between jobs."""

    def __init__(self, place: Path, workspace: Path) -> None:
        self.place, self._workspace = place, workspace
        self.entries: dict[str, list[tuple[Path, Path]]] = {}

    def restore(self, inputs: dict[str, str]) -> dict[str, str]:
        prefixes = [line for line in inputs.get("restore-keys", "").split("\n") if line]
        newest = reversed(self.entries)
        found = (
            inputs["key"]
            if inputs["key"] in self.entries
            else next((k for p in prefixes for k in newest if k.startswith(p)), None)
        )
        for kept, place in self.entries.get(found or "", ()):
            shutil.copytree(kept, place, dirs_exist_ok=True)
        hit = "" if found is None else str(found == inputs["key"]).lower()
        return {"cache-hit": hit, "cache-matched-key": found or ""}

    def save(self, inputs: dict[str, str]) -> dict[str, str]:
        if inputs["key"] not in self.entries:
            self.entries[inputs["key"]] = []
            for number, line in enumerate(inputs["path"].split()):
                place = self._workspace / line
                if place.is_dir():
                    kept = self.place / str(len(self.entries)) / str(number)
                    shutil.copytree(place, kept)
                    self.entries[inputs["key"]].append((kept, place))
        return {}


@dataclass
class Job:
    """One job.

    Args:
        action: directory of the action.
        workspace: where the job works.
        temp: a new directory for the runner's own files.
        caches: None for a runner without any.
        instead: steps, by name, that this does in the place of their script; None leaves one out.
        env: of the job.
    """

    action: Path
    workspace: Path
    temp: Path
    caches: Caches | None = None
    instead: Mapping[str, Callable[[dict[str, str]], int] | None] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)
    run_id: int = 1

    log: str = ""
    ran: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.temp.mkdir(parents=True)
        self._steps: dict[str, dict[str, Any]] = {}
        self._failed = False
        self._path = [path_with_nf4()]

    @property
    def summary(self) -> str:
        place = self.temp / "summary"
        return place.read_text() if place.exists() else ""

    def use(self, **inputs: str) -> dict[str, str]:
        """Run the action; returns its outputs. `ok` says whether it succeeded."""
        document = yaml.safe_load((self.action / "action.yml").read_text())
        declared = document["inputs"]
        given = {name.replace("_", "-"): value for name, value in inputs.items()}
        assert not given.keys() - declared.keys()
        values = {name: given.get(name, spec.get("default", "")) for name, spec in declared.items()}
        self._contexts: dict[str, Any] = {
            "inputs": values,
            "steps": self._steps,
            "env": self.env,
            "github": {"run_id": self.run_id, "run_attempt": 1},
            "runner": {"os": "Linux", "arch": "X64"},
            "always": lambda: True,
        }
        for step in document["runs"]["steps"]:
            self._step(step)
        return {
            name: render(spec["value"], self._contexts)
            for name, spec in document["outputs"].items()
        }

    @property
    def ok(self) -> bool:
        return not self._failed

    def _step(self, step: dict[str, Any]) -> None:
        name, condition = step["name"], step.get("if", "")
        wanted = bool(evaluate(condition, self._contexts)) if condition else True
        if self._failed and "always()" not in condition:
            wanted = False
        outputs, outcome = {}, "skipped"
        if wanted:
            self.ran.append(name)
            if "uses" in step:
                outputs = self._used(step)
                outcome = "success"
            else:
                outputs, code = self._script(step)
                outcome = "failure" if code else "success"
                self._failed = self._failed or code != 0
        if "id" in step:
            self._steps[step["id"]] = {"outputs": outputs, "outcome": outcome}

    def _used(self, step: dict[str, Any]) -> dict[str, str]:
        inputs = {k: render(str(v), self._contexts) for k, v in step.get("with", {}).items()}
        action, _, version = step["uses"].partition("@")
        assert version
        if action == "actions/setup-python" or self.caches is None:
            return {}
        known: dict[str, Action] = {
            "actions/cache": self.caches.restore,
            "actions/cache/restore": self.caches.restore,
            "actions/cache/save": self.caches.save,
        }
        return known[action](inputs)

    def _script(self, step: dict[str, Any]) -> tuple[dict[str, str], int]:
        assert step["shell"] == "bash"
        assert "${{" not in step["run"], "an input could become a command"
        files = {name: self.temp / name.lower() for name in ("GITHUB_OUTPUT", "GITHUB_PATH")}
        files["GITHUB_OUTPUT"].write_text("")
        script = self.temp / "script.sh"
        script.write_text(step["run"])
        env = {
            "PATH": os.pathsep.join(self._path), "HOME": str(self.temp / "home"),
            "RUNNER_TEMP": str(self.temp / "runner"), "GITHUB_ACTION_PATH": str(self.action),
            "GITHUB_STEP_SUMMARY": str(self.temp / "summary"),
            **{name: str(place) for name, place in files.items()},
            **self.env,
            **{k: render(str(v), self._contexts) for k, v in step.get("env", {}).items()},
        }  # fmt: skip
        if step["name"] in self.instead:
            stand_in = self.instead[step["name"]]
            code = stand_in(env) if stand_in else 0
        else:
            done = subprocess.run(
                ["bash", "--noprofile", "--norc", "-eo", "pipefail", script], cwd=self.workspace,
                env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
                timeout=120,
            )  # fmt: skip
            code = done.returncode
            self.log += done.stdout
        if files["GITHUB_PATH"].exists():
            self._path[:0] = files["GITHUB_PATH"].read_text().split()
            files["GITHUB_PATH"].unlink()
        lines = files["GITHUB_OUTPUT"].read_text().splitlines()
        return dict(line.split("=", 1) for line in lines), code
