"""Families that follow the rules, and those that transformers is asked about."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import LLAMA, llama_tensors, nf4_ok, same_files, write_checkpoint_dir

from nf4cli.checkpoint.discovery import open_checkpoint
from nf4cli.errors import InputError, MachineError
from nf4cli.planning import families, transformers_answer


def opened(root: Path, **config: object):
    return open_checkpoint(write_checkpoint_dir(root, llama_tensors(), {**LLAMA, **config}))


def test_a_family_that_follows_is_not_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(transformers_answer, "ask_transformers", lambda *a: pytest.fail("asked"))
    assert families.consult(opened(tmp_path)) is None


@pytest.mark.parametrize(
    ("family", "says"),
    [
        ("llama9", "none of the families"),
        ("shieldgemma2", "known not to follow"),
        ("dinat", "none of"),
    ],
)
def test_another_family_needs_transformers(tmp_path, monkeypatch, family, says):
    monkeypatch.setattr(transformers_answer, "available", lambda: False)
    with pytest.raises(InputError, match=rf"(?s){says}.*pip install 'nf4cli\[exact\]'"):
        families.consult(opened(tmp_path, model_type=family))


def test_a_part_of_another_family_is_asked_about(tmp_path, monkeypatch):
    monkeypatch.setattr(transformers_answer, "available", lambda: False)
    config = {"model_type": "llava", "text_config": {"model_type": "shieldgemma2"}}
    with pytest.raises(InputError, match="pip install"):
        families.consult(opened(tmp_path, **config))


def test_exact_needs_transformers(tmp_path, monkeypatch):
    monkeypatch.setattr(transformers_answer, "available", lambda: False)
    with pytest.raises(MachineError, match=r"nf4cli\[exact\]"):
        families.consult(opened(tmp_path), always=True)


def test_exact_agrees_with_the_rules_and_is_recorded(work):
    nf4_ok("quantize", "model", "rules", cwd=work)
    said = nf4_ok("quantize", "model", "exact", "--exact", cwd=work)
    assert "transformers 5.23.0 was asked" in said
    assert same_files(work / "rules", work / "exact", but=("nf4_manifest.json", "README.md"))
    manifest = json.loads((work / "exact" / "nf4_manifest.json").read_text())
    assert manifest["recipe"]["asked"] == "transformers 5.23.0"


@pytest.mark.parametrize("keep", [(), ("--keep", "mlp"), ("--keep", "layers.0")])
def test_the_proof_of_an_answer_needs_no_transformers(work, keep):
    nf4_ok("quantize", "model", "exact", "--exact", "-q", *keep, cwd=work)
    code = (
        "import sys\n"
        "sys.modules['transformers'] = sys.modules['torch'] = None\n"
        "sys.argv = ['nf4', 'verify', 'exact', '--source', 'model']\n"
        "from nf4cli.cli import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", code], cwd=work, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "exact is good" in done.stdout


@pytest.mark.loaders
def test_what_transformers_answers_loads(tmp_path):
    """NomicBert: transformers 5 splits its fused Wqkv, which a packed weight cannot go through."""
    import bitsandbytes as bnb
    import torch
    import transformers

    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.manual_seed(0)
    config = transformers.NomicBertConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        vocab_size=512,
    )  # fmt: skip
    model = transformers.NomicBertForMaskedLM(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "src")
    options = ("--exact", "--plan", "--json")
    plan = json.loads(nf4_ok("quantize", tmp_path / "src", tmp_path / "x", *options))
    rules = {t["name"]: t["rule"] for t in plan["tensors"]}
    fused = [rule for name, rule in rules.items() if "Wqkv" in name]
    assert fused
    assert set(fused) == {"changed-on-load"}
    nf4_ok("quantize", tmp_path / "src", tmp_path / "out", "--exact")
    nf4_ok("verify", tmp_path / "out", "--source", tmp_path / "src")
    loaded, info = type(model).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[f"{key}_keys"] for key in ("missing", "unexpected", "mismatched"))
    packed = [m for m in loaded.modules() if isinstance(m, bnb.nn.Linear4bit)]
    assert len(packed) == list(rules.values()).count("linear") > 0
    for module in packed:
        assert module.weight.quant_state is not None
        module.support_avx512bf16_for_cpu = False
    with torch.no_grad():
        assert loaded(input_ids=torch.arange(5, 13)[None]).logits.isfinite().all()


def test_every_surveyed_version_and_family_is_named():
    survey = families.survey()
    assert survey["transformers"] == ["4.57.6", "5.23.0"]
    assert len(survey["follow"]) > 700
    assert not set(survey["follow"]) & {*survey["differ"], *survey["not_built"]}
    facts = json.loads(
        (Path(__file__).parent.parent / "goldens" / "architectures.json").read_text()
    )
    assert {f["config"]["model_type"] for f in facts.values()} <= set(survey["follow"])
