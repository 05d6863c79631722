"""The Containerfile: its instructions, run here one by one without a container."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import pytest
from ci.commands import stand_in
from ci.context import alone, copy_context
from dockerfile_parse import DockerfileParser
from helpers import nf4_ok, same_files

from nf4cli import __version__

ROOT = Path(__file__).parent.parent
PARSED = DockerfileParser(fileobj=BytesIO((ROOT / "Containerfile").read_bytes()))


@pytest.fixture(scope="module")
def stages() -> list[list[tuple[str, str]]]:
    """(instruction, value) of each of the two stages."""
    found: list[list[tuple[str, str]]] = []
    for entry in PARSED.structure:
        if entry["instruction"] == "FROM":
            found.append([])
        if entry["instruction"] != "COMMENT":
            found[-1].append((entry["instruction"], entry["value"]))
    return found


def test_it_is_as_its_linter_wants_it():
    lint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run(
        [lint, ROOT / "Containerfile"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def test_what_goes_into_the_image_is_what_the_package_is_made_of(tmp_path):
    context = copy_context(tmp_path)
    assert {path.name for path in context.iterdir()} == {
        "CMakeLists.txt", "LICENSE", "README.md", "cuda", "nf4cli", "pyproject.toml"
    }  # fmt: skip
    assert not [p for p in context.rglob("*") if p.suffix in (".so", ".pyc")]
    assert (context / "nf4cli" / "planning" / "families.json").exists()


def test_it_builds_and_converts(stages, wheel, work, tmp_path):
    """Stage one's commands make the environment that stage two copies, and nf4 in it works.

    The environment lies elsewhere than in the image, and pip takes the wheel that was made of the
    same files already.
    """
    build, final = stages
    *system, command = [value for instruction, value in build if instruction == "RUN"]
    assert len(system) == 1, "one RUN installs the compiler, one the package"
    assert "install -y --no-install-recommends g++" in system[0]
    assert ("COPY", "--from=build /opt/nf4 /opt/nf4") in final
    place = tmp_path / "opt" / "nf4"
    stand_in(tmp_path / "bin", "python", f'exec {sys.executable} "$@"')
    path = stand_in(tmp_path / "bin", "pip", f'''
        [ "$*" = "--python {place}/bin/python install --no-cache-dir ." ] || exit 99
        exec {sys.executable} -m pip -q "${{@/#./{wheel}}}"''')  # fmt: skip
    subprocess.run(
        ["sh", "-c", command.replace("/opt/nf4", str(place))],
        env=alone() | {"PATH": path}, check=True, cwd=tmp_path,
    )  # fmt: skip
    (entry,) = [json.loads(value) for instruction, value in final if instruction == "ENTRYPOINT"]
    (default,) = [json.loads(value) for instruction, value in final if instruction == "CMD"]
    assert str(place / "bin") in str(PARSED.envs["PATH"]).replace("/opt/nf4", str(place))

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [place / "bin" / entry[0], *arguments], env=alone(), cwd=work, check=True,
            capture_output=True, text=True,
        )  # fmt: skip
        return done.stdout

    assert run("--version") == f"nf4 {__version__}\n"
    assert "quantize" in run(*default)
    run("quantize", "model", "out")
    nf4_ok("quantize", "model", "other", cwd=work)
    assert same_files(work / "out", work / "other")


def test_nobody_is_root_in_it(stages):
    final = dict(stages[1])
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", final["USER"])
    assert PARSED.envs["HF_HOME"] in json.loads(final["VOLUME"])
    assert shlex.split(final["WORKDIR"]) == ["/models"]
