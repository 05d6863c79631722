"""Has transformers and bitsandbytes write 4-bit checkpoints, in either version of transformers.

python foreign_worker.py SOURCE DIRECTORY
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

SETTINGS = {
    "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 2,
    "num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 1000,
}  # fmt: skip
WAYS = {"nested": (True, "10GB"), "plain": (False, "10GB"), "sharded": (True, "2MB")}
"""Name -> (double quantization, size of shards)."""


def make_source(source: Path) -> None:
    """A random Llama: large enough that some of its 65,536 scales meet a bin's edge."""
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SETTINGS)).bfloat16().save_pretrained(source)


def write(source: Path, root: Path) -> None:
    """Every one of WAYS, as `root`/name."""
    for name, (nested, size) in WAYS.items():
        how = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=nested,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )  # fmt: skip
        model = AutoModelForCausalLM.from_pretrained(
            source, quantization_config=how, dtype=torch.bfloat16
        )
        model.save_pretrained(root / name, max_shard_size=size)


if __name__ == "__main__":
    write(Path(sys.argv[1]), Path(sys.argv[2]))
