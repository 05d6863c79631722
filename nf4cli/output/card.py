"""Write the model card of an output, README.md: what it is, how to load it, what it lost.

The card is the user's to edit, so no manifest lists it.  It depends only on the manifest,
config.json and the source's own card: the same run writes the same card.

Names come from files that anybody may have made.  In text they are escaped; in code they are used
only where they are plain.
"""

from __future__ import annotations

import re
import shlex
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from ..checkpoint.digest import digest_file
from ..checkpoint.discovery import CARD, IMPORTANCE, MANIFEST
from ..checkpoint.untrusted import printable
from ..format.config import QuantConfig
from ..planning.diffusers_rules import converts
from ..units import in_decimal_unit, plural
from .auto_class import auto_class, class_name, needs_remote_code
from .front_matter import Metadata, format_metadata, read_metadata
from .manifest import Manifest, TensorError, TensorRecord
from .markdown import ACTIONS, escape, table
from .recipe_words import adapter_options, how_chosen, options_of, why_not_by_digests

VLLM_PLUGIN = "vllm-bnb-plugin"
"""Package that loads bitsandbytes checkpoints in vLLM 0.28 and newer."""

HERE = "your-name/this-model"
"""Stands in a card for the name of its repository, until the output is published."""

_WORST = 5
_FILES = 20
_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
_IN_CODE = re.compile(r"[\w./@:+-]{1,200}", re.ASCII)
_LIBRARIES = ("transformers", "diffusers", "sentence-transformers")


@dataclass(frozen=True, slots=True)
class Subject:
    """What a card is about.

    Attributes:
        name: name of the source.
        metadata: metadata of the source's own card.
        parts: component of a pipeline -> its manifest; "" alone for a single checkpoint.
        config: config.json of the output, or model_index.json of a pipeline.
        digests: SHA-256 of each part's manifest, by component.
    """

    name: str
    metadata: Metadata
    parts: Mapping[str, Manifest]
    config: Mapping[str, Any]
    digests: Mapping[str, str]

    @property
    def is_pipeline(self) -> bool:
        """Return whether the parts are components of a diffusers pipeline."""
        return "" not in self.parts

    @property
    def first(self) -> Manifest:
        """Manifest of the largest part.  All parts have the same source and recipe."""
        return max(self.parts.values(), key=lambda manifest: manifest.quantized_parameters)

    @property
    def library(self) -> str:
        """Library that loads the output; "" without a config.json, since none does then."""
        if self.is_pipeline or "_diffusers_version" in self.config:
            return "diffusers"
        if not self.config:
            return ""
        if "modules.json" in self.first.output_files:
            return "sentence-transformers"
        return "transformers"

    @property
    def base(self) -> str | None:
        """Repository and commit of the source, REPO@COMMIT; None if it came from no Hub."""
        repo, commit = self.first.source_repo, self.first.source_commit
        return f"{repo}@{commit}" if repo and commit and _NAME.fullmatch(repo) else None


_REPEATED = "The same version of nf4 gives the same bytes, on any machine:"
_BOUNDED = (
    "With `--disk SIZE` it takes no more of the disk than that, and of this model it fetches only "
    "what is small."
)
_CALIBRATED = (
    f"With the same text (its SHA-256 is in `{IMPORTANCE}`); torch's sums differ in their last "
    "digits between machines, and some codes with them:"
)


def write_card(
    directory: Path,
    source: Path | None,
    name: str,
    parts: Mapping[str, Manifest],
    config: Mapping[str, Any],
) -> None:
    """Write the card of a finished output.

    Args:
        directory: of the output, with its manifests.
        source: directory of the source, whose card's metadata is carried over; None where the
            source is a single file, since the card beside it may be of something else.
        name, parts, config: see `Subject`.
    """
    digests = {part: digest_file(directory / part / MANIFEST, "sha256") for part in parts}
    subject = Subject(name, read_metadata(source) if source else {}, parts, config, digests)
    (directory / CARD).write_text(card(subject), "utf-8")


def addressed(text: bytes, repo: str) -> bytes:
    """Return a card with the name of its repository put in."""
    return text.replace(HERE.encode(), repo.encode())


def card(subject: Subject) -> str:
    """Return a model card: metadata and GitHub-flavoured Markdown."""
    sections = [
        format_metadata(_metadata(subject)),
        f"# {escape(subject.name)}, 4-bit {subject.first.config.quant_type.upper()}\n",
        *_introduction(subject),
        *_loading(subject),
        *_contents(subject),
        *_errors(subject),
        *_checking(subject),
        *_making(subject),
    ]
    return "\n".join(sections).rstrip("\n") + "\n"


# -- metadata ---------------------------------------------------------------------------------


def _metadata(subject: Subject) -> dict[str, Any]:
    """Return the metadata of the card, in the order that is usual on the Hub."""
    theirs, first = subject.metadata, subject.first
    metadata: dict[str, Any] = {}
    if subject.base:
        metadata["base_model"] = first.source_repo
        metadata["base_model_relation"] = "quantized"
    if subject.library in _LIBRARIES:
        metadata["library_name"] = subject.library
    for field in ("pipeline_tag", "license", "license_name", "license_link", "language",
                  "datasets"):  # fmt: skip
        if field in theirs:
            metadata[field] = theirs[field]
    tags = ["bitsandbytes", "4-bit", first.config.quant_type, "nf4cli"]
    metadata["tags"] = list(dict.fromkeys([*theirs.get("tags", []), *tags]))
    return metadata


# -- what it is, how to load it ---------------------------------------------------------------


def _introduction(subject: Subject) -> list[str]:
    """Return the lines that say what was made of what, and how small it is."""
    first = subject.first
    parameters = sum(m.parameters for m in subject.parts.values())
    packed = sum(m.quantized_parameters for m in subject.parts.values())
    before = sum(f.size for m in subject.parts.values() for f in m.source_files.values())
    after = sum(_weight_bytes(m) for m in subject.parts.values())
    bits = sum(m.bits_per_weight * m.parameters for m in subject.parts.values()) / parameters
    if subject.base:
        source = f"{_code(first.source_repo)} at commit {_code(first.source_commit)}"
    else:
        source = _code(subject.name)
    what = "The 4-bit parts" if subject.is_pipeline else "Its weights"
    return [
        f"{source} in bitsandbytes' 4-bit format ({first.config.quant_type.upper()}, blocks of "
        f"{first.config.blocksize}"
        f"{', scales in 8 bits' if first.config.double_quant else ''}{how_chosen(first.config)}"
        f"{_formats(first.config)}), "
        f"converted by nf4 {escape(first.tool_version)}. {what} take {_size(after)}, from "
        f"{_size(before)}: {bits:.2f} bits a weight. {packed / parameters:.1%} of "
        f"{parameters:,} weights are 4-bit; the others are kept as listed below.",
        "",
    ]


def _formats(config: QuantConfig) -> str:
    """Return what a recipe gives modules of its own, "" where all are packed alike."""
    return "".join(
        f"; {plural(len(each.modules), 'module')} in blocks of {each.blocksize} with scales in "
        f"{'8' if each.double_quant else '32'} bits"
        for each in config.formats
    )


def _weight_bytes(manifest: Manifest) -> int:
    files = {record.output_file for record in manifest.tensors.values()} - {""}
    return sum(manifest.output_files[name].size for name in files if name in manifest.output_files)


def _size(count: int) -> str:
    number, unit = in_decimal_unit(count)
    return f"{count} bytes" if unit == "B" else f"{number:.1f} {unit}"


def _loading(subject: Subject) -> list[str]:
    target = subject.first.config.target
    if not subject.library:
        return []
    lines = ["## Loading it", ""]
    remote = ", trust_remote_code=True" if needs_remote_code(subject.config) else ""
    if target == "vllm":
        trusting = _VLLM + (" --trust-remote-code" if remote else "")
        return [*lines, *_fenced("sh", trusting), _VLLM_LIMITS, ""]
    if target == "unsloth":
        experts = [_UNSLOTH_EXPERTS, "", *_fenced("python", _LOAD)]
        lines += _fenced("python", _UNSLOTH.format(remote=remote))
        return lines + (experts if subject.first.config.expert_layout else [])
    if subject.library == "diffusers":
        lines += _fenced("sh", "pip install diffusers transformers accelerate bitsandbytes")
        return [*lines, *_fenced("python", _diffusers_code(subject))]
    if subject.library == "sentence-transformers":
        lines += _fenced("sh", "pip install sentence-transformers accelerate bitsandbytes")
        return [*lines, *_fenced("python", _SENTENCES.format(remote=remote))]
    kind = auto_class(subject.config, subject.first.tensors)
    lines += _fenced("sh", "pip install transformers accelerate bitsandbytes")
    lines += _fenced("python", _transformers_code(subject, kind, remote))
    if kind == "AutoModelForCausalLM":
        lines += ["To train it with LoRA (QLoRA; `pip install peft`):", ""]
        lines += _fenced("python", _PEFT)
    return lines


_VLLM = f"""pip install vllm bitsandbytes
pip install --no-deps {VLLM_PLUGIN}  # for vLLM 0.28 and newer
vllm serve {HERE}"""
_VLLM_LIMITS = (
    "vLLM refuses tensor parallelism for a checkpoint that is quantized in this way. On several "
    "GPUs use `--pipeline-parallel-size`."
)
_UNSLOTH = f"""from unsloth import FastLanguageModel

model, tokenizer = FastLanguageModel.from_pretrained("{HERE}", load_in_4bit=True{{remote}})"""
_UNSLOTH_EXPERTS = (
    "The experts are 4-bit too. Checked with unsloth_zoo 2026.10.9 over transformers 5.17.0, the "
    "newest that it asks for. Stock transformers (5.17 and newer) opens them with "
    "`pip install 'nf4cli[load]'`:"
)
_LOAD = f"""import nf4cli

model = nf4cli.load("{HERE}", device_map="auto")"""
_SENTENCES = f"""from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{HERE}"{{remote}})
embeddings = model.encode(["a sentence", "another one"])"""
_PEFT = """from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

model = prepare_model_for_kbit_training(model)
model = get_peft_model(model, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))"""


def _transformers_code(subject: Subject, kind: str, remote: str) -> str:
    files = subject.first.output_files
    processor = ""
    if "preprocessor_config.json" in files or "processor_config.json" in files:
        processor = "AutoProcessor"
    elif any(re.match(r"tokenizer|vocab\.|merges\.txt|spiece", name) for name in files):
        processor = "AutoTokenizer"
    names = sorted(filter(None, {kind, processor}))
    lines = [
        f"from transformers import {', '.join(names)}",
        "",
        f'model = {kind}.from_pretrained("{HERE}", device_map="auto"{remote})',
    ]
    if processor:
        variable = "processor" if processor == "AutoProcessor" else "tokenizer"
        lines.append(f'{variable} = {processor}.from_pretrained("{HERE}"{remote})')
    if (kind, processor) == ("AutoModelForCausalLM", "AutoTokenizer"):
        lines += [
            'inputs = tokenizer("Once upon a time", return_tensors="pt").to(model.device)',
            "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))",
        ]
    return "\n".join(lines)


def diffusers_class(subject: Subject) -> tuple[str, str]:
    """Return the class of diffusers that loads an output, and the other arguments of its
    from_pretrained, as code."""
    dtype = subject.first.config.compute_dtype
    dtype = dtype if dtype in ("float16", "bfloat16", "float32") else "bfloat16"
    arguments = f"torch_dtype=torch.{dtype}"
    if subject.is_pipeline:
        return "DiffusionPipeline", arguments
    if needs_remote_code(subject.config):
        return "AutoModel", f"{arguments}, trust_remote_code=True"
    return class_name(subject.config.get("_class_name")) or "AutoModel", arguments


def _diffusers_code(subject: Subject) -> str:
    name, arguments = diffusers_class(subject)
    variable = "pipeline" if subject.is_pipeline else "model"
    lines = [
        "import torch",
        f"from diffusers import {name}",
        "",
        f'{variable} = {name}.from_pretrained("{HERE}", {arguments})',
    ]
    if subject.is_pipeline:
        lines.append("pipeline.enable_model_cpu_offload()")
    return "\n".join(lines)


# -- what is in it ----------------------------------------------------------------------------


def _contents(subject: Subject) -> list[str]:
    lines = ["## What is 4-bit, and what is kept", ""]
    for name, manifest in subject.parts.items():
        shared = Counter((t.source_file, t.source_tensor) for t in manifest.tensors.values())
        groups: dict[tuple[str, str], list[int]] = {}
        for record in manifest.tensors.values():
            group = groups.setdefault((record.action, record.reason), [0, 0])
            group[0] += 1
            group[1] += _elements(record, shared[record.source_file, record.source_tensor])
        rows = [
            (ACTIONS[action], escape(reason), f"{count:,}", f"{elements:,}")
            for (action, reason), (count, elements) in sorted(
                groups.items(), key=lambda item: (item[0][0] != "quantize", -item[1][1], item[0])
            )
        ]
        lines += _component(name)
        lines += table(("what", "why", "tensors", "weights"), rows, "llrr")
    if subject.is_pipeline:
        lines += ["The other components of the pipeline are as they were.", ""]
    return lines


def _elements(record: TensorRecord, sharing: int) -> int:
    """Return the elements of a weight.

    Args:
        sharing: how many weights are made of the same stored tensor.
    """
    if record.state is not None:
        return prod(record.state.shape)
    return prod(record.source_shape) // sharing


def _component(name: str) -> list[str]:
    return [f"### {escape(name)}", ""] if name else []


def _errors(subject: Subject) -> list[str]:
    lines = ["## What rounding to 4 bits cost", ""]
    for name, manifest in subject.parts.items():
        errors = {n: t.error for n, t in manifest.tensors.items() if t.error is not None}
        if not errors:
            continue
        lines += _component(name)
        median = statistics.median(error.rel_rmse for error in errors.values())
        lines += [_sentence(median, errors), ""]
        worst = sorted(errors, key=lambda tensor: (-errors[tensor].rel_rmse, tensor))[:_WORST]
        rows = [
            (
                escape(tensor),
                f"{errors[tensor].rel_rmse:.4f}",
                f"{errors[tensor].max_abs:.3g}",
                f"{errors[tensor].outlier_blocks or 0:,}",
            )
            for tensor in worst
        ]
        lines += table(
            ("worst weights", "relative RMSE", "largest error", "outlier blocks"), rows, "lrrr"
        )
    return [
        *lines,
        "The relative RMSE is the root of (sum of squared error / sum of squared value) of a "
        "weight. An outlier block is one where a single value is above 10 times the root mean "
        "square of the others, which then have few codes left. "
        f"{_code(MANIFEST)} has the figures of every weight.",
        "",
    ]


def _sentence(median: float, errors: Mapping[str, TensorError]) -> str:
    blocks = sum(error.blocks or 0 for error in errors.values())
    outliers = sum(error.outlier_blocks or 0 for error in errors.values())
    counted = f"; {outliers:,} of {blocks:,} blocks have an outlier" if blocks else ""
    return f"Relative RMSE of the median weight: {median:.4f}{counted}."


# -- how to check it, how it was made ---------------------------------------------------------


def _checking(subject: Subject) -> list[str]:
    lines = ["## Checking it", "", "That every byte is the one that was written:", ""]
    lines += _fenced("sh", f"pip install nf4cli\nnf4 verify {HERE}")
    origin = subject.base or "DIRECTORY"
    what = "" if subject.base else f", a directory with {escape(subject.name)}"
    lines += [f"And that those are the bytes which the source gives{what}, by converting it again:"]
    words = adapter_options(subject.first.config)
    merged = "".join(f" {shlex.quote(printable(word))}" for word in words)
    lines += ["", *_fenced("sh", f"nf4 verify {HERE} --source {origin}{merged}")]
    unbounded = why_not_by_digests(subject.first.config, subject.first.digest, True)
    if subject.base and not subject.is_pipeline and not unbounded:
        lines += [_BOUNDED, ""]
    rows = []
    for name, manifest in subject.parts.items():
        prefix = f"{name}/" if name else ""
        rows.append((escape(prefix + MANIFEST), "sha256", subject.digests[name]))
        shards = sorted({t.output_file for t in manifest.tensors.values()} - {""})
        rows += [
            (escape(prefix + shard), manifest.digest, manifest.output_files[shard].digest)
            for shard in shards[:_FILES]
        ]
    lines += table(("file", "algorithm", "digest"), rows, "lll")
    return [*lines, f"{_code(MANIFEST)} has the digests of every file and tensor.", ""]


def _making(subject: Subject) -> list[str]:
    source = subject.base or subject.name
    if not subject.base and not _NAME.fullmatch(source):
        source = "DIRECTORY"
    words = ["nf4", "quantize", source, *options_of(subject.first.config), *_kept(subject)]
    if subject.first.digest != ("sha256" if subject.base else "blake3"):
        words += ["--digest", subject.first.digest]
    command = " ".join(shlex.quote(printable(word)) for word in words)
    return [
        "## Making it again",
        "",
        _REPEATED if subject.first.config.method == "rtn" else _CALIBRATED,
        "",
        *_fenced("sh", f"pip install nf4cli=={printable(subject.first.tool_version)}\n{command}"),
    ]


def _kept(subject: Subject) -> Iterable[str]:
    """Yield the --keep options of the run: for modules, and for whole components of a pipeline."""
    for name, manifest in sorted(subject.parts.items()):
        for pattern in sorted(manifest.config.keep):
            yield from ("--keep", f"{name}.{pattern}" if name else pattern)
    if subject.is_pipeline:
        for name, entry in sorted(subject.config.items()):
            is_component = (
                isinstance(entry, list)
                and len(entry) == 2
                and all(isinstance(word, str) for word in entry)
            )
            if is_component and name not in subject.parts and converts(name, *entry):
                yield from ("--keep", name)


def _code(text: object) -> str:
    plain = _IN_CODE.fullmatch(str(text))
    return f"`{text}`" if plain else f"<code>{escape(text)}</code>"


def _fenced(language: str, text: str) -> list[str]:
    return [f"```{language}", *text.splitlines(), "```", ""]
