"""Read a PEFT adapter: adapter_config.json, and the headers of its tensors."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..format.config import AdapterRecord
from .digest import digest_file
from .reader import read_shard
from .types import Placed, Shard
from .untrusted import home_of, is_regular, leads_out, read_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
DIGEST = "sha256"
"""Algorithm of an adapter's digests: a Hub states it of every weight file."""
MAX_RANK = 65_536
"""Most ranks of a LoRA; published ones have up to 512, and full rank is the width of a model."""
_PICKLED = ("adapter_model.bin", "adapter_model.pt", "pytorch_model.bin")
_FLOATS = ("F32", "F16", "BF16")
_HARMLESS_STARTS = ("gaussian", "eva", "orthogonal", "default")
"""Values of init_lora_weights that leave the base model's weights as they are."""
_OTHER_ARITHMETIC = (
    "use_qalora", "use_bdlora", "arrow_config", "kasa_config", "alora_invocation_tokens",
    "layer_replication", "trainable_token_indices", "target_parameters", "monteclora_config",
)  # fmt: skip
"""Fields of adapter_config.json that change what an adapter adds, in ways nf4 does not have."""
_PATTERN_IS_SLOW = re.compile(r"\)[*+{?]|[*+}][*+{]")
_MOST_IN_PATTERN = 4  # quantifiers: each one more is a loop over the name


@dataclass(frozen=True, slots=True)
class Adapter:
    """A PEFT LoRA adapter.

    Attributes:
        root: its directory.
        name: what the user called it.
        config: adapter_config.json.
        shard: its safetensors file.
        record: what an output says of it.
    """

    root: Path
    name: str
    config: Mapping[str, Any]
    shard: Shard
    record: AdapterRecord

    def placed(self, name: str) -> Placed:
        """Return a tensor and its file."""
        return self.shard, next(t for t in self.shard.tensors if t.name == name)

    def rank(self, module: str) -> int:
        """Return the rank that the configuration gives a module.

        Raises:
            InputError: it is no positive number.
        """
        value = self._of("rank_pattern", "r", module, 8)
        if type(value) is not int or not 0 < value <= MAX_RANK:
            raise InputError(
                f"{self.root / CONFIG}: the rank of {module} is {value!r}, expected a whole number "
                f"from 1 to {MAX_RANK:,}: the file is damaged, save the adapter again"
            )
        return value

    def scale(self, module: str) -> float:
        """Return what the product of a module's two matrices is multiplied by.

        Raises:
            InputError: the rank or lora_alpha is no number.
        """
        rank, alpha = self.rank(module), self._of("alpha_pattern", "lora_alpha", module, 8)
        if type(alpha) not in (int, float) or not math.isfinite(alpha):
            raise InputError(
                f"{self.root / CONFIG}: lora_alpha of {module} is {alpha!r}, expected a number: "
                "the file is damaged, save the adapter again"
            )
        divisor = math.sqrt(rank) if self.config.get("use_rslora") else rank
        return float(alpha) / divisor * self.record.scale

    def _of(self, patterns: str, default: str, module: str, otherwise: int) -> Any:
        """Return what a module has by a table of patterns, as PEFT looks it up."""
        table = self.config.get(patterns) or {}
        for pattern, value in table.items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        return self.config.get(default, otherwise)


def largest_matrix(adapters: Iterable[Adapter]) -> int:
    """Return the bytes in float32 of the largest matrix of adapters that is held whole: those with
    a weight's columns."""
    return max(
        (
            4 * tensor.numel
            for adapter in adapters
            for tensor in adapter.shard.tensors
            if ".lora_A" in tensor.name or ".lora_embedding_B" in tensor.name
        ),
        default=0,
    )


def read_adapter(
    root: Path, name: str, scale: float = 1.0, repo: str = "", commit: str = ""
) -> Adapter:
    """Read an adapter's configuration and headers, and digest both of its files.

    Args:
        root: its directory.
        name: what the user calls it.
        scale: factor of everything that it adds.
        repo, commit: where on a Hub it comes from, "" for a directory.

    Raises:
        InputError: it is no LoRA in safetensors, or needs what nf4 does not do.
    """
    config_path, weights_path = root / CONFIG, root / WEIGHTS
    _require_files(root, config_path, weights_path)
    config = read_json(config_path)
    _require_lora(config, config_path)
    shard = read_shard(weights_path)
    for tensor in shard.tensors:
        if tensor.dtype not in _FLOATS:
            raise InputError(
                f"{tensor.name} in {weights_path} is {tensor.dtype}, expected one of "
                f"{', '.join(_FLOATS)}: save the adapter in one of these"
            )
    record = AdapterRecord(
        repo or root.name, digest_file(config_path, DIGEST),
        digest_file(weights_path, DIGEST), scale, repo, commit,
    )  # fmt: skip
    return Adapter(root, name, config, shard, record)


def _require_files(root: Path, config: Path, weights: Path) -> None:
    """Raise InputError if an adapter's files are not there, pickled, or links to other places."""
    if not root.is_dir():
        raise InputError(f"{root} is no directory: expected that of a PEFT adapter, with {CONFIG}")
    if not is_regular(config):
        raise InputError(f"{root} has no {CONFIG}: expected the directory of a PEFT adapter")
    if not is_regular(weights):
        pickled = next((name for name in _PICKLED if (root / name).exists()), None)
        if pickled is not None:
            raise InputError(
                f"{root / pickled} is a pickle, which can run any program when it is opened: nf4 "
                "reads safetensors only. Convert it where you trust it: "
                "PeftModel.from_pretrained(BASE, ADAPTER).save_pretrained(NEW) with PEFT writes "
                f"{WEIGHTS}"
            )
        raise InputError(f"{root} has no {WEIGHTS}: files are missing. Download the adapter again")
    home = home_of(root)
    for path in (config, weights):
        if leads_out(path, root, home):
            raise InputError(
                f"{path} is a link to a file outside of {root}: copy the file there instead"
            )


def _require_lora(config: Mapping[str, Any], path: Path) -> None:
    """Raise InputError if an adapter is none that nf4 merges."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise InputError(
            f"{path} says peft_type {kind!r}: nf4 merges LORA only (with its variants rsLoRA and "
            "DoRA). Merge the adapter with PEFT's merge_and_unload, and quantize the result"
        )
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower() not in _HARMLESS_STARTS:
        raise InputError(
            f"{path} says init_lora_weights {start!r}, which changed the weights of the base model "
            "before training: this adapter does not fit the base as it is published. Save it with "
            "PEFT's path_initial_model_for_weight_conversion, which makes an ordinary LoRA of it"
        )
    for field in _OTHER_ARITHMETIC:
        if config.get(field):
            raise InputError(
                f"{path} says {field}, which nf4 does not merge: merge the adapter with PEFT's "
                "merge_and_unload, and quantize the result"
            )
    for field in ("rank_pattern", "alpha_pattern"):
        table = config.get(field) or {}
        if not isinstance(table, dict):
            raise InputError(f"{path}: {field} is {str(table)[:80]!r}, expected an object")
        for pattern in table:
            _require_pattern(pattern, field, path)


def _require_pattern(pattern: str, field: str, path: Path) -> None:
    """Raise InputError for a pattern that is no regular expression, or could take for ever."""
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise InputError(f"{path}: {field} has {pattern[:80]!r}, no pattern: {error}") from error
    if len(re.findall(r"[*+{]", pattern)) > _MOST_IN_PATTERN or _PATTERN_IS_SLOW.search(pattern):
        raise InputError(
            f"{path}: {field} has the pattern {pattern[:80]!r}, which could take for ever to "
            f"match: write it without repeated groups, and at most {_MOST_IN_PATTERN} of * and +"
        )
