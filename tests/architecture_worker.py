"""Makes and loads the models of tiny_models with the transformers of the environment it runs in.

A program, not a test: test_model_architectures.py runs it once per version of transformers, for
all models at once, because importing transformers takes ten seconds.

    architecture_worker.py sources FOLDER [NAME...]
    architecture_worker.py load SOURCES QUANTIZED LINES REPORT [--save FOLDER] [NAME...]

The folders hold one checkpoint per case: `clip@4` is the clip that transformers 4 saved.  LINES has
the line of code that nf4 printed for each case.
"""

from __future__ import annotations

import argparse
import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
warnings.filterwarnings("ignore")

import bitsandbytes as bnb  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from tiny_models import MODELS, Tiny, inputs  # noqa: E402

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
Linear4bit = bnb.nn.Linear4bit
KEY_LISTS = ("missing", "unexpected", "mismatched")
MAJOR = transformers.__version__.partition(".")[0]


def class_of(tiny: Tiny) -> Any:
    return getattr(transformers, tiny.model)


def make_sources(folder: Path, names: list[str]) -> None:
    """Random bf16 checkpoints, the same ones every time; of these models, or of all."""
    for name in names or MODELS:
        tiny = MODELS[name]
        torch.manual_seed(0)
        model = class_of(tiny)(getattr(transformers, tiny.config)(**tiny.arguments))
        model.to(torch.bfloat16)
        for path, parameter in model.named_parameters():
            if parameter.ndim >= 2 and not parameter.any():  # an all-zero layer hides mistakes
                parameter.data.normal_(0, 0.02)
            if ".experts." in path:  # as small as they are, a wrong one would not show
                parameter.data.mul_(8)
        model.save_pretrained(folder / f"{name}@{MAJOR}")


def linears(model: Any) -> dict[str, Any]:
    return {name: m for name, m in model.named_modules() if isinstance(m, Linear4bit)}


def forward(model: Any, tiny: Tiny) -> torch.Tensor:
    for module in linears(model).values():
        module.support_avx512bf16_for_cpu = False  # that path repacks the weights, lossily
    given = {
        key: value.to(model.dtype) if value.is_floating_point() else value
        for key, value in inputs(tiny.takes).items()
    }
    with torch.no_grad():
        out = model(**given)
    for key in ("logits", "logits_per_image", "last_hidden_state"):
        if key in out:
            return out[key].float()
    raise KeyError(str(out.keys()))


def real_flow(tiny: Tiny, source: Path, skip: list[str] | None = None) -> Any:
    """What a user does without nf4; transformers chooses the modules, or skips the given ones."""
    return class_of(tiny).from_pretrained(
        source, dtype=torch.bfloat16,
        quantization_config=transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16, llm_int8_skip_modules=skip,
        ),
    )  # fmt: skip


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm())


def loaded(tiny: Tiny, path: Path, **options: Any) -> tuple[Any, dict[str, list[str]]]:
    """(the model, what is wrong with it)"""
    model, info = class_of(tiny).from_pretrained(path, output_loading_info=True, **options)
    wrong = {key: sorted(map(str, info[f"{key}_keys"])) for key in KEY_LISTS}
    wrong["without quant_state"] = [
        name for name, m in linears(model).items() if not getattr(m.weight, "quant_state", None)
    ]
    wrong["on meta"] = [name for name, p in model.named_parameters() if p.is_meta]
    return model, {key: names for key, names in wrong.items() if names}


def by_line(line: str) -> Any:
    """The model that a line of code loads, where its class has been imported."""
    name = line.partition(".")[0]
    return eval(line, {name: getattr(transformers, name)})  # the line that nf4 printed


def load(
    tiny: Tiny, source: Path, quantized: Path, save_to: Path | None, line: str
) -> dict[str, Any]:
    """The report of one case: how it loaded, and how far its output is from the real flow's."""
    report: dict[str, Any] = {"errors": {}}

    @contextmanager
    def noting(step: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            report["errors"][step] = f"{type(error).__name__}: {error}"[:600]

    full_out = ours = our_out = None
    with noting("source"):
        full, report["wrong with the source"] = loaded(tiny, source, dtype=torch.bfloat16)
        full_out = forward(full, tiny)
    with noting("load"):
        ours, report["wrong"] = loaded(tiny, quantized)  # as a user does: 4 takes float16
        report["modules"] = sorted(linears(ours))
    if ours is not None:
        with noting("forward"):
            as_it_is = forward(ours, tiny)
            report["finite"] = bool(as_it_is.isfinite().all())
            with noting("line"):
                printed = by_line(line)
                report["class by the line"] = type(printed).__name__
                report["the line gives the same"] = torch.equal(forward(printed, tiny), as_it_is)
            ours, _ = loaded(tiny, quantized, dtype=torch.bfloat16)
            our_out = forward(ours, tiny)
    with noting("real flow"):
        real = real_flow(tiny, source)
        if save_to:
            real.save_pretrained(save_to)  # before a forward pass, which may repack the weights
        if our_out is None or full_out is None:
            return report
        if linears(real).keys() != linears(ours).keys():
            config = json.loads((quantized / "config.json").read_text())["quantization_config"]
            real = real_flow(tiny, source, config["llm_int8_skip_modules"])
        report["modules of the real flow"] = sorted(linears(real))
        real_out = forward(real, tiny)
        report["size"] = float(full_out.norm())
        report["from source"] = distance(our_out, full_out)
        report["real flow from source"] = distance(real_out, full_out)
        report["from real flow"] = distance(our_out, real_out)
        for name, module in linears(real).items():
            module.weight.quant_state = linears(ours)[name].weight.quant_state
        report["from real flow with our states"] = distance(our_out, forward(real, tiny))
    return report


def load_all(
    sources: Path, quantized: Path, save: Path | None, lines: dict[str, str], names: list[str]
) -> dict[str, Any]:
    """The reports of all cases, or of these models."""
    return {
        path.name: load(
            MODELS[path.name.partition("@")[0]], sources / path.name.partition("+")[0], path,
            save / path.name if save else None, lines[path.name],
        )
        for path in sorted(quantized.iterdir())
        if not names or path.name.partition("@")[0] in names
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    steps = parser.add_subparsers(dest="step", required=True)
    step = steps.add_parser("sources")
    step.add_argument("folder", type=Path)
    step.add_argument("names", nargs="*")
    step = steps.add_parser("load")
    for name in ("sources", "quantized", "lines", "report"):
        step.add_argument(name, type=Path)
    step.add_argument("--save", type=Path)
    step.add_argument("names", nargs="*")
    given = parser.parse_args()
    if given.step == "sources":
        make_sources(given.folder, given.names)
    else:
        lines = json.loads(given.lines.read_text())
        report = load_all(given.sources, given.quantized, given.save, lines, given.names)
        report = {"transformers": transformers.__version__, "cases": report}
        given.report.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
