"""Loads outputs with unsloth's own code for experts in 4 bit, and compares them with decoded ones.

A program, not a test: test_unsloth.py runs it in an environment with unsloth_zoo and the version of
transformers that it asks for. The package wants a GPU when it is imported. What loads and runs
experts does not: its modules are imported without the package's own __init__.

    unsloth_worker.py JOBS

JOBS is JSON: name -> [output, decoded]. Prints JSON: name -> what was found.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import types
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ |= {"UNSLOTH_IS_PRESENT": "1", "HF_HUB_OFFLINE": "1"}

import torch
import transformers
from bitsandbytes.functional import dequantize_blockwise
from bitsandbytes.nn import Linear4bit

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
IDS = torch.tensor([[1] + [(i * 37 + 11) % 500 + 3 for i in range(15)]])


def import_patches() -> Any:
    """Apply unsloth's patches for experts in 4 bit, and return its module for gpt-oss."""
    spec = find_spec("unsloth_zoo")
    assert spec is not None
    (place,) = spec.submodule_search_locations or ()
    for name in ("unsloth_zoo", "unsloth_zoo.temporary_patches"):
        module = types.ModuleType(name)
        module.__path__ = [str(Path(place).parent.joinpath(*name.split(".")))]
        sys.modules[name] = module
    sys.modules["unsloth_zoo"].temporary_patches = sys.modules["unsloth_zoo.temporary_patches"]
    importlib.import_module("unsloth_zoo.temporary_patches.moe_utils_bnb4bit")
    from unsloth_zoo.temporary_patches.common import TEMPORARY_PATCHES

    for patch in list(TEMPORARY_PATCHES):
        patch()
    return importlib.import_module("unsloth_zoo.temporary_patches.gpt_oss")


def decoded(parameter: Any) -> torch.Tensor:
    """What a packed parameter stands for, by plain arithmetic in float32."""
    state = parameter.quant_state
    absmax = state.absmax
    if state.nested:
        absmax = dequantize_blockwise(state.absmax, state.state2) + state.offset
    codes = parameter.data.flatten()
    index = torch.stack([codes >> 4, codes & 15], 1).flatten().long()
    values = state.code[index].view(-1, state.blocksize) * absmax.view(-1, 1)
    return values.reshape(state.shape).to(state.dtype)


def expected(parameters: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """The weight of the decoded model that a parameter holds; of unsloth's lists for gpt-oss, the
    expert's part."""
    for kind in ("gate_up", "down"):
        path, found, rest = name.partition(f".{kind}_projs.")
        if found:
            expert, _, leaf = rest.partition(".")
            fused = f"{path}.{kind}_proj" + ("_bias" if leaf == "bias" else "")
            part = parameters[fused][int(expert)]
            return part.T if leaf == "weight" else part
    return parameters[name.replace(".router.linear.", ".router.")]


def compare(model: Any, plain: Any) -> dict[str, Any]:
    parameters = dict(plain.named_parameters())
    packed, stacks, largest = 0, 0, 0.0
    for name, parameter in model.named_parameters():
        value = parameter
        if getattr(parameter, "quant_state", None) is not None:
            packed += 1
            stacks += len(parameter.quant_state.shape) == 3
            value = decoded(parameter)
        other = expected(parameters, name)
        assert value.shape == other.shape, name
        largest = max(largest, (value.float() - other.float()).abs().max().item())
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False  # that path repacks the weights, lossily
    with torch.no_grad():
        ours, theirs = (m(IDS).logits.float().log_softmax(-1) for m in (model, plain))
    return {
        "packed": packed, "stacks": stacks, "largest": largest,
        "logprobs": (ours - theirs).abs().max().item(),
    }  # fmt: skip


def main(jobs: dict[str, list[str]]) -> dict[str, Any]:
    auto = transformers.AutoModelForCausalLM
    plain = {n: auto.from_pretrained(d, dtype=torch.bfloat16) for n, (_, d) in jobs.items()}
    gpt_oss = import_patches()
    found: dict[str, Any] = {}
    for name, (output, _) in jobs.items():
        if plain[name].config.model_type == "gpt_oss":
            gpt_oss.patch_gpt_oss_bnb4bit()
        model, info = auto.from_pretrained(output, device_map="cpu", output_loading_info=True)
        keys = {f"{kind}_keys" for kind in ("missing", "unexpected", "mismatched")}
        wrong = [str(key) for kind in keys for key in info[kind]]
        found[name] = {"wrong": wrong, **compare(model, plain[name])}
    return found


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
