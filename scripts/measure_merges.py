#!/usr/bin/env python
"""Measure which way back from a trained QLoRA adapter to one model loses least.

    .venv/bin/python scripts/measure_merges.py MODEL --work /some/disk [--seeds 3] [--steps 120]

Quantizes MODEL (a directory; bf16), trains LoRA on the output with PEFT on the first three quarters
of a text, and merges each adapter into the base, into the decoded 4-bit base, and as PEFT does it
inside the 4-bit layers. What is merged is quantized again. Each model is then compared with the
4-bit base that has the adapter on, which is what was trained: the loss on the text's last quarter
and on another text, at the same positions, and the KL divergence.  Prints tables for docs/qlora.md.

Everything computes in float32; weights have the dtypes of their files. An adapter that is in --work
already is not trained again. SmolLM2-135M takes 10 minutes a seed on two cores.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bitsandbytes
import numpy as np
import peft
import torch
import transformers
from bitsandbytes.functional import dequantize_4bit

from nf4cli.quality.evaluation import statistics
from nf4cli.quality.evaluation.statistics import Figure, blocks_of, figures
from nf4cli.quality.texts import read_documents

TEXTS = Path(statistics.__file__).parent / "texts"
LENGTH = 512
"""Tokens of a window, in training and in evaluation."""
RANK, ALPHA, RATE = 16, 32, 2e-4
"""The adapter's rank and lora_alpha, and AdamW's learning rate."""
TRAINED_SHARE = 0.75
"""Of the text that is trained on; the rest is held out."""
AGAIN = {
    "absmax": (),
    "search": ("--scale", "search"),
    "gptq": ("--calibration", "{text}", "--method", "gptq", "--calibration-tokens", "16384"),
}
"""How merged models are quantized again: options of `nf4 quantize`, by name."""
Windows = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Row:
    """A model to compare with what was trained.

    Attributes:
        title: what it is.
        path: a directory, 4-bit or not.
    """

    title: str
    path: Path


def nf4(*words: str | Path) -> None:
    """Run the command; raises CalledProcessError with its messages on the terminal."""
    command = [sys.executable, "-P", "-m", "nf4cli", *map(str, words), "--quiet"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def made(path: Path, make: Callable[[Path], object]) -> Path:
    """Return a directory that `make` writes where it is not there yet, under another name first.

    So what a stopped run left half written is not taken for finished.
    """
    if not path.exists():
        part = path.with_name(f"{path.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        make(part)
        part.rename(path)
    return path


def windows_of(documents: list[str], tokenizer: Any) -> torch.Tensor:
    """Return all whole windows of the documents: int64 [windows, LENGTH]."""
    tokens = [t for text in documents for t in tokenizer(text, verbose=False)["input_ids"]]
    count = len(tokens) // LENGTH
    return torch.tensor(tokens[: count * LENGTH]).reshape(count, LENGTH)


def split(name: str, work: Path) -> tuple[Path, Path]:
    """Write the two parts of a shipped text as files; return the trained and the held-out one."""
    (text,) = read_documents([TEXTS / f"{name}.txt"])
    end = text.index("\n", int(len(text) * TRAINED_SHARE))
    parts = {"trained": text[:end], "held-out": text[end:]}
    for part, content in parts.items():
        (work / f"{name}-{part}.txt").write_text(content, encoding="utf-8")
    return work / f"{name}-trained.txt", work / f"{name}-held-out.txt"


def train(base: Path, adapter: Path, windows: torch.Tensor, seed: int, steps: int) -> None:
    """Train LoRA on a 4-bit model, one window a step, and save the adapter.

    Args:
        windows: int64 [windows, LENGTH]; their order is drawn anew each time all were used.
    """
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    config = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(model, config)
    model.train()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=RATE)
    order: list[int] = []
    for step in range(steps):
        order = order or torch.randperm(len(windows)).tolist()
        window = windows[order.pop()][None]
        loss = model(input_ids=window, labels=window).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0 or step == steps - 1:
            print(f"seed {seed}, step {step}: loss {loss.item():.3f}", file=sys.stderr, flush=True)
    model.save_pretrained(adapter)


def merge_in_four_bits(base: Path, adapter: Path, decoded: Path, output: Path) -> None:
    """Merge as PEFT does it in bitsandbytes' 4-bit layers, which it rounds again.

    transformers 5.23 cannot save such a model (NotImplementedError), so each layer is decoded.

    Args:
        decoded: the 4-bit model's weights as an ordinary model.
    """
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    model = peft.PeftModel.from_pretrained(model, adapter).merge_and_unload()
    plain = transformers.AutoModelForCausalLM.from_pretrained(decoded, dtype=torch.float32)
    layers = dict(plain.named_modules())
    for name, module in model.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            weight = dequantize_4bit(module.weight.data, module.weight.quant_state)
            layers[name].weight.data.copy_(weight)
    plain.save_pretrained(output)


def merge(base: Path, adapter: Path, output: Path) -> None:
    """Merge an adapter in float32 and save the model in bf16."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(model, adapter).merge_and_unload()
    model.to(torch.bfloat16).save_pretrained(output)
    transformers.AutoTokenizer.from_pretrained(base).save_pretrained(output)


@contextmanager
def opened(path: Path, work: Path, adapter: Path | None = None) -> Iterator[Any]:
    """Yield a model in float32, decoded by nf4 where it is 4-bit, with an adapter on it."""
    config = json.loads((path / "config.json").read_text())
    if "quantization_config" in config:
        decoded = work / "decoded" / path.relative_to(work)
        path = made(decoded, lambda out: nf4("dequantize", path, out, "--dtype", "float32"))
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    if adapter is not None:
        model = peft.PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        yield model.eval()


def log_probabilities(model: Any, window: torch.Tensor) -> torch.Tensor:
    """Return float32 [LENGTH - 1, vocabulary], of the tokens after each of a window's."""
    logits = model(input_ids=window[None], use_cache=False).logits[0, :-1]
    return logits.float().log_softmax(-1)


def reference_of(model: Any, texts: Windows) -> dict[str, list[torch.Tensor]]:
    """Return the log-probabilities of each window of each text, float16 [windows][LENGTH - 1, v]"""
    return {
        name: [log_probabilities(model, w).half() for w in windows]
        for name, windows in texts.items()
    }


def columns_of(
    model: Any, texts: Windows, reference: dict[str, list[torch.Tensor]]
) -> dict[str, dict[str, np.ndarray]]:
    """Return for each text the loss of each position and its KL divergence from the reference.

    Returns:
        float64 [positions] for "loss" and "kl", in nats; {} for "kl" without a reference.
    """
    columns = {}
    for name, windows in texts.items():
        loss, kl = [], []
        for window, known in zip(windows, reference[name], strict=True):
            output = log_probabilities(model, window)
            trained = known.float().log_softmax(-1)
            loss.append(-output.gather(1, window[1:, None])[:, 0])
            kl.append((trained.exp() * (trained - output)).sum(-1).clamp(min=0))
        columns[name] = {
            "loss": torch.cat(loss).double().numpy(), "kl": torch.cat(kl).double().numpy()
        }  # fmt: skip
    return columns


def rows_of(source: Path, base: Path, adapter: Path, text: Path, work: Path) -> list[Row]:
    """Make every model that an adapter leads to, where it is not there yet.

    nf4 merges, but for the merge into the base that stays in bf16: there PEFT does.

    Args:
        text: to calibrate on.
    """
    place = work / adapter.name
    decoded = made(work / "base-decoded", lambda out: nf4("dequantize", base, out))
    rows = [Row("the base, not trained", source), Row("the 4-bit base, not trained", base)]
    direct = made(place / "peft-4bit", lambda out: merge_in_four_bits(base, adapter, decoded, out))
    rows.append(Row("PEFT's merge inside the 4-bit layers", direct))
    merges = {
        "the base": made(place / "into-base", lambda out: merge(source, adapter, out)),
        "the decoded 4-bit base": made(
            place / "into-decoded", lambda out: nf4("dequantize", base, out, "--adapter", adapter)
        ),
    }
    for into, merged in merges.items():
        rows.append(Row(f"merged into {into}, bf16", merged))
        for again, options in AGAIN.items():
            words = [option.format(text=text) for option in options]
            one_pass = into == "the base" and again != "gptq"
            start = (source, "--adapter", adapter) if one_pass else (merged,)
            out = made(
                place / f"{merged.name}-{again}",
                lambda out, words=words, start=start: nf4(
                    "quantize", start[0], out, *start[1:], *words
                ),
            )
            rows.append(Row(f"merged into {into}, quantized again: {again}", out))
    return rows


def measure(args: argparse.Namespace, tokenizer: Any) -> list[list[tuple[str, dict[str, Any]]]]:
    """Return for each seed each row's title and columns; the first row is what was trained."""
    work: Path = args.work
    trained_on, held_out = split(args.text, work)
    (other,) = (p for p in sorted(TEXTS.glob("*.txt")) if p.stem not in (args.text, "NOTICE"))
    texts = {
        "held-out": windows_of(read_documents([held_out]), tokenizer),
        other.stem: windows_of(read_documents([other]), tokenizer)[:: args.stride],
    }
    base = made(
        work / "base-nf4",
        lambda out: nf4("quantize", args.model, out, "--compute-dtype", "float32"),
    )
    windows = windows_of(read_documents([trained_on]), tokenizer)
    results = []
    for seed in range(args.seeds):
        adapter = made(
            work / f"adapter-{args.text}-{args.steps}-{seed}",
            lambda out, seed=seed: train(base, out, windows, seed, args.steps),
        )
        with opened(base, work, adapter) as model:
            reference = reference_of(model, texts)
            rows = [("the 4-bit base with the adapter on", columns_of(model, texts, reference))]
        for row in rows_of(args.model, base, adapter, trained_on, work):
            with opened(row.path, work) as model:
                rows.append((row.title, columns_of(model, texts, reference)))
            print(f"seed {seed}: {row.title}", file=sys.stderr, flush=True)
        results.append(rows)
    return results


def table(results: list[list[tuple[str, dict[str, Any]]]], text: str) -> list[str]:
    """Return the rows of a table in Markdown: means of all seeds, with intervals of 95%.

    An interval draws blocks of the text; each position has the mean of its seeds.
    """
    lines = []
    trained = np.mean([rows[0][1][text]["loss"] for rows in results], axis=0)
    blocks = blocks_of(len(trained) // (LENGTH - 1), LENGTH - 1)
    for number, (title, _) in enumerate(results[0]):
        loss, kl = (
            np.mean([rows[number][1][text][column] for rows in results], axis=0)
            for column in ("loss", "kl")
        )
        columns = {"loss": loss, "more": loss - trained, "kl": kl}
        summary = figures(columns, blocks, {name: statistics.mean(name) for name in columns})
        each = [
            float((rows[number][1][text]["loss"] - rows[0][1][text]["loss"]).mean())
            for rows in results
        ]
        lines.append(
            f"| {title} | {summary['loss'].value:.4f} | {shown(summary['more'])} | "
            f"{min(each):+.4f} to {max(each):+.4f} | {shown(summary['kl'])} |"
        )
    return lines


def shown(figure: Figure) -> str:
    """Return a figure and its interval as the tables show them."""
    return f"{figure.value:+.4f} [{figure.low:+.4f}, {figure.high:+.4f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--text", choices=("python", "packages"), default="python")
    parser.add_argument("--stride", type=int, default=3, help="of the other text's windows")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    results = measure(args, tokenizer)
    for text in results[0][0][1]:
        print(f"\n{text}, {len(results[0][0][1][text]['loss']):,} positions\n")
        print("| model | loss | more than what was trained | by seed | KL to it |")
        print("|---|---|---|---|---|")
        print("\n".join(table(results, text)))


if __name__ == "__main__":
    main()
