"""What holds contributors together: CI, the hooks before a commit, the pages that explain both."""

from __future__ import annotations

import os
import re
from pathlib import Path

import yaml

ROOT = Path(__file__).parent.parent
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
WORKFLOW = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
WINGS = (
    "cli pictures api quality hub proof loading convert output planning checkpoint engines format"
).split()


def test_ci_runs_all_tests_with_the_least_rights():
    steps = WORKFLOW["jobs"]["test"]["steps"]
    assert steps[-1]["run"] == "scripts/test"
    assert WORKFLOW[True].keys() == {"push", "pull_request"}  # YAML 1.1 reads `on` as true
    assert WORKFLOW["permissions"] == {"contents": "read"}
    for job in WORKFLOW["jobs"].values():
        assert "permissions" not in job
        assert job["timeout-minutes"] <= 60
        (setup,) = (s for s in job["steps"] if s.get("uses", "").startswith("actions/setup-python"))
        assert setup["with"]["cache"] == "pip"
        for name in setup["with"]["cache-dependency-path"].split():
            assert (ROOT / name).exists(), name
        for script in (s["run"] for s in job["steps"] if s.get("run", "").startswith("scripts/")):
            assert os.access(ROOT / script, os.X_OK), script


def test_a_release_is_published_by_two_jobs_that_run_nothing_of_ours():
    release = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text())
    assert release[True] == {"push": {"tags": ["v*"]}}
    assert release["permissions"] == {}
    jobs = release["jobs"]
    rights = {name: job["permissions"] for name, job in jobs.items()}
    assert rights == {
        "test": {"contents": "read"}, "build": {"contents": "read"},
        "pypi": {"id-token": "write"}, "github": {"contents": "write"},
    }  # fmt: skip
    assert jobs["pypi"]["needs"] == ["test", "build"]
    assert jobs["github"]["needs"] == "pypi"
    runs = {name: [s["run"] for s in job["steps"] if "run" in s] for name, job in jobs.items()}
    assert runs["test"][-1] == "scripts/test"
    assert runs["build"][-1] == "scripts/wheels dist"
    assert not runs["pypi"]
    assert len(runs["github"]) == 1
    for step in (step for job in jobs.values() for step in job["steps"] if "uses" in step):
        assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", step["uses"]), step["uses"]


def test_what_scripts_test_lints_is_linted_before_a_commit():
    linters = set(
        re.findall(r'^\s*"\$venv/bin/([\w-]+)"', (ROOT / "scripts" / "test").read_text(), re.M)
    )
    linters -= {"pytest", "python"}
    (repo,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repo["repo"] == "local", "no tool of another version than the one of scripts/test"
    hooked = {
        re.fullmatch(r"\.venv/bin/([\w-]+)( .*)?", hook["entry"])[1] for hook in repo["hooks"]
    }
    assert linters
    assert linters <= hooked
    for hook in repo["hooks"]:
        assert re.compile(hook.get("files", "")), hook["id"]


def test_contributing_is_one_page_about_what_is_there():
    assert len(CONTRIBUTING.splitlines()) <= 110
    order = CONTRIBUTING.split("`cli -> ", 1)[1].split("`", 1)[0]
    assert ["cli", *re.findall(r"\w+", order)] == WINGS
    assert re.findall(r"^\| `(\w+)` \| ", CONTRIBUTING, re.M) == WINGS
    for name in re.findall(
        r"\b(?:scripts|tests|docs|cuda|nf4cli|\.github)/[\w./]*\w", CONTRIBUTING
    ):
        assert (ROOT / name).exists(), name


def test_the_security_policy_names_the_version_that_is_fixed():
    from nf4cli import __version__

    policy = (ROOT / "SECURITY.md").read_text()
    assert f"({__version__.rsplit('.', 1)[0]})" in policy
    assert "private vulnerability reporting" in policy
