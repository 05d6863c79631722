"""Part 4 of scripts/gpu_day: what bitsandbytes' own CUDA kernels make of our outputs.

Every decoded weight is compared with what `nf4 dequantize` writes; its quantizer's codes that
differ from ours are counted; transformers loads each output, which is then trained with LoRA.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from report import Part, main
from running import Shape, fresh, llama, nf4

SHAPE, TINY = Shape(2048, 5632, 4, 4096, False), Shape(128, 256, 2, 256, False)
OUTPUTS = {
    "nested": (),
    "plain": ("--no-double-quant",),
    "fp4": ("--quant-type", "fp4"),
    "searched": ("--scale", "search"),
    "searched, plain": ("--scale", "search", "--no-double-quant"),
}
"""The last two have scales of both signs."""
LINEAR = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]


def decoded_alike(part: Part, model: Any, back: Path) -> str:
    """Return how many of a loaded model's weights bitsandbytes decodes to another value than nf4.

    Zeros of either sign are one value: bitsandbytes' CUDA kernel gives FP4's code 8 a sign that
    its default implementation, which nf4 follows, does not.
    """
    import torch
    from bitsandbytes.functional import dequantize_4bit
    from safetensors import safe_open

    weights, elements, different, signs = 0, 0, 0, 0
    with safe_open(back / "model.safetensors", "pt") as file:
        for name, module in model.named_modules():
            state = getattr(getattr(module, "weight", None), "quant_state", None)
            if state is None:
                continue
            theirs = dequantize_4bit(module.weight.data, state).to(torch.bfloat16).cpu()
            ours = file.get_tensor(f"{name}.weight").to(torch.bfloat16)
            weights, elements = weights + 1, elements + ours.numel()
            unequal = theirs != ours
            different += int(unequal.sum())
            signs += int(((theirs.signbit() != ours.signbit()) & ~unequal).sum())
    if different or not weights:
        part.report.failed("decoded weights", f"{different:,} of {elements:,} differ ({weights})")
    zeros = f"; {signs:,} zeros have another sign" if signs else ""
    return f"{different:,} of {elements:,} elements of {weights} weights differ{zeros}"


def lora_step(model: Any, vocabulary: int) -> str:
    """Return the losses before and after some steps of training LoRA on a 4-bit model."""
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    model = get_peft_model(model, LoraConfig(r=8, target_modules=LINEAR))
    model.train()
    device = next(model.parameters()).device
    tokens = torch.arange(64, device=device).remainder(vocabulary).reshape(2, 32)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(8):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    if not losses[-1] < losses[0]:
        raise AssertionError(f"the loss did not fall: {losses}")
    return f"loss {losses[0]:.4f} to {losses[-1]:.4f} in {len(losses)} steps"


def differing_codes(part: Part, source: Path, output: Path) -> str:
    """Return how many codes bitsandbytes' quantizer chooses otherwise than we did."""
    import torch
    from bitsandbytes.functional import quantize_4bit
    from safetensors import safe_open

    codes, scales, total, blocks = 0, 0, 0, 0
    with (
        safe_open(source / "model.safetensors", "pt") as there,
        safe_open(output / "model.safetensors", "pt") as here,
    ):
        names = set(here.keys())
        for name in there.keys():  # noqa: SIM118 - no mapping
            if f"{name}.absmax" not in names:
                continue
            weight = there.get_tensor(name).to(part.device)
            theirs, state = quantize_4bit(weight, blocksize=64, quant_type="nf4")
            a, b = theirs.reshape(-1).cpu(), here.get_tensor(name).reshape(-1)
            codes += int(((a >> 4) != (b >> 4)).sum()) + int(((a & 15) != (b & 15)).sum())
            absmax = here.get_tensor(f"{name}.absmax")
            scales += int((state.absmax.cpu() != absmax).sum())
            total, blocks = total + weight.numel(), blocks + absmax.numel()
    torch.cuda.empty_cache()
    return f"{codes:,} of {total:,} codes and {scales:,} of {blocks:,} scales differ"


def one_output(part: Part, source: Path, name: str, options: tuple[str, ...]) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    output = fresh(part.work / name.replace(", ", "-"))
    nf4(part, "quantize", source, output, "--engine", "cuda", *options)
    nf4(part, "verify", output, "--source", source, "--engine", "cuda")
    back = fresh(output.with_name(output.name + "-back"))
    nf4(part, "dequantize", output, back, "--engine", "cuda")
    model = AutoModelForCausalLM.from_pretrained(
        output, device_map={"": part.device if part.dry else 0}, dtype=torch.bfloat16
    )
    for module in model.modules():
        if part.dry and hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # its kernel there has no backward pass
    where = f"bitsandbytes on {part.device}, {name}"
    part.report.row(f"{where}: decoded weights", decoded_alike(part, model, back))
    tokens = torch.arange(16, device=model.device).unsqueeze(0)
    made = model.generate(tokens, max_new_tokens=4, do_sample=False, pad_token_id=0)
    if made.shape[1] <= tokens.shape[1]:
        raise AssertionError("nothing was generated")
    vocabulary = json.loads((output / "config.json").read_text())["vocab_size"]
    part.report.row(f"{where}: LoRA after from_pretrained", lora_step(model, vocabulary))


def run(part: Part) -> None:
    import bitsandbytes
    import torch
    import transformers

    part.report.figures({
        "bitsandbytes": bitsandbytes.__version__, "torch": torch.__version__,
        "transformers": transformers.__version__,
    })  # fmt: skip
    source = llama(part.work / "model", TINY if part.dry else SHAPE)
    for name, options in OUTPUTS.items():
        if part.dry and name not in ("plain", "searched"):
            continue
        with part.report.step(f"bitsandbytes: {name}"):
            one_output(part, source, name, options)
    with part.report.step("bitsandbytes' quantizer"):
        found = differing_codes(part, source, part.work / "plain")
        part.report.row(f"bitsandbytes' quantizer on {part.device}, random weights", found)


if __name__ == "__main__":
    main(run)
