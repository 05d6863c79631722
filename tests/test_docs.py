"""What the documents say is so: README's commands run, tables and schema agree."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import LLAMA, llama_tensors, nf4, write_checkpoint_dir
from typer.core import TyperOption
from typer.main import get_command
from typer.testing import CliRunner

from nf4cli import __version__
from nf4cli.cli import app
from nf4cli.cli.commands import Commands
from nf4cli.planning.selection import RULES

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize(
    ("page", "least"),
    [
        ("README.md", 8),
        pytest.param("docs/quantize.md", 8, marks=pytest.mark.gpu),
        ("docs/quality.md", 1),
    ],
)
def test_every_command_of_a_page_runs(page, least, tmp_path, gpu_nf4):
    lines = re.findall(r"^\$ (nf4 .*)$", (ROOT / page).read_text(), re.M)
    assert len(lines) >= least
    for name in ("model", "SmolLM2-135M"):
        write_checkpoint_dir(tmp_path / name, llama_tensors(), LLAMA)
    for line in lines:
        words = shlex.split(line, comments=True)[1:]
        if "cuda" in words:
            gpu_nf4(*words, cwd=tmp_path)
            continue
        done = nf4(*words, cwd=tmp_path)
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"


def test_every_command_is_in_the_readme():
    text = CliRunner().invoke(app, ["--help"]).output
    commands = set(Commands())
    assert all(command in text for command in commands)
    assert commands == set(re.findall(r"^\| `nf4 ([\w-]+)", README, re.M))


def test_the_readme_is_short_and_its_links_lead_somewhere():
    assert len(README.splitlines()) <= 150
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", README):
        assert (ROOT / target).exists(), target


def test_every_page_is_linked_from_the_readme():
    linked = set(re.findall(r"\]\(docs/(\w+\.md)", README))
    assert linked == {path.name for path in (ROOT / "docs").glob("*.md")}


def headings(page: Path) -> set[str]:
    """The anchors that GitHub gives to a page's headings."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", ["README.md", *sorted(f"docs/{p.name}" for p in
                                  (ROOT / "docs").glob("*.md"))])  # fmt: skip
def test_links_to_headings_lead_to_headings(page):
    place = ROOT / page
    for name, anchor in re.findall(r"\]\(([\w./]*)#([\w-]+)\)", place.read_text()):
        assert anchor in headings(place.parent / name if name else place), f"{name}#{anchor}"


def test_the_page_of_quantize_names_every_option():
    page = (ROOT / "docs" / "quantize.md").read_text()
    options = get_command(app).commands["quantize"].params
    for option in (o for o in options if isinstance(o, TyperOption)):
        assert any(f"`{name}" in page for name in [*option.opts, *option.secondary_opts]), option
        if option.rich_help_panel:
            assert f"### {option.rich_help_panel}\n" in page, "the page has the panels of --help"


def test_every_exit_code_is_in_the_readme():
    from nf4cli import errors

    documented = {int(code) for code in re.findall(r"^\| (\d+) \|", README, re.M)}
    kinds = [e for e in vars(errors).values() if isinstance(e, type)]
    used = {e.exit_code for e in kinds if issubclass(e, BaseException) and hasattr(e, "exit_code")}
    assert documented == used | {0, 1}


def test_the_exit_codes_are_the_same_everywhere():
    rows = [re.findall(r"^\| (\d+) \|", page, re.M) for page in
            (README, (ROOT / "docs" / "machine.md").read_text())]  # fmt: skip
    assert rows[0] == rows[1] == ["0", "1", "2", "3", "4", "130"]


def test_the_manifest_page_names_every_field():
    page = (ROOT / "docs" / "manifest.md").read_text()
    schema = json.loads((ROOT / "docs" / "manifest.schema.json").read_text())
    fields = set(schema["properties"]) | set(schema["$defs"]["tensor"]["properties"])
    fields |= set(schema["properties"]["recipe"]["properties"])
    missing = {field for field in fields if f"`{field}`" not in page}
    assert not missing


def test_the_design_page_names_every_wing_and_no_module_that_is_gone():
    page = (ROOT / "docs" / "design.md").read_text()
    package = ROOT / "nf4cli"
    for path in package.iterdir():
        if (path / "__init__.py").is_file():
            assert f"| `{path.name}/` |" in page
        elif path.suffix == ".py" and not path.name.startswith("__"):
            assert f"`{path.stem}`" in page
    table = page[page.index("| wing |") : page.index("`cuda/codec.h` is")]
    for wing, modules in re.findall(r"^\| `(\w+)/` \|.*\|(.*)\|$", table, re.M):
        for name in re.findall(r"`(\w+(?:/\w+)*)`", modules):
            there = (
                package / wing / f"{name}.py",
                package / f"{name}.py",
                package / wing / name / "__init__.py",
            )
            assert any(place.is_file() for place in there) or name == "cuda", (wing, name)
    for name in re.findall(r"`(\w+/\w+)\.py`", page):
        assert any((root / f"{name}.py").is_file() for root in (package, ROOT)), name


def test_the_page_of_families_is_what_the_rules_say():
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "families_page.py", "--check"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    page = (ROOT / "docs" / "families.md").read_text()
    assert "| llama | " in page
    assert all(f"| {rule.name} | {rule.reason} |" in page for rule in RULES)


def test_version():
    assert nf4("--version").stdout == f"nf4 {__version__}\n"
    assert "## [Unreleased]" in (ROOT / "CHANGELOG.md").read_text()


def tools(tmp_path: Path, *names: str) -> Path:
    """A PATH with nothing but these."""
    path = tmp_path / "bin"
    path.mkdir()
    for name in names:
        found = sys.executable if name == "python3" else shutil.which(name)
        assert found is not None
        (path / name).symlink_to(Path(found).resolve() if name != "python3" else found)
    return path


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (("python3", "dirname"), "apt-get install g++"),
        (("dirname",), "Python 3.10 or newer"),
    ],
)
def test_the_scripts_name_the_package_that_is_missing(tmp_path, names, says):
    done = subprocess.run(
        [shutil.which("bash"), "-c", f"source {ROOT}/scripts/bootstrap.sh; require_tools python3"],
        env={"PATH": str(tools(tmp_path, *names))}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 4
    assert says in done.stderr


def test_a_wheel_needs_no_compiler(tmp_path):
    wheel, path = tmp_path / "nf4cli.whl", tools(tmp_path, "python3", "dirname")

    def require() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [shutil.which("bash"), "-c",
             f"source {ROOT}/scripts/bootstrap.sh; require_tools python3"],
            env={"PATH": str(path), "NF4_WHEEL": str(wheel)},
            capture_output=True, text=True, check=False,
        )  # fmt: skip

    assert require().returncode == 4
    wheel.touch()
    assert require().returncode == 0


def test_scripts_can_be_run():
    for name in (
        "demo",
        "test",
        "nf4",
        "bench_convert.py",
        "bench_verify.py",
        "families_page.py",
        "survey_families.py",
        "survey_ties.py",
        "wheels",
    ):
        assert os.access(ROOT / "scripts" / name, os.X_OK)
    assert "scripts/test" in (ROOT / ".ci" / "run").read_text()
