"""verify notices what the class of models that config.json names would not load.

The outputs are damaged without their manifest, as a tool that renames tensors leaves them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import nf4, read_all, write_checkpoint_dir
from safetensors.torch import save_file

from nf4cli.checkpoint.discovery import MANIFEST


@pytest.fixture
def bare(llama_nf4: Path, tmp_path: Path) -> Path:
    """A good output without its manifest."""
    root = Path(shutil.copytree(llama_nf4, tmp_path / "bare"))
    (root / MANIFEST).unlink()
    return root


def verified(root: Path) -> tuple[list[str], list[str]]:
    """Return the messages of the findings of the level "config", and what was not checked."""
    report = json.loads(nf4("verify", root, "--json").stdout)
    assert {finding["level"] for finding in report["findings"]} <= {"config"}
    return [finding["message"] for finding in report["findings"]], report["unchecked"]


def rename(root: Path, new_name: Callable[[str], str]) -> None:
    tensors = {new_name(name): tensor for name, tensor in read_all(root).items()}
    save_file(tensors, root / "model.safetensors", {"format": "pt"})


def edit_config(root: Path, **fields: object) -> dict:
    config = json.loads((root / "config.json").read_text()) | fields
    (root / "config.json").write_text(json.dumps(config))
    return config


def test_a_good_output_is_good_without_its_manifest(bare):
    assert verified(bare)[0] == []


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "base_model.model."])
def test_names_of_a_wrapper_are_found(bare, prefix):
    rename(bare, lambda name: prefix + name)
    found, _ = verified(bare)
    (message,) = [text for text in found if "what a wrapper around the model" in text]
    assert message.startswith(prefix)


def test_names_of_another_layout_are_found(bare):
    theirs = {"q_proj": "wq", "k_proj": "wk", "v_proj": "wv", "o_proj": "wo", "gate_proj": "w1"}
    theirs |= {"up_proj": "w3", "down_proj": "w2"}

    def new_name(name: str) -> str:
        return ".".join(theirs.get(part, part) for part in name.split("."))

    rename(bare, new_name)
    found, _ = verified(bare)
    assert any("whose linear layers are called down_proj" in message for message in found)


def test_the_config_of_another_family_is_found(bare):
    edit_config(bare, model_type="bert")
    found, _ = verified(bare)
    assert any("config.json says model_type 'bert'" in message for message in found)


def test_an_adapter_inside_is_found(bare):
    tensors = read_all(bare)
    module = "model.layers.0.mlp.up_proj"
    tensors[f"{module}.lora_A.default.weight"] = torch.ones(4, 64)
    tensors[f"{module}.lora_B.default.weight"] = torch.ones(128, 4)
    save_file(tensors, bare / "model.safetensors", {"format": "pt"})
    assert any("an adapter that is not merged" in message for message in verified(bare)[0])


def test_a_tied_layer_that_no_entry_means_is_found(tmp_path):
    tensors = {
        "electra.embeddings.word_embeddings.weight": torch.zeros(512, 64),
        "electra.encoder.layer.0.output.dense.weight": torch.ones(64, 64),
    }
    config = {"model_type": "electra", "vocab_size": 512, "architectures": ["ElectraForMaskedLM"]}
    source = write_checkpoint_dir(tmp_path / "src", tensors, config)
    out = tmp_path / "out"
    assert nf4("quantize", source, out, "-q").returncode == 0
    (out / MANIFEST).unlink()
    assert verified(out)[0] == []
    settings = json.loads((out / "config.json").read_text())["quantization_config"]
    settings["llm_int8_skip_modules"].remove("generator_lm_head")
    edit_config(out, quantization_config=settings)
    (message,) = verified(out)[0]
    assert message.startswith("generator_lm_head has no weight of its own")


def test_a_family_that_nobody_recorded_is_said_to_be_unchecked(bare):
    assert not any("whether the model's class" in sentence for sentence in verified(bare)[1])
    edit_config(bare, model_type="llama_of_tomorrow", auto_map={"AutoModel": "code.Own"})
    found, unchecked = verified(bare)
    assert found == []
    assert any("nf4 knows none of model_type 'llama_of_tomorrow'" in text for text in unchecked)
