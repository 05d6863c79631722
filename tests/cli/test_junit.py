"""`nf4 verify --junit`: valid XML of the common dialect, whatever a hostile name says."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import junitparser
import pytest
from helpers import nf4, nf4_ok
from lxml import etree

from nf4cli.cli.junit_file import of_error, of_reports
from nf4cli.output.report import Report

SCHEMA = etree.XMLSchema(etree.parse(Path(__file__).parent.with_name("junit.xsd")))
HOSTILE = "a\x00\x1b[31m]]><!-- \ud800 \ufffe \"'&amp; <b> \U0001f600 \n"


def umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def parsed(data: bytes) -> junitparser.JUnitXml:
    """As a consumer reads it, after the schema accepted it."""
    SCHEMA.assertValid(etree.fromstring(data))
    return junitparser.JUnitXml.fromstring(data)


def results(data: bytes) -> dict[str, str]:
    """Each case's outcome, by classname and name."""
    return {
        f"{case.classname}: {case.name}": type(case.result[0]).__name__ if case.result else "passed"
        for suite in parsed(data)
        for case in suite
    }


def test_a_good_output(llama_nf4, tmp_path):
    nf4_ok("verify", llama_nf4, "--junit", tmp_path / "r.xml")
    found = results((tmp_path / "r.xml").read_bytes())
    assert set(found.values()) == {"passed", "Skipped"}
    (skipped,) = (name for name, result in found.items() if result == "Skipped")
    assert "--source" in skipped
    assert len(found) == 5
    assert (tmp_path / "r.xml").stat().st_mode & 0o777 == 0o666 & ~umask()


def test_a_damaged_output(llama_nf4, tmp_path):
    out = shutil.copytree(llama_nf4, tmp_path / "out")
    (out / "tokenizer.json").write_text("[]")
    report = tmp_path / "r.xml"
    report.write_text("of an earlier run")
    done = nf4("verify", out, "--junit", report, "--json")
    assert done.returncode == 1
    found = results(report.read_bytes())
    assert found["nf4.verify.manifest: tokenizer.json"] == "Failure"
    assert sum(result == "Failure" for result in found.values()) == 2  # the check, and the file
    xml = parsed(report.read_bytes())
    assert (xml.failures, xml.errors, xml.tests) == (2, 0, len(found))


def test_an_error_is_in_the_report(tmp_path):
    done = nf4("verify", tmp_path / "no<thing>", "--junit", tmp_path / "r.xml")
    assert done.returncode == 3
    assert set(results((tmp_path / "r.xml").read_bytes()).values()) == {"Error"}


def test_a_usage_error_of_the_report_itself_leaves_nothing(llama_nf4, tmp_path):
    link = tmp_path / "loop"
    link.symlink_to(link)
    for place in (tmp_path, Path("/dev/null"), llama_nf4 / "config.json", link):
        assert nf4("verify", llama_nf4, "--junit", place, cwd=tmp_path).returncode == 2
    assert list(tmp_path.iterdir()) == [link]
    assert Path("/dev/null").is_char_device()


def test_a_place_that_cannot_be_written_is_said_before_the_work(llama_nf4, tmp_path):
    done = nf4("verify", llama_nf4, "--junit", tmp_path / "no" / "r.xml")
    assert done.returncode == 4
    assert "--junit" in done.stderr
    assert "No such file or directory" in done.stderr
    assert done.stdout == ""


def test_a_pipeline_has_a_suite_for_itself_and_for_each_component(pipeline, tmp_path):
    out = tmp_path / "transformer"  # called as a component is
    out.symlink_to(pipeline / "out")
    nf4_ok("verify", out, "--junit", tmp_path / "r.xml")
    names = [suite.name for suite in parsed((tmp_path / "r.xml").read_bytes())]
    assert sorted(names) == [
        "transformer", "transformer/text_encoder", "transformer/transformer"
    ]  # fmt: skip


def test_a_loop_of_links_is_an_error_in_the_report(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    for command in (("verify", "--junit", "r.xml"), ("attest",)):
        done = nf4(command[0], "loop", *command[1:], cwd=tmp_path)
        assert done.returncode == 3, done.stderr
    assert set(results((tmp_path / "r.xml").read_bytes()).values()) == {"Error"}


def test_hostile_names_are_text():
    report = Report()
    report.add("manifest", HOSTILE, HOSTILE)
    report.add("manifest", HOSTILE, "a second finding of the same tensor")
    report.check("manifest", f"check {HOSTILE}")
    report.unchecked.append(HOSTILE)
    data = of_reports({HOSTILE: report, "": Report()})
    found = results(data)
    assert sorted(found.values()) == ["Failure", "Failure", "Skipped"]
    root = etree.fromstring(data)
    assert {e.tag for e in root.iter()} == {
        "testsuites", "testsuite", "testcase", "failure", "skipped"
    }  # fmt: skip
    text = root.find(".//testcase[@classname='nf4.verify.manifest']/failure[2]")
    assert text is None  # one a case
    assert "]]><!--" in root.find("testsuite").get("name")
    assert "\U0001f600" in root.find("testsuite").get("name")
    parsed(of_error(HOSTILE, "InputError", HOSTILE))


@pytest.mark.parametrize("code", [*range(0x20), 0x7F, 0xD800, 0xDFFF, 0xFFFE, 0xFFFF, 0x10FFFF])
def test_every_character_can_be_in_a_name(code):
    report = Report()
    report.add("state", f"<{chr(code)}>", f"a{chr(code)}b")
    root = etree.fromstring(of_reports({chr(code): report}))
    assert root.find(".//failure").get("message").startswith("a")


def test_the_same_report_gives_the_same_bytes():
    report = Report()
    report.add("state", "a", "b")
    report.check("state", "c")
    assert of_reports({"x": report}) == of_reports({"x": report})
