"""`nf4 attest`: true, deterministic, and taken by the tools that are to sign it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import MACHINE, USAGE, nf4, nf4_ok, refused
from schemas import document, validator

import nf4cli
from nf4cli.checkpoint.discovery import MANIFEST, PIPELINE_RECORD
from nf4cli.errors import InputError
from nf4cli.proof.attest import BUILD_TYPE, SELF_ATTESTED, attest


@pytest.fixture
def out(llama_nf4, tmp_path) -> Path:
    """An output that may be changed."""
    return shutil.copytree(llama_nf4, tmp_path / "out")


def statement(path: Path) -> dict[str, Any]:
    """A statement file, valid by our schema."""
    found = json.loads(path.read_bytes())
    validator("statement").validate(found)
    return found


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def all_files(root: Path) -> dict[str, str]:
    """All that a statement speaks of: not the model card, which is edited."""
    return {
        p.relative_to(root).as_posix(): sha256(p)
        for p in root.rglob("*")
        if p.is_file() and p != root / "README.md"
    }


def subjects(found: dict[str, Any]) -> dict[str, str]:
    return {s["name"]: s["digest"]["sha256"] for s in found["subject"]}


def test_every_file_is_a_subject(out, llama, tmp_path):
    text = nf4_ok("attest", out, cwd=tmp_path)
    assert "cosign attest-blob --statement" in text
    found = statement(tmp_path / "out.intoto.json")
    assert subjects(found) == all_files(out)
    assert MANIFEST in subjects(found)
    manifest = json.loads((out / MANIFEST).read_text())
    definition = found["predicate"]["buildDefinition"]
    assert definition["buildType"] == BUILD_TYPE
    assert definition["externalParameters"] == {"recipe": manifest["recipe"], "source": "llama"}
    (source,) = definition["resolvedDependencies"]
    assert source["digest"] == {"blake3": manifest["source"]["files"][0]["digest"]}
    builder = found["predicate"]["runDetails"]["builder"]
    assert builder == {"id": SELF_ATTESTED, "version": {"nf4cli": manifest["tool"]["version"]}}
    assert str(tmp_path) not in json.dumps(found)


def test_with_the_source_it_is_proved_first(out, llama, tmp_path):
    nf4_ok("attest", out, tmp_path / "a", "--source", llama, "--builder-id", "https://ci.example/1")
    found = statement(tmp_path / "a")
    (source,) = found["predicate"]["buildDefinition"]["resolvedDependencies"]
    assert source["digest"]["sha256"] == sha256(llama / "model.safetensors")
    assert found["predicate"]["runDetails"]["builder"]["id"] == "https://ci.example/1"
    other = shutil.copytree(llama, tmp_path / "other")
    data = bytearray((other / "model.safetensors").read_bytes())
    data[-3] ^= 1
    (other / "model.safetensors").write_bytes(data)
    done = nf4("attest", out, tmp_path / "b", "--source", other)
    assert done.returncode == 1
    assert "is not the file that this was made from" in done.stdout
    assert not (tmp_path / "b").exists()


def test_the_function_returns_what_the_command_writes(out, llama, tmp_path):
    nf4_ok("attest", out, tmp_path / "a", "--source", llama)
    assert nf4cli.attest(out, llama).to_bytes() == (tmp_path / "a").read_bytes()
    flip(next(out.glob("*.safetensors")))
    found = nf4cli.attest(out)
    assert found.statement is None
    assert [finding.where for finding in found.findings] == ["model.safetensors"]


def test_it_is_the_same_every_time(out, tmp_path, llama):
    nf4_ok("attest", out, tmp_path / "a", "--workers", "1")
    nf4_ok("attest", out, tmp_path / "b", "--workers", "3")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert nf4_ok("attest", out, "-").encode() == (tmp_path / "a").read_bytes()
    again = tmp_path / "elsewhere" / "out"
    nf4_ok("quantize", llama, again, "--digest", "sha256")
    nf4_ok("attest", again, tmp_path / "c")
    (dependency,) = statement(tmp_path / "c")["predicate"]["buildDefinition"][
        "resolvedDependencies"
    ]
    assert dependency["digest"] == {"sha256": sha256(llama / "model.safetensors")}


def test_a_pipeline(pipeline, tmp_path):
    out, source = pipeline / "out", pipeline / "pipe"
    nf4_ok("attest", out, tmp_path / "a", "--source", source)
    found = statement(tmp_path / "a")
    assert subjects(found) == all_files(out)
    assert {PIPELINE_RECORD, f"transformer/{MANIFEST}"} <= set(subjects(found))
    definition = found["predicate"]["buildDefinition"]
    assert set(definition["externalParameters"]["components"]) == {"text_encoder", "transformer"}
    assert {d["name"]: d["digest"]["sha256"] for d in definition["resolvedDependencies"]} == {
        name: sha256(source / name)
        for name in ("text_encoder/model.safetensors",
                     "transformer/diffusion_pytorch_model.safetensors")
    }  # fmt: skip


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "where"),
    [
        (lambda out: flip(out / "model.safetensors"), "model.safetensors"),
        (lambda out: (out / "tokenizer.json").unlink(), "tokenizer.json"),
        (lambda out: (out / "config.json").write_text("{}"), "config.json"),
        (lambda out: (out / "modeling_evil.py").write_text("import os"), "modeling_evil.py"),
        (lambda out: (out / "x").symlink_to("/"), "x"),
        (lambda out: ((out / "a").mkdir(), (out / "a/b.bin").write_text("")), "a/b.bin"),
        (lambda out: (out / "extra.safetensors").write_text(""), "extra.safetensors"),
    ],
)
def test_what_is_not_as_the_manifest_says_is_not_attested(out, tmp_path, damage, where):
    damage(out)
    done = nf4("attest", out, tmp_path / "a", "--json")
    assert done.returncode == 1
    assert [f["where"] for f in document(done.stdout, "attest")["findings"]] == [where]
    assert not (tmp_path / "a").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert "NOT good" in nf4("attest", out, tmp_path / "a").stdout


def test_damage_in_a_pipeline_is_found(pipeline, tmp_path):
    out = shutil.copytree(pipeline / "out", tmp_path / "out")
    manifest = out / "transformer" / MANIFEST
    manifest.write_text(manifest.read_text().replace("linear", "lincar", 1))
    done = nf4("attest", out, tmp_path / "a", "--json")
    assert done.returncode == 1
    places = [f["where"] for f in document(done.stdout, "attest")["findings"]]
    assert places == [f"transformer/{MANIFEST}"]


def test_an_edited_model_card_is_left_out(llama, tmp_path):
    source = shutil.copytree(llama, tmp_path / "source")
    (source / "README.md").write_text("card")
    nf4_ok("quantize", source, tmp_path / "out")
    (tmp_path / "out" / "README.md").write_text("a better card")  # no manifest lists it
    (tmp_path / "out" / ".cache").mkdir()
    (tmp_path / "out" / ".cache" / "etag").write_text("of a download")
    done = nf4("attest", tmp_path / "out", tmp_path / "a")
    assert done.returncode == 0
    assert "README" not in done.stderr
    names = set(subjects(statement(tmp_path / "a")))
    assert names == {"config.json", "model.safetensors", "tokenizer.json", MANIFEST}


def test_a_manifest_cannot_lead_out(out, tmp_path):
    (tmp_path / "secret").write_text("s")
    manifest = json.loads((out / MANIFEST).read_text())
    (out / "loop").symlink_to("loop")
    for name in ("../secret", "/etc/passwd", "a\0b", "loop"):
        manifest["output"]["files"][0]["name"] = name
        (out / MANIFEST).write_text(json.dumps(manifest))
        with pytest.raises(InputError, match="leads out of the directory"):
            attest(out)
    done = nf4("attest", out, tmp_path / "a")
    assert done.returncode == 3
    assert "leads out of the directory" in done.stderr
    (out / "loop").unlink()
    manifest["output"]["files"][0]["name"] = "x" * 5000
    (out / MANIFEST).write_text(json.dumps(manifest))
    done = nf4("attest", out, tmp_path / "a")
    assert done.returncode == 1
    assert "is missing" in done.stdout


def test_places_that_are_refused(out, llama, tmp_path):
    (tmp_path / "there").write_text("precious")
    refused(USAGE, "attest", out, tmp_path / "there", says=("exists",), cwd=tmp_path)
    refused(USAGE, "attest", out, out / "a", says=("lies in",), cwd=tmp_path)
    done = nf4("attest", out, "-", "--json", cwd=tmp_path)
    assert document(done.stdout, "error")["error"]["exit_code"] == USAGE
    refused(MACHINE, "attest", out, tmp_path / "no/a", says=("No such file",), cwd=tmp_path)
    done = nf4("attest", llama, tmp_path / "a")
    assert (done.returncode, MANIFEST in done.stderr) == (3, True)
    assert (tmp_path / "there").read_text() == "precious"


def test_the_default_place_of_this_directory(out):
    nf4_ok("attest", ".", cwd=out)
    assert (out.parent / "out.intoto.json").is_file()


def test_a_name_that_is_not_unicode_is_refused(llama, tmp_path):
    source = shutil.copytree(llama, tmp_path / "source")
    try:
        Path(os.fsdecode(os.fsencode(source) + b"/tokenizer_\xff.json")).write_text("{}")
    except OSError:
        pytest.skip("this file system takes Unicode names only")
    nf4_ok("quantize", source, tmp_path / "out")
    done = nf4("attest", tmp_path / "out", tmp_path / "a")
    assert done.returncode == 3
    assert "not Unicode" in done.stderr


# -- the tools that sign ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def keys(tmp_path_factory) -> tuple[Path, Path]:
    """(private, public): PEM files of a P-256 key."""
    from cryptography.hazmat.primitives import serialization as s
    from cryptography.hazmat.primitives.asymmetric import ec

    root = tmp_path_factory.mktemp("keys")
    key = ec.generate_private_key(ec.SECP256R1())
    pem = s.Encoding.PEM
    (root / "key.pem").write_bytes(key.private_bytes(pem, s.PrivateFormat.PKCS8, s.NoEncryption()))
    public = key.public_key().public_bytes(pem, s.PublicFormat.SubjectPublicKeyInfo)
    (root / "key.pub").write_bytes(public)
    return root / "key.pem", root / "key.pub"


def test_in_toto_reads_the_statement(out, tmp_path):
    import google.protobuf.json_format as pb_json
    from in_toto_attestation.v1.statement import Statement
    from in_toto_attestation.v1.statement_pb2 import Statement as Message

    nf4_ok("attest", out, tmp_path / "a")
    found = Statement.copy_from_pb(pb_json.Parse((tmp_path / "a").read_bytes(), Message()))
    found.validate()
    assert len(found.pb.subject) == len(all_files(out))
    assert found.pb.predicate["buildDefinition"]["buildType"] == BUILD_TYPE


def test_sigstore_reads_and_matches_the_statement(out, tmp_path):
    from sigstore.dsse import Statement
    from sigstore.hashes import HashAlgorithm, Hashed

    nf4_ok("attest", out, tmp_path / "a")
    found = Statement((tmp_path / "a").read_bytes())
    for digest in all_files(out).values():
        hashed = Hashed(algorithm=HashAlgorithm.SHA2_256, digest=bytes.fromhex(digest))
        assert found._matches_digest(hashed)


def test_a_signed_envelope_of_the_statement_verifies(out, tmp_path, keys):
    """DSSE as cosign makes it, by securesystemslib; a changed statement does not verify."""
    from cryptography.hazmat.primitives.serialization import load_pem_private_key
    from securesystemslib.dsse import Envelope
    from securesystemslib.exceptions import VerificationError
    from securesystemslib.signer import CryptoSigner

    nf4_ok("attest", out, tmp_path / "a")
    data = (tmp_path / "a").read_bytes()
    signer = CryptoSigner(load_pem_private_key(keys[0].read_bytes(), None))
    envelope = Envelope(data, "application/vnd.in-toto+json", {})
    envelope.sign(signer)
    again = Envelope.from_dict(json.loads(json.dumps(envelope.to_dict())))
    assert again.verify([signer.public_key], 1)
    again.payload = data.replace(b'"nf4"', b'"fp4"', 1)
    assert again.payload != data
    with pytest.raises(VerificationError):
        again.verify([signer.public_key], 1)


def test_model_signing_signs_the_directory(out, tmp_path, keys):
    """OpenSSF model signing makes a statement of its own; our files are no hindrance."""
    tool = Path(sys.executable).with_name("model_signing")
    nf4_ok("attest", out)

    def run(*arguments: object) -> int:
        command = [tool, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, check=False).returncode

    signature = tmp_path / "out.sig"
    assert run("sign", "key", out, "--private_key", keys[0], "--signature", signature) == 0
    check = ("verify", "key", out, "--public_key", keys[1], "--signature", signature)
    assert run(*check) == 0
    nf4_ok("verify", out)
    flip(out / "model.safetensors")
    assert run(*check) == 1
