"""Compare nf4 with other 4-bit formats: the same weights, the same calibration text, equal bits.

    scripts/compare_formats PLACE [--rows NAME...] [--tokens N]

SmolLM2-135M is decoded from a GGUF, taken off its grid (grid.py), and quantized by nf4, llama.cpp,
GPTQModel and AutoRound.  `nf4 eval` measures each on the two built-in texts.  PLACE keeps models
and figures: what is there already is not made again.  Prints the table of docs/quality.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from sources import decode, dither, gguf_path, linear_weights, write_calibration_text

from nf4cli.api.allocating import Budget, choosing
from nf4cli.api.machine import Machine
from nf4cli.api.sources import Source
from nf4cli.format.config import QuantConfig
from nf4cli.planning.recipe_file import text_of
from nf4cli.quality.calibration.run import Calibrating

HERE = Path(__file__).parent
OTHERS = HERE.parents[1] / ".venv-formats" / "bin" / "python"
PLANNED, LENGTH = 8192, 256
"""Tokens that nf4 plan runs, a quarter of its default, and tokens of its windows, its default."""
ITERATIONS, WINDOWS = 50, 2
"""AutoRound's rounds of a block and windows in each: a quarter of an hour on two busy
cores. Its defaults, 200 and 8, take 16 times as much."""
_TABLES = 0.03
"""Bits a weight that a budget has more: it counts 0.02 of tables and JSON, which the table leaves
out."""


@dataclass(frozen=True)
class Row:
    """A model of the table.

    Attributes:
        title: what it is.
        make: writes it to a directory, from the source and the text in the place.
    """

    title: str
    make: Callable[[Path, Path], object]


def nf4(*words: str | Path) -> str:
    """Run the command and return what it prints; raises CalledProcessError."""
    command = [sys.executable, "-P", "-m", "nf4cli", *map(str, words)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def quantized(*options: str) -> Callable[[Path, Path], object]:
    """Return what runs nf4 quantize; PLACE in an option is the directory of all."""

    def make(place: Path, output: Path) -> None:
        words = (option.replace("PLACE", str(place)) for option in options)
        nf4("quantize", place / "source", output, *words, "--quiet")

    return make


def llama(place: Path, output: Path) -> None:
    """Make all models of llama.cpp, of which the output is one."""
    words = [place / "source", gguf_path(), place / "tokens.npy", output.parent]
    subprocess.run([OTHERS, HERE / "llama.py", *words], check=True)


def learned(method: str, *options: str) -> Callable[[Path, Path], object]:
    """Return what runs AutoRound or GPTQModel."""

    def make(place: Path, output: Path) -> None:
        words = [method, place / "source", place / "tokens.npy", output, *options]
        subprocess.run([OTHERS, HERE / "learned.py", *words], check=True)

    return make


GPTQ, YAQA = (
    ("--calibration", "PLACE/calibration.txt", "--method", method) for method in ("gptq", "yaqa")
)


def recipe_rows(name: str) -> dict[str, Row]:
    """Return the rows of nf4 at the bits of a model of llama.cpp."""
    recipe = ("--recipe", f"PLACE/recipes/{name}.toml")
    measured_before = ("--importance", "PLACE/models/nf4_calibrated/nf4_importance.dat")
    return {
        f"nf4_calibrated_{name}": Row(
            "nf4, `--recipe`, `--importance`", quantized(*recipe, *measured_before)
        ),
        f"nf4_gptq_{name}": Row("nf4, `--recipe`, `--method gptq`", quantized(*recipe, *GPTQ)),
        f"nf4_yaqa_{name}": Row("nf4, `--recipe`, `--method yaqa`", quantized(*recipe, *YAQA)),
    }


LLAMA = {
    "iq4_nl": "llama.cpp, IQ4_NL",
    "q4_k_m_across": "llama.cpp, Q4_K_M as in wider models",
    "q4_k_m": "llama.cpp, Q4_K_M",
}
ROWS = {
    "nf4_absmax": Row("nf4, `--scale absmax`", quantized()),
    "nf4_search": Row("nf4, `--scale search`", quantized("--scale", "search")),
    "nf4_calibrated": Row(
        "nf4, `--calibration`", quantized("--calibration", "PLACE/calibration.txt")
    ),
    "nf4_gptq": Row("nf4, `--method gptq`", quantized(*GPTQ)),
    "nf4_yaqa": Row("nf4, `--method yaqa`", quantized(*YAQA)),
    "gptq": Row("GPTQModel, groups of 128", learned("gptq")),
    "autoround": Row(
        f"AutoRound W4A16, groups of 128, {ITERATIONS} iterations",
        learned("autoround", "--iters", str(ITERATIONS), "--batch", str(WINDOWS)),
    ),
} | {
    row: made
    for name, title in LLAMA.items()
    for row, made in ({name: Row(title, llama)} | recipe_rows(name)).items()
}


def prepare(place: Path) -> None:
    """Write the source, the calibration text and its tokens where they are not there yet."""
    source, text, tokens = place / "source", place / "calibration.txt", place / "tokens.npy"
    if not (source / "model.safetensors").is_file():
        decode(gguf_path(), place / "original")
        dither(gguf_path(), place / "original", source)
    if not tokens.is_file():
        write_calibration_text(text)
        np.save(tokens, Calibrating((text,)).windows(source)[0])


def write_recipes(place: Path, models: Path) -> None:
    """Write for each model of llama.cpp a recipe of nf4 plan that takes as many bits, to 0.01."""
    text = Calibrating((place / "calibration.txt",), tokens=PLANNED, length=LENGTH)
    chosen = choosing(Source(place / "source"), QuantConfig(), text, Machine())
    recipes = place / "recipes"
    for name in LLAMA:
        bits = json.loads((models / name / "bits.json").read_text())["bits"]
        done = chosen.within(Budget(bits + _TABLES))
        recipes.mkdir(exist_ok=True)
        (recipes / f"{name}.toml").write_text(text_of(done.recipe, [("bits", done.bits)]))


def bits_of(output: Path, source: Path) -> float:
    """Return the bits a weight of the linear layers of an output, with their scales.

    Of nf4 these are the codes, or 16 bits that a recipe keeps, absmax, and of nested scales the
    scale of each run and the offset.
    """
    if (output / "bits.json").is_file():
        return float(json.loads((output / "bits.json").read_text())["bits"])
    linear, size = linear_weights(source), 0
    for file in output.glob("*.safetensors"):
        with safe_open(file, "np") as stored:
            names = set(stored.keys())
            for name in names & set(linear):
                parts = [f"{name}{part}" for part in (".absmax", ".nested_absmax")]
                raw = [stored.get_slice(part) for part in (name, *parts) if part in names]
                size += sum(_BITS[one.get_dtype()] * int(np.prod(one.get_shape())) for one in raw)
                size += 32 * (parts[1] in names)
    return size / sum(value.numel() for value in linear.values())


_BITS = {"U8": 8, "F32": 32, "BF16": 16}


def measured(output: Path, place: Path, tokens: int) -> dict[str, Any]:
    """Return what nf4 eval says of an output, from PLACE/figures if it is there."""
    kept = place / "figures" / f"{output.name}_{tokens}.json"
    if not kept.is_file():
        kept.parent.mkdir(exist_ok=True)
        cache = ("--cache-dir", place / "cache", "--tokens", str(tokens))
        words = ("eval", output, "--source", place / "source", *cache, "--json", "--quiet")
        kept.write_text(nf4(*words))
    figures: dict[str, Any] = json.loads(kept.read_text())
    return figures


def main() -> None:
    """Make, measure and print the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("place", type=Path)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--tokens", type=int, default=8192)
    asked = parser.parse_args()
    place = asked.place.resolve()
    place.mkdir(parents=True, exist_ok=True)
    prepare(place)
    models, recipes = place / "models", place / "recipes"
    for name in asked.rows:
        output = models / name
        if not output.exists():
            models.mkdir(exist_ok=True)
            if name.endswith(tuple(LLAMA)) and name not in LLAMA and not recipes.exists():
                write_recipes(place, models)
            ROWS[name].make(place, output)
        texts = measured(output, place, asked.tokens)["texts"]
        bits = bits_of(output, place / "source")
        kl = " | ".join(
            "{:.4f} [{:.4f}, {:.4f}]".format(*text["kl_mean"]) for text in texts.values()
        )
        print(f"| {ROWS[name].title} | {bits:.2f} | {kl} |", flush=True)


if __name__ == "__main__":
    main()
