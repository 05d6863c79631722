"""What bitsandbytes and transformers make of signed scales, in the environment it runs in.

    signed_worker.py FOLDER NAME...

FOLDER has a 4-bit Llama of each NAME, and, as NAME-decoded, the same by nf4 dequantize. Prints a
JSON object of what was found by name.
"""

from __future__ import annotations

import copy
import json
import os
import sys
import warnings
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
warnings.filterwarnings("ignore")

import bitsandbytes as bnb  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
IDS = torch.arange(5, 29).reshape(2, 12)


def linears(model: Any) -> dict[str, Any]:
    return {n: m for n, m in model.named_modules() if isinstance(m, bnb.nn.Linear4bit)}


def logits(model: Any) -> torch.Tensor:
    for module in linears(model).values():
        module.support_avx512bf16_for_cpu = False  # that path is looked at on its own
    with torch.no_grad():
        return model(IDS).logits.float()


def decode(module: Any) -> torch.Tensor:
    return bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)


def repacked(module: Any) -> tuple[float, float]:
    """How far the layout for AVX-512 moves a weight, and the way back from it, in units of its own
    size."""
    functional = bnb.functional
    before = decode(module).float()
    state = copy.deepcopy(module.weight.quant_state)
    packed, state = functional._convert_weight_packed_for_cpu(module.weight.data.clone(), state)
    scales = state.absmax.T.reshape(-1).float()  # bfloat16, [blocks of a row, rows]
    nested, table = state.original_nested, state.code
    back, state = functional._convert_weight_packed_for_cpu_inverse(packed, state)
    codes = back.view(torch.uint8).reshape(-1)
    values = table[torch.stack([codes >> 4, codes & 15], 1).reshape(-1).long()]
    there = (values * scales.repeat_interleave(state.blocksize)).reshape(before.shape)
    # Without double quantization the way back leaves the scales in the other order (0.50.2).
    after = functional.dequantize_4bit(back, state).float() if nested else there
    return tuple(float((x - before).norm() / before.norm()) for x in (there, after))


def look(output: str, decoded: str) -> dict[str, Any]:
    """Return how a 4-bit model differs from the decoded one, and what its scales are."""
    auto = transformers.AutoModelForCausalLM
    model, info = auto.from_pretrained(output, dtype="auto", output_loading_info=True)
    plain = auto.from_pretrained(decoded, dtype="auto")
    modules = linears(model)
    expected = dict(plain.named_modules())
    scales = [m.weight.quant_state for m in modules.values()]
    found = {
        "missing": sorted(info["missing_keys"]),
        "negative": min(
            float((bnb.functional.dequantize_blockwise(s.absmax, s.state2) + s.offset).min()
                  if s.nested else s.absmax.min())
            for s in scales
        ),
        "equal": all(torch.equal(decode(m), expected[n].weight) for n, m in modules.items()),
        "forward": float((logits(model) - logits(plain)).abs().max()),
        "modules": len(modules),
    }  # fmt: skip
    moved = [repacked(m) for m in linears(auto.from_pretrained(output, dtype="auto")).values()]
    found["layout"], found["back"] = (max(one) for one in zip(*moved, strict=True))
    return found


def main(folder: str, *names: str) -> None:
    found = {name: look(f"{folder}/{name}", f"{folder}/{name}-decoded") for name in names}
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
