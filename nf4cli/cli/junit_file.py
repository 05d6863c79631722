"""Write the report of a verification as JUnit XML for CI (--junit FILE), even after an error."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree as ET

if TYPE_CHECKING:
    from ..checkpoint.atomic_file import AtomicFile
    from ..output.report import Finding, Report


class JUnitFile:
    """A report file; its place is tried before the long work, and it reports an error that ends it.

    Args:
        place: the file, None for no report.
        path, source: the output and its source, in whose directories the file must not lie.

    Raises:
        UsageError, MachineError: see AtomicFile.
    """

    def __init__(self, place: Path | None, path: Path, source: Path | None) -> None:
        from ..checkpoint.atomic_file import AtomicFile
        from ..checkpoint.file_io import name_of

        self._name = name_of(path)
        self._stack = ExitStack()
        apart = [p for p in (path, source) if p is not None and p.is_dir()]
        self._file: AtomicFile | None = (
            None
            if place is None
            else self._stack.enter_context(AtomicFile(place, "--junit", apart))
        )

    def write(self, reports: Mapping[str, Report]) -> None:
        """Write the report of a verification that came to an end."""
        if self._file is not None:
            self._file.write(of_reports(reports))

    def __enter__(self) -> JUnitFile:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        from ..errors import InterruptedRunError, Nf4Error

        with self._stack:
            broken = isinstance(error, (Nf4Error, OSError))
            if self._file and broken and not isinstance(error, InterruptedRunError):
                self._file.write(of_error(self._name, type(error).__name__, str(error)))


_NO_XML = "[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]"


_CLASS = "nf4.verify"


def of_reports(reports: Mapping[str, Report]) -> bytes:
    """Return the document of a verification that came to an end: UTF-8 XML.

    Args:
        reports: by the name of the component or checkpoint.
    """
    root = ET.Element("testsuites", name=_CLASS)
    for name, report in reports.items():
        suite = ET.SubElement(root, "testsuite", name=_text(name))
        for check in report.checks:
            case = _case(suite, check.level, check.what)
            if not check.ok:
                count = sum(finding.level == check.level for finding in report.findings)
                _child(case, "failure", f"findings: {count}", check.level, f"not so: {check.what}")
        for (level, where), findings in _by_place(report.findings).items():
            messages = [finding.message for finding in findings]
            _child(_case(suite, level, where), "failure", messages[0], level, "\n".join(messages))
        for sentence in report.unchecked:
            ET.SubElement(_case(suite, "unchecked", sentence), "skipped", message=_text(sentence))
    return _finished(root)


def of_error(name: str, kind: str, message: str) -> bytes:
    """Return the document of a verification that an error ended: UTF-8 XML.

    Args:
        name: of the checkpoint.
        kind: name of the error's class.
        message: of the error.
    """
    root = ET.Element("testsuites", name=_CLASS)
    suite = ET.SubElement(root, "testsuite", name=_text(name))
    _child(_case(suite, "run", "the verification comes to an end"), "error", message, kind, message)
    return _finished(root)


def _by_place(findings: list[Finding]) -> dict[tuple[str, str], list[Finding]]:
    places: dict[tuple[str, str], list[Finding]] = {}
    for finding in findings:
        places.setdefault((finding.level, finding.where), []).append(finding)
    return places


def _case(suite: ET.Element, level: str, name: str) -> ET.Element:
    return ET.SubElement(suite, "testcase", classname=f"{_CLASS}.{level}", name=_text(name))


def _child(case: ET.Element, tag: str, message: str, kind: str, text: str) -> None:
    ET.SubElement(case, tag, message=_text(message), type=kind).text = _text(text)


def _text(text: str) -> str:
    """Return a text with U+FFFD for characters that XML 1.0 cannot hold, not even escaped."""
    return re.sub(_NO_XML, "\ufffd", text)


def _finished(root: ET.Element) -> bytes:
    """Add the counts of tests and failures that readers expect, and return the document."""
    kinds = {"failures": "failure", "errors": "error", "skipped": "skipped"}
    for suite in root:
        suite.set("tests", str(len(suite)))
        for attribute, tag in kinds.items():
            suite.set(attribute, str(sum(case.find(tag) is not None for case in suite)))
    for attribute in ("tests", "failures", "errors"):
        root.set(attribute, str(sum(int(suite.get(attribute, "0")) for suite in root)))
    ET.indent(root)
    text: bytes = ET.tostring(root, "utf-8", xml_declaration=True)
    return text + b"\n"
