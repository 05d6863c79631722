"""The manifest: its schema, its round trip, its refusals, and the first one ever released."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest
from helpers import nf4_ok

from nf4cli.checkpoint.discovery import MANIFEST
from nf4cli.errors import InputError
from nf4cli.output.manifest import Manifest, indented

ROOT = Path(__file__).parent.parent
SCHEMA = json.loads((ROOT.parent / "docs" / "manifest.schema.json").read_text())


def test_what_is_written_is_valid(llama_nf4):
    document = json.loads((llama_nf4 / MANIFEST).read_text())
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(document, SCHEMA)


@pytest.mark.parametrize("options", [("--no-double-quant", "--digest", "sha256"),
                                     ("--keep", "mlp", "--dtype", "float32")])  # fmt: skip
def test_other_recipes_are_valid(llama, tmp_path, options):
    nf4_ok("quantize", llama, tmp_path / "out", *options)
    jsonschema.validate(json.loads((tmp_path / "out" / MANIFEST).read_text()), SCHEMA)


def test_round_trip(llama_nf4):
    text = (llama_nf4 / MANIFEST).read_text()
    assert Manifest.from_file(llama_nf4 / MANIFEST).to_json() == text


@pytest.mark.parametrize(
    "value",
    [
        {}, [], {"a": {}}, {"a": [], "b": [[], {}]},
        {"ключ\n\"": "\u2028é\x00"}, [1, -2.5e-300, 1e16],
        [True, False, None, 10**30], {"a": {"b": [1, {"c": [2.0, "x"]}]}, "d": 0.1},
    ],
)  # fmt: skip
def test_json_is_indented_as_the_library_does(value):
    assert indented(value) == json.dumps(value, indent=1)


@pytest.mark.parametrize("tensors", [0, 1, 3])
def test_the_text_is_the_document(llama_nf4, tensors):
    whole = Manifest.from_file(llama_nf4 / MANIFEST)
    manifest = replace(whole, tensors=dict(list(whole.tensors.items())[:tensors]))
    assert manifest.to_json() == json.dumps(manifest.to_dict(), indent=1) + "\n"


def test_nothing_of_the_machine_is_in_it(llama, llama_nf4):
    assert str(llama.parent) not in (llama_nf4 / MANIFEST).read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(nf4_manifest=2), "format 2.*install a newer"),
        (lambda d: d.pop("nf4_manifest"), "format None"),
        (lambda d: d.pop("tensors"), "damaged"),
        (lambda d: d["recipe"].update(surprise=1), "damaged"),
        (lambda d: d["digests"].update(files="md5"), "damaged"),
        (lambda d: d.update(tensors=[1]), "damaged"),
        (lambda d: d["output"]["files"][0].update(size="many"), "damaged"),
    ],
)
def test_a_damaged_manifest_is_refused(llama_nf4, tmp_path, change, message):
    document = json.loads((llama_nf4 / MANIFEST).read_text())
    change(document)
    path = tmp_path / MANIFEST
    path.write_text(json.dumps(document))
    with pytest.raises(InputError, match=message):
        Manifest.from_file(path)


def test_the_first_format_is_accepted_for_ever(tmp_path):
    """tests/goldens/manifest_v1 is the output of the first release; it is never written anew."""
    kept = ROOT / "goldens" / "manifest_v1"
    jsonschema.validate(json.loads((kept / MANIFEST).read_text()), SCHEMA)
    shutil.copytree(kept, tmp_path / "out")
    assert "every byte is the one written" in nf4_ok("verify", tmp_path / "out")
