"""scripts/gpu_day over an emulated device, at a small size, so that it cannot rot."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "scripts" / "gpu_day"
HERE = ROOT / "scripts" / "gpu"


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module of scripts/gpu, whose modules import each other by their bare names."""
    monkeypatch.syspath_prepend(str(HERE))
    for other in ("environment", "report", "running", name):
        monkeypatch.delitem(sys.modules, other, raising=False)
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


def gpu_day(out: Path, *arguments: object, code: int = 0) -> dict:
    done = subprocess.run(
        [SCRIPT, out, *map(str, arguments)],
        env={**os.environ, "NF4_PYTHON": sys.executable},
        capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    log = (out / "gpu_day.log").read_text() if (out / "gpu_day.log").exists() else ""
    assert done.returncode == code, done.stdout + done.stderr + log
    return json.loads((out / "gpu_day.json").read_text())


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ("check", ("byte-equal with torch (cpu)", "| files of both engines | equal |",
                   "quantize BF16, error sums")),
        pytest.param("tests", ("1 passed", "compute-sanitizer"), marks=pytest.mark.long),
        ("conversions", ("`--engine cuda`, by workers", "`--engine cpu`, by workers",
                         "bytes of all outputs | the same", "kernel quantize",
                         "copies to the GPU", "8B-shaped, 16 GB | not converted")),
        pytest.param(
            "bitsandbytes", ("plain: decoded weights | 0 of", "searched: decoded weights | 0 of",
                             "LoRA after from_pretrained | loss", "0 of 278,528 codes"),
            marks=pytest.mark.long,
        ),
        pytest.param(
            "calibration", ("calibration, gptq", "loss 0, importance 0"), marks=pytest.mark.long
        ),
    ],
)  # fmt: skip
def test_every_part_over_the_emulated_device(shim_library, tmp_path, parts, words):
    out = tmp_path / "day"
    found = gpu_day(out, "--emulate", shim_library, "--here", "--parts", parts)
    for name in parts.split(","):
        assert found["parts"][name]["status"] == "done", found["parts"][name]
        assert found["parts"][name]["failures"] == []
    table = (out / "gpu_day.md").read_text()
    for word in words:
        assert word in table
    assert sorted(p.name for p in out.iterdir()) == ["gpu_day.json", "gpu_day.log", "gpu_day.md"]
    left = {p.name for p in (tmp_path / "day.work").iterdir() if p.is_dir()}
    assert left <= {"cache", "hub"}  # no models


def test_a_part_that_fails_and_one_that_hangs_are_reported(tmp_path, monkeypatch):
    """And what they had found by then; the next part runs, and nothing of them stays."""
    day = load("day", monkeypatch)
    scripts = {
        "check": "part.report.row('a', '1'); raise ValueError('broken on purpose')",
        "tests": "part.report.row('b', '2')\n    import subprocess, time\n"
        "    subprocess.Popen(['sleep', '987'])\n    time.sleep(600)",
        "conversions": "part.report.row('c', '3')",
        "bitsandbytes": "import os; os._exit(9)",
    }  # fmt: skip
    place = tmp_path / "gpu"
    place.mkdir()
    (place / "report.py").write_text((HERE / "report.py").read_text())
    for name, body in scripts.items():
        (place / f"part_{name}.py").write_text(
            f"from report import main\n\n\ndef run(part):\n    {body}\n\n\nmain(run)\n"
        )
    monkeypatch.setattr(day, "HERE", place)
    monkeypatch.setattr(day, "LIMITS", {**day.LIMITS, "tests": 8})
    monkeypatch.setattr(day, "_LEAST", 1)
    monkeypatch.setattr(
        sys, "argv",
        ["day", str(tmp_path / "out"), "--here", "--parts", ",".join(scripts)],
    )  # fmt: skip
    assert day.main() == 1
    parts = json.loads((tmp_path / "out" / "gpu_day.json").read_text())["parts"]
    assert parts["check"]["status"] == "not all of it succeeded"
    assert parts["check"]["rows"] == [["a", "1"]]
    assert parts["tests"]["status"] == "ended at its limit of 8 s"
    assert parts["tests"]["rows"] == [["b", "2"]]
    assert parts["conversions"]["status"] == "done"
    assert parts["bitsandbytes"]["status"] == "not all of it succeeded"
    log = (tmp_path / "out" / "gpu_day.log").read_text()
    assert "ValueError: broken on purpose" in log
    assert not any("987" in line for line in processes())


def processes() -> list[str]:
    """The command lines of everything that runs."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        except OSError:
            continue
    return [line for line in found if line.startswith("sleep ")]


def test_parts_are_added_to_what_is_known(tmp_path, monkeypatch):
    day = load("day", monkeypatch)
    monkeypatch.setattr(
        day, "run_part",
        lambda asked, name, limit: {"status": "done", "seconds": 1, "rows": [[name, str(limit)]],
                                    "figures": {}, "failures": [], "log": ""},
    )  # fmt: skip
    out = tmp_path / "out"
    for parts, minutes in (("check", "9"), ("tests,conversions", "2")):
        arguments = ["day", str(out), "--here", "--parts", parts, "--minutes", minutes]
        monkeypatch.setattr(sys, "argv", arguments)
        assert day.main() == 0
    parts = json.loads((out / "gpu_day.json").read_text())["parts"]
    assert list(parts) == ["check", "tests", "conversions"]
    assert float(parts["check"]["rows"][0][1]) == day.LIMITS["check"]
    assert float(parts["tests"]["rows"][0][1]) <= 115  # what two minutes leave
    assert "| check |" in (out / "gpu_day.md").read_text()
    monkeypatch.setattr(sys, "argv", ["day", str(out), "--here", "--parts", "dance"])
    with pytest.raises(SystemExit):
        day.main()


def test_all_parts_and_the_environment_take_less_than_25_minutes(monkeypatch):
    day = load("day", monkeypatch)
    assert sum(day.LIMITS.values()) + 90 <= 25 * 60
    for name in day.LIMITS:
        assert (HERE / f"part_{name}.py").exists()
        assert name in day.TITLES


def test_its_environment_is_this_one_with_wheels_in_front(wheel, tmp_path, monkeypatch):
    """Of two versions the wheel's counts; what is installed here stays as it is."""
    environment = load("environment", monkeypatch)
    other = tmp_path / "xxhash-99.0-py3-none-any.whl"
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr("xxhash/__init__.py", "VERSION = 99\n")
        about = "Metadata-Version: 2.1\nName: xxhash\nVersion: 99.0\n"
        archive.writestr("xxhash-99.0.dist-info/METADATA", about)
        tag = "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        archive.writestr("xxhash-99.0.dist-info/WHEEL", tag)
        archive.writestr("xxhash-99.0.dist-info/RECORD", "")
    before = sorted(p.name for p in environment._there()[0].iterdir())
    python = environment.make(tmp_path / "environment", [wheel, other], None)
    code = (
        "import importlib.metadata as m, nf4cli, numpy, sys, xxhash\n"
        "print(nf4cli.__file__, xxhash.VERSION, m.version('xxhash'), sys.prefix, sep='\\n')"
    )
    done = subprocess.run([python, "-I", "-c", code], capture_output=True, text=True, check=True)
    file, version, known, prefix = done.stdout.split()
    assert file.startswith(str(tmp_path))
    assert (version, known) == ("99", "99.0")
    assert prefix == str(tmp_path / "environment")
    said = subprocess.run(
        [python.with_name("nf4"), "--version"], capture_output=True, text=True, check=True
    )
    assert said.stdout.strip()
    checked = subprocess.run(
        [python, "-c", environment.CHECK], capture_output=True, text=True, check=True
    )
    assert json.loads(checked.stdout)["wrong"] == []
    assert sorted(p.name for p in environment._there()[0].iterdir()) == before


def test_an_environment_that_cannot_be_made_is_told_in_the_log(tmp_path, monkeypatch):
    day = load("day", monkeypatch)
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / "broken-1.0-py3-none-any.whl").write_text("no archive")
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["day", str(out), "--wheels", str(tmp_path / "wheels")])
    assert day.main() == 1
    assert "pip could not install broken-1.0" in (out / "gpu_day.log").read_text()


def test_every_wheel_that_is_needed_is_fetched(tmp_path, monkeypatch):
    """Requirements of requirements, those of other Pythons and systems left out."""
    wheels = load("wheels", monkeypatch)
    needs = {
        "bitsandbytes": ["torch<3,>=2.4", "lion-pytorch; extra == 'test'"],
        "typer": ["pydantic>=2.5", "rich>=13", "colorama; platform_system == 'Windows'"],
        "pydantic": ["pydantic_core==2.50"],
        "blake3": ["typing-extensions; python_full_version < '3.12'"],
    }
    asked = []

    def download(directory: Path, requirement: str) -> None:
        asked.append(requirement)
        name = requirement.partition("=")[0].partition(">")[0]
        version = requirement.partition("==")[2] or "9.0"
        lines = [f"Requires-Dist: {need}" for need in needs.get(name, [])]
        file = directory / f"{name.replace('-', '_')}-{version}-py3-none-any.whl"
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr(f"{name}-{version}.dist-info/METADATA", "\n".join(lines) + "\n\nText")

    monkeypatch.setattr(wheels, "download", download)
    found = wheels.fetch(tmp_path)
    assert {p.name.split("-")[0] for p in found} == {
        "bitsandbytes", "compressed_tensors", "greenlet", "typer", "pydantic", "pydantic_core",
        "blake3", "lz4",
    }  # fmt: skip
    assert wheels.pinned("typer") in asked
    assert "pydantic_core==2.50" in asked


def test_a_test_that_fails_there_is_named(tmp_path, monkeypatch):
    part_tests, report = load("part_tests", monkeypatch), sys.modules["report"]
    junit = tmp_path / "junit.xml"
    junit.write_text(
        "<testsuites><testsuite><testcase classname='a' name='good'/>"
        "<testcase classname='a' name='bad'><failure message='m'>what was wrong</failure>"
        "</testcase><testcase classname='a' name='left'><skipped message='no GPU'/></testcase>"
        "</testsuite></testsuites>"
    )
    part = report.Part(report.Report(tmp_path / "report.json"), tmp_path, None, 0)
    part_tests.summarize(part, junit, "exit code 1")
    found = json.loads((tmp_path / "report.json").read_text())
    assert found["rows"][0][1] == "1 failure, 1 passed, 1 skipped"
    assert found["figures"]["skipped"] == {"no GPU": 1}
    assert found["failures"] == [{"what": "a::bad", "detail": "what was wrong"}]
