"""QLoRA on outputs as docs/qlora.md shows it: trained with PEFT, merged by nf4, loaded again."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import text_models
import torch
import transformers
from helpers import nf4_ok

pytestmark = pytest.mark.loaders

PAGE = (Path(__file__).parents[2] / "docs" / "qlora.md").read_text()
NAME = "SmolLM2-135M"
LEAST = 0.5
"""What the loss of an epoch falls by; it would not fall at all if nothing were trained."""
torch.set_num_threads(1)


def block(number: int) -> str:
    """Return a Python block of the page; tiny models with little text need a higher rate."""
    code = re.findall(r"^```python\n(.*?)^```$", PAGE, re.M | re.S)[number]
    assert "lr=2e-4" in code
    assert ".split(512, 1)" in code
    return code.replace("lr=2e-4", "lr=1e-2").replace(".split(512, 1)", ".split(64, 1)")


def losses_of(*command: str, place: Path) -> list[float]:
    """Run a training in `place`; return the mean loss of each epoch that it prints."""
    done = subprocess.run(
        [sys.executable, *command], cwd=place, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = [float(loss) for loss in re.findall(r"^epoch \d: loss ([\d.]+)$", done.stdout, re.M)]
    assert len(found) == 3, done.stdout
    return found


def logits_of(model: Any) -> torch.Tensor:
    ids = torch.arange(5, 29).reshape(2, 12)
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the base, both of its outputs and the text, under the page's names."""
    place = tmp_path_factory.mktemp("training")
    text_models.make("llama", place / NAME, torch.bfloat16)
    (place / "mine.txt").write_text(text_models.text(500))
    nf4_ok("quantize", place / NAME, place / f"{NAME}-nf4")
    nf4_ok("quantize", place / NAME, place / f"{NAME}-nf4-bf16", "--quant-storage", "bfloat16")
    return place


def check_merges(place: Path, base: Path, adapter: Path) -> None:
    """Merge an adapter by both commands and compare with the model that has the adapter on."""
    auto, full = transformers.AutoModelForCausalLM, ("--dtype", "float32")
    decoded, merged = place / "decoded", place / "merged"
    nf4_ok("dequantize", base, decoded, *full)
    nf4_ok("dequantize", base, merged, "--adapter", adapter, *full)
    plain = auto.from_pretrained(decoded, dtype=torch.float32)
    before = logits_of(plain)
    trained = logits_of(peft.PeftModel.from_pretrained(plain, adapter))
    ours, info = auto.from_pretrained(merged, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    moved = (trained - before).abs().max()
    assert moved > 0.5, "the adapter does something"
    torch.testing.assert_close(logits_of(ours), trained, rtol=1e-3, atol=1e-3)
    again, source = place / "merged-nf4", place.parent / NAME
    nf4_ok("quantize", source, again, "--adapter", adapter)
    nf4_ok("verify", again, "--source", source, "--adapter", adapter)
    loaded, info = auto.from_pretrained(again, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    apart = (logits_of(loaded).float() - trained).norm()
    assert apart < 0.7 * (trained - before).norm(), "what was learned is in the 4-bit model"


@pytest.mark.parametrize("storage", ["uint8", "bfloat16"])
def test_the_page_trains_and_its_adapter_merges(made, storage):
    place = made / storage
    place.mkdir()
    base = made / (f"{NAME}-nf4" if storage == "uint8" else f"{NAME}-nf4-bf16")
    (place / f"{NAME}-nf4").symlink_to(base)
    (place / "mine.txt").symlink_to(made / "mine.txt")
    (place / "train.py").write_text(block(0))
    losses = losses_of("train.py", place=place)
    assert losses[-1] < losses[0] - LEAST
    check_merges(place, base, place / "adapter")


@pytest.mark.parametrize("storage", ["uint8", "bfloat16"])
def test_two_processes_train_with_fsdp(made, storage):
    place = made / f"fsdp-{storage}"
    place.mkdir()
    base = made / (f"{NAME}-nf4" if storage == "uint8" else f"{NAME}-nf4-bf16")
    (place / f"{NAME}-nf4-bf16").symlink_to(base)
    (place / "mine.txt").symlink_to(made / "mine.txt")
    (place / "train_fsdp.py").write_text(block(1))
    losses = losses_of(
        "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train_fsdp.py",
        place=place,
    )  # fmt: skip
    assert losses[-1] < losses[0] - LEAST
    check_merges(place, base, place / "adapter")
