"""scripts/wheels: a release is built and used, its checks find what is wrong, it has notes."""

from __future__ import annotations

import base64
import hashlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
RELEASE = ROOT / "scripts" / "release"
NOTES = """import sys; sys.path.insert(0, sys.argv.pop(1))
from notes import notes
print(notes(*sys.argv[1:]), end="")"""
CHANGELOG = """# Changelog
## [Unreleased]
- not yet
## [0.3.0] - 2026-01-02
### Added
- wheels
## [0.2.0] - 2025-01-02
- old
"""


def tell(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", NOTES, RELEASE, *arguments],
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_notes_are_the_section_of_the_version():
    assert tell("v0.3.0", "0.3.0", CHANGELOG).stdout == "### Added\n- wheels\n"
    assert tell("v0.2.0", "0.2.0", CHANGELOG).stdout == "- old\n"


@pytest.mark.parametrize(
    ("tag", "version", "says"),
    [("v0.3.1", "0.3.0", "the tag is v0.3.1"), ("v0.4.0", "0.4.0", "no section about 0.4.0")],
)
def test_a_tag_without_a_version_or_notes_is_no_release(tag, version, says):
    done = tell(tag, version, CHANGELOG)
    assert done.returncode
    assert says in done.stderr


def test_a_directory_with_files_is_not_written_to(tmp_path):
    """In the environment of the tests: nothing is built."""
    (tmp_path / "old.whl").touch()
    code = (
        "import sys, types\n"
        "sys.modules.update({n: types.SimpleNamespace(check_wheel=0, must=0, build_sdist=0,"
        " build_wheel=0, run=0, unpack=0, call_library=0, use_wheel=0)"
        " for n in ('building', 'checking', 'trying')})\n"
        "sys.path.insert(0, sys.argv.pop(1))\n"
        "import make; make.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, RELEASE, tmp_path], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "is not empty" in done.stderr


def test_the_platforms_of_the_readme_are_those_that_are_built():
    text = (RELEASE / "platforms.py").read_text()
    tags = re.findall(r'Platform\("(\w+)"', text)
    assert len(tags) == 6
    readme = (ROOT / "README.md").read_text()
    for word in ("glibc 2.17", "musl 1.2", "macOS 11", "macOS 10.13"):
        assert word in readme
        assert any(re.sub(r"\D+", "_", word).strip("_") in tag for tag in tags), word


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The files of a release for two platforms, and what scripts/wheels said."""
    place = tmp_path_factory.mktemp("release") / "dist"
    done = subprocess.run(
        [ROOT / "scripts" / "wheels", "--only", "manylinux_2_17_x86_64",
         "--only", "manylinux_2_17_aarch64", place],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return place, done.stdout


@pytest.mark.long
def test_a_release_is_built_checked_and_used(built):
    place, said = built
    assert len([*place.glob("nf4cli-*.whl")]) == 2
    assert len([*place.glob("nf4cli-*.tar.gz")]) == 1
    assert said.count("twice the same") == 3
    assert "manylinux_2_17_x86_64: checked; installed, nf4 0." in said
    assert re.search(r"^manylinux_2_17_x86_64: .*; ran generic", said, re.M)
    if shutil.which("qemu-aarch64") and Path("/usr/aarch64-linux-gnu/lib/libc.so.6").exists():
        assert re.search(r"^manylinux_2_17_aarch64: .*; ran generic", said, re.M)


def check(wheel: Path, tag: str, place: Path) -> str:
    """What the checks say of a wheel under a platform's name; "" if nothing is wrong."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path; from checking import check_wheel; from platforms import *\n"
        "(one,) = (p for p in PLATFORMS if p.tag == sys.argv[3])\n"
        "check_wheel(Path(sys.argv[2]), one, Path(sys.argv[4]))"
    )
    programs = ROOT / ".venv-wheels" / "bin"
    done = subprocess.run(
        [programs / "python", "-c", code, RELEASE, wheel, tag, place], text=True, check=False,
        env={**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"}, capture_output=True,
    )  # fmt: skip
    return done.stdout + done.stderr if done.returncode else ""


@pytest.mark.long
def test_the_checks_find_what_is_wrong(built, tmp_path):
    """A wheel under another platform's name, and the library of this machine's own compiler."""
    (wheel,) = built[0].glob("*manylinux_2_17_x86_64.whl")
    tag, other = "manylinux_2_17_x86_64", "manylinux_2_17_aarch64"
    assert check(wheel, tag, tmp_path / "good") == ""
    assert "the tags of" in check(wheel, other, tmp_path / "tag")
    renamed = tmp_path / wheel.name.replace(tag, other)
    rewrite(wheel, renamed, {"WHEEL": lambda text: text.replace(tag.encode(), other.encode())})
    assert "is for EM_X86_64" in check(renamed, other, tmp_path / "cpu")
    source = tmp_path / "foreign.cpp"
    source.write_text(
        "#include <string>\n"
        'extern "C" int nf4_quantize_generic(int n) { return std::to_string(n).size(); }\n'
        'extern "C" int foreign(int n) { return n; }\n'
    )
    library = tmp_path / "foreign.so"
    subprocess.run(["g++", "-shared", "-fPIC", "-o", library, source], check=True)
    broken = tmp_path / "broken" / wheel.name
    broken.parent.mkdir()
    rewrite(wheel, broken, {"_nf4.so": lambda _: library.read_bytes()})
    assert re.search(r"exports .*foreign|needs libstdc", check(broken, tag, tmp_path / "symbols"))


def rewrite(wheel: Path, target: Path, changes: dict) -> None:
    """Copy a wheel, with some of its files changed and RECORD told of it."""
    with zipfile.ZipFile(wheel) as old:
        content = {
            name: changes.get(name.rsplit("/", 1)[-1], bytes)(old.read(name))
            for name in old.namelist()
        }
    (record,) = (name for name in content if name.endswith("/RECORD"))
    lines = []
    for name, data in content.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        lines.append(f"{name},,\n" if name == record else f"{name},sha256={digest},{len(data)}\n")
    content[record] = "".join(lines).encode()
    with zipfile.ZipFile(target, "w") as new:
        for name, data in content.items():
            new.writestr(name, data)
