"""GITHUB_STEP_SUMMARY: a section that renders, cannot be abused, and never fails the run."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers import nf4, nf4_ok
from lxml import html
from markdown_it import MarkdownIt

from nf4cli.cli import step_summary
from nf4cli.errors import MachineError
from nf4cli.output.report import Report

HOSTILE = (
    "a|b`c`<img src=x>*d*_e_ [f](https://g) @h #1 ~~i~~ $j$ \u202e\n\n# k &lt; \\| ![l](m) :n: \x00"
)


def rendered(text: str) -> Any:
    """As GitHub does it: tables, strikethrough, HTML allowed."""
    markdown = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    return html.fromstring(f"<div>{markdown.render(text)}</div>")


def cells(page: Any) -> list[list[str]]:
    return [[c.text_content() for c in row.iter("th", "td")] for row in page.iter("tr")]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The summary file, which has content already."""
    file = tmp_path / "summary.md"
    file.write_text("before\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(file))
    return file


def test_quantize_and_verify_append(llama, tmp_path, place):
    out = tmp_path / "out"
    nf4_ok("quantize", llama, out, "--plan")
    assert place.read_text() == "before\n"
    nf4_ok("quantize", llama, out, "--keep", "mlp.up_proj")
    nf4_ok("verify", out, "--json")
    text = place.read_text()
    assert text.startswith("before\n")
    page = rendered(text)
    assert [h.text_content() for h in page.iter("h3")] == [
        f"nf4 quantize: {out}", f"nf4 verify: {out}: good"
    ]  # fmt: skip
    sizes, groups, checks = page.iter("table")
    assert cells(sizes)[1][0] == "llama"
    assert int(cells(sizes)[1][1].replace(",", "")) == sum(
        p.stat().st_size for p in llama.glob("*.safetensors")
    )
    assert float(cells(sizes)[1][5]) > 0.05
    assert ["llama", "kept", "kept by --keep", "2", "32,768"] in cells(groups)
    assert all(row[2] == "ok" for row in cells(checks)[1:])
    assert "--source" in page.xpath("//li")[0].text_content()


def test_findings_are_listed_up_to_a_number(llama_nf4, tmp_path, place):
    out = shutil.copytree(llama_nf4, tmp_path / "out")
    (out / "tokenizer.json").write_text("[]")
    done = nf4("verify", out)
    assert done.returncode == 1
    assert "not good" in rendered(place.read_text()).text_content()
    report = Report()
    for number in range(1000):
        report.add("state", f"tensor {number}", "x" * 10_000)
    text = step_summary.verification_section(Path("out"), {"out": report})
    assert len(text) < 20_000
    assert "and 980 more" in text


@pytest.mark.parametrize("kind", ["directory", "pipe", "missing", "full", "device"])
def test_a_summary_that_cannot_be_written_is_a_note(llama_nf4, tmp_path, monkeypatch, kind):
    file = tmp_path / "summary"
    if kind == "directory":
        file.mkdir()
    elif kind == "pipe":
        os.mkfifo(file)
    elif kind == "missing":
        file = tmp_path / "no" / "summary"
    elif kind == "full":
        file.write_bytes(b"x" * (step_summary.LIMIT - 10))
    else:
        file = Path("/dev/full")
    size = file.stat().st_size if kind == "full" else 0
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(file))
    done = nf4("verify", llama_nf4)
    assert done.returncode == 0
    assert "no summary was written" in " ".join(done.stderr.split())
    assert "is good" in done.stdout
    if kind == "full":
        assert file.stat().st_size == size


def test_without_the_variable_nothing_is_written(llama_nf4, monkeypatch, tmp_path):
    for value in (None, ""):
        if value is None:
            monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
        else:
            monkeypatch.setenv("GITHUB_STEP_SUMMARY", value)
        assert nf4("verify", llama_nf4, "--quiet", cwd=tmp_path).stderr == ""
    assert list(tmp_path.iterdir()) == []


def test_hostile_names_stay_text_in_their_cell():
    report = Report()
    report.add(HOSTILE, HOSTILE, HOSTILE)
    report.check(HOSTILE, HOSTILE)
    report.unchecked.append(HOSTILE)
    page = rendered(step_summary.verification_section(Path(HOSTILE), {HOSTILE: report}))
    assert {e.tag for e in page.iter()} <= {
        "div", "h3", "table", "thead", "tbody", "tr", "th", "td", "p", "ul", "li", "strong"
    }  # fmt: skip
    plain = " ".join(HOSTILE.split()).replace("\0", "\ufffd").replace("\u202e", "\ufffd")
    checks, findings = page.iter("table")
    assert cells(checks)[1] == [plain, plain, "failed"]
    assert cells(findings)[1] == [plain] * 4


def test_the_limit_holds_to_the_byte(tmp_path):
    file = tmp_path / "s"
    file.write_bytes(b"x" * (step_summary.LIMIT - 4))
    step_summary.append_section("ab", file)  # with two line ends
    assert file.stat().st_size == step_summary.LIMIT
    with pytest.raises(MachineError, match="larger than"):
        step_summary.append_section("", file)
