"""Measure what recipes of nf4 plan save against one format for all, as docs/plan.md has it.

    .venv/bin/python scripts/measure_budgets.py MODEL --calibration TEXT [--tokens N] [--bits 4.5 5]

Measures the model once with the text, makes a recipe for each budget and for each way of
estimating, converts by it, and by the best format for all that is not larger, and prints the KL
divergence of each on the two built-in texts with intervals of 95%.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import nf4cli
from nf4cli.api.allocating import Allocated, Budget, choosing
from nf4cli.api.evaluating import Evaluation, compare
from nf4cli.api.machine import Machine
from nf4cli.api.sources import Source
from nf4cli.format.config import QuantConfig
from nf4cli.planning.recipe_file import with_recipe
from nf4cli.quality.calibration.run import Calibrating


def kl(output: Path, model: Path, tokens: int) -> dict[str, tuple[float, ...]]:
    """KL divergence of an output on each built-in text: value, low, high."""
    done = compare(Evaluation(output, model, tokens=tokens))
    return {
        name: tuple(measured.figures["kl_mean"].as_list()) for name, measured in done.texts.items()
    }


def shown(figures: dict[str, tuple[float, ...]]) -> str:
    return " | ".join(f"{v:.4f} [{low:.4f}, {high:.4f}]" for v, low, high in figures.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--eval-tokens", type=int, default=8192)
    parser.add_argument("--bits", type=float, nargs="+", default=[4.5, 5.0])
    asked = parser.parse_args()
    calibrating = Calibrating((asked.calibration,), asked.tokens, asked.length)
    for text in (calibrating, None):
        chosen = choosing(Source(asked.model), QuantConfig(), text, Machine())
        started = time.monotonic()
        for bits in asked.bits:
            measure(chosen.within(Budget(bits)), bits, asked.model, asked.eval_tokens)
        print(f"{time.monotonic() - started:.0f} s with evaluations", flush=True)


def measure(done: Allocated, bits: float, model: Path, tokens: int) -> None:
    """Print a recipe's estimate, and its KL divergence beside that of one format for all."""
    print(f"\n{bits} bits by {done.method}: expected {done.loss:.4f}, bound {done.bound:.4f}")
    if done.check is not None:
        print(f"correlation {done.check.correlation:.3f}, factor {done.check.factor:.2f}")
        for name, estimated in done.check.estimated.items():
            print(f"  {name}: estimated {estimated:.5f}, measured {done.check.measured[name]:.5f}")
    assert done.uniform is not None
    blocksize, nested = done.uniform
    configs = {
        f"blocksize {blocksize}, nested {nested}": QuantConfig(
            blocksize=blocksize, double_quant=nested
        ),
        f"recipe of {done.bits:.3f} bits": with_recipe(QuantConfig(), done.recipe),
    }
    found = {}
    for name, config in configs.items():
        with TemporaryDirectory() as place:
            nf4cli.quantize(model, Path(place) / "out", config)
            found[name] = kl(Path(place) / "out", model, tokens)
        print(f"  {name}: {shown(found[name])}", flush=True)
    uniform, recipe = found.values()
    less = ", ".join(f"{name} {1 - recipe[name][0] / uniform[name][0]:.1%}" for name in recipe)
    print(f"  less: {less}", flush=True)


if __name__ == "__main__":
    main()
