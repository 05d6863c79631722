"""The proof: quantize the source again, with the code that writes, and compare every byte."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from . import bnb_format, selection, skip_list
from .conversion import Conversion
from .engines import Engine
from .errors import InputError, UsageError
from .families import names_of
from .limits import Resources
from .manifest import Manifest
from .packed import PackedWeight, Placed, read_state
from .pipeline import Progress
from .plan import Plan, TensorPlan, make_plan
from .reader import ByteReader, ShardReaders
from .records import SAFETENSORS_NAME, TORCH_NAME, Answer, Checkpoint, QuantConfig
from .report import Report
from .source import MANIFEST, open_checkpoint

if TYPE_CHECKING:
    from numpy.typing import NDArray

_PIECE = 1 << 19  # bytes compared at a time


class _Comparison:
    """The sink that compares: what a conversion would write, with what is there."""

    def __init__(self, checkpoint: Checkpoint, readers: ShardReaders) -> None:
        self._checkpoint = checkpoint
        self._readers = readers
        self._lock = threading.Lock()
        self.first: dict[str, int] = {}  # key -> the first byte that differs
        self.states: dict[str, str] = {}  # key -> what is wrong with a quant_state
        self.compared = 0

    def write(self, key: str, offset: int, data: NDArray[np.uint8]) -> None:
        placed = self._checkpoint.tensors.get(key)
        if placed is not None and bnb_format.is_state_key(key):
            self._compare_states(key, placed, data)
            return
        if placed is None or offset + data.nbytes > placed[1].nbytes:
            return  # reported by the comparison of the headers
        shard, tensor = placed
        with self._lock:
            self.compared += data.nbytes
        for start in range(0, data.nbytes, _PIECE):
            piece = data[start : start + _PIECE]
            there = self._readers[shard].read(tensor.start + offset + start, piece.nbytes)
            if not np.array_equal(there, piece):
                place = offset + start + int(np.argmax(there != piece))
                with self._lock:
                    self.first[key] = min(place, self.first.get(key, place))
                return

    def _compare_states(self, key: str, placed: Placed, data: NDArray[np.uint8]) -> None:
        """Two quant_state blobs that mean the same are the same: padding and spacing are free."""
        expected = bnb_format.decode_state(data.tobytes(), key)
        there = b""
        try:
            there = read_state(self._readers, placed)
            same = bnb_format.decode_state(there, key) == expected
        except InputError:
            same = False
        with self._lock:
            self.compared += data.nbytes
            if not same:
                self.states[key] = f"{key} is {there[:300]!r}, the source gives {expected}"

    def finish(self, plan: TensorPlan) -> None: ...

    def abort(self) -> None: ...


def check_source(
    checkpoint: Checkpoint,
    weights: dict[str, PackedWeight],
    manifest: Manifest | None,
    source: Path,
    engine: Engine,
    resources: Resources,
    report: Report,
    progress: Progress,
) -> None:
    if manifest is None and not weights:
        report.unchecked.append("the bytes against the source: no quantization state is complete")
        return
    config = manifest.config if manifest else recipe_of(checkpoint, weights)
    original = open_checkpoint(source)
    try:
        plan = make_plan(original, config, lambda _: _recorded_answer(manifest))
    except UsageError as error:
        report.add(
            "source", str(source), f"{source} does not fit the recipe of {checkpoint.root}: {error}"
        )
        return
    with ShardReaders(checkpoint.shards) as readers:
        sink = _Comparison(checkpoint, readers)
        algorithm = manifest.digest if manifest else None
        conversion = Conversion(plan, engine, resources, sink, algorithm, progress=progress)
        conversion.run()
    if manifest is not None:
        _compare_manifest(manifest, conversion, source, report)
    _compare_headers(checkpoint, plan, report)
    _compare_config(checkpoint, plan, manifest, report)
    for key, place in sorted(sink.first.items()):
        report.add("source", key, _difference(checkpoint, weights, key, place))
    for key, message in sorted(sink.states.items()):
        report.add("source", key, message)
    report.check(
        "source",
        f"every byte is the one the source gives ({sink.compared:,} bytes, quantized again with "
        f"{engine.name})",
    )


def _compare_manifest(
    manifest: Manifest, conversion: Conversion, source: Path, report: Report
) -> None:
    """The manifest's statements, against those of the run just made."""
    digests = {k: d for record in manifest.tensors.values() for k, d in record.outputs.items()}
    expected = conversion.manifest(digests)
    for name, record in expected.source_files.items():
        found = manifest.source_files.get(name)
        if found != record:
            place = source if source.is_file() else source / name
            named = found.digest if found else "no such file"
            report.add(
                "source",
                name,
                f"{place} is not the file that this was made from: its {manifest.digest} is "
                f"{record.digest}, the manifest has {named}",
            )
    for name, tensor in expected.tensors.items():
        there = manifest.tensors.get(name)
        if there is None or replace(there, reason="") != replace(tensor, reason=""):
            report.add(
                "source", name, f"{MANIFEST} has of {name} another record than the source gives"
            )
    for name in sorted(manifest.tensors.keys() - expected.tensors.keys()):
        report.add("source", name, f"{MANIFEST} lists {name}, which the source does not hold")
    for name in ("parameters", "quantized_parameters"):
        if getattr(manifest, name) != getattr(expected, name):
            report.add("source", MANIFEST, f"{MANIFEST}: {name} is not what the source gives")


def _recorded_answer(manifest: Manifest | None) -> Answer | None:
    """What transformers answered in the run that is checked, as its manifest has it."""
    if manifest is None or not manifest.config.asked:
        return None
    rearranged = selection.REARRANGED.name
    return Answer(
        version=manifest.config.asked.removeprefix("transformers "),
        quantized=frozenset(
            name
            for name, t in manifest.tensors.items()
            if t.action == "quantize" or t.rule in (selection.USER.name, selection.ENTANGLED.name)
        ),
        rearranged=frozenset(n for n, t in manifest.tensors.items() if t.rule == rearranged),
    )


def recipe_of(checkpoint: Checkpoint, weights: dict[str, PackedWeight]) -> QuantConfig:
    """The options that would have made a checkpoint without manifest, as far as it shows them."""
    weight = next(iter(weights.values()))
    kept = next(
        (
            TORCH_NAME[t.dtype]
            for name, (_, t) in checkpoint.tensors.items()
            if t.dtype in TORCH_NAME
            and name not in weights
            and bnb_format.companion_owner(name) not in weights
        ),
        "auto",
    )
    found = checkpoint.config.get("quantization_config")
    compute = found.get("bnb_4bit_compute_dtype") if isinstance(found, dict) else None
    context = selection.Context.of(checkpoint)
    names = names_of(checkpoint.config)
    keys = bnb_format.skip_list(checkpoint.config)
    keep = [
        selection.module_path(name)
        for name, (_, tensor) in checkpoint.tensors.items()
        if name not in weights
        and bnb_format.companion_owner(name) not in weights
        and selection.rule_of(context, tensor).name == "linear"
        and any(skip_list.means(key, selection.module_path(name), names) for key in keys)
    ]
    return QuantConfig(
        quant_type=weight.state.quant_type,
        blocksize=weight.state.blocksize,
        double_quant=weight.state.nested,
        quant_storage=bnb_format.storage_of(weight.packed[1]) or "uint8",
        compute_dtype=(
            compute if isinstance(compute, str) and compute in SAFETENSORS_NAME else "auto"
        ),
        dtype=kept,
        keep=tuple(keep),
        target="vllm" if any("experts" in name.split(".") for name in weights) else "transformers",
    )


def _compare_headers(checkpoint: Checkpoint, plan: Plan, report: Report) -> None:
    expected = {key: spec for t in plan.tensors for key, spec in t.outputs.items()}
    for key, (dtype, shape) in expected.items():
        placed = checkpoint.tensors.get(key)
        if placed is None:
            report.add("source", key, f"{key} is missing: the source gives {dtype} {list(shape)}")
        elif not bnb_format.is_state_key(key) and (placed[1].dtype, placed[1].shape) != (
            dtype,
            shape,
        ):
            report.add(
                "source",
                key,
                f"{key} is {placed[1].dtype} {list(placed[1].shape)}: the source gives {dtype} "
                f"{list(shape)}",
            )
    for key in sorted(checkpoint.tensors.keys() - expected.keys()):
        report.add("source", key, f"{key} is there, but the source gives no such tensor")


def _compare_config(
    checkpoint: Checkpoint, plan: Plan, manifest: Manifest | None, report: Report
) -> None:
    """Our own config.json must be the one the source gives; of others, what the source says."""
    expected = plan.output_config
    if expected is None:
        return
    if not checkpoint.config:
        report.add("source", "config.json", "config.json is missing: the source has one")
        return
    found = dict(checkpoint.config)
    if manifest is not None and manifest.config.asked:
        # The names in its skip list are transformers' answer, which is not asked for again.
        expected, found = (bnb_format.without_skip_list(config) for config in (expected, found))
    keys = set(expected) | (set(found) if manifest else set())
    if not manifest:
        keys -= {"quantization_config", "transformers_version", "dtype", "torch_dtype"}
    for key in sorted(keys):
        if json.dumps(found.get(key)) != json.dumps(expected.get(key)):  # a NaN equals itself
            report.add(
                "source",
                "config.json",
                f"config.json: {key} is {found.get(key)!r}, the source gives {expected.get(key)!r}",
            )


def _difference(
    checkpoint: Checkpoint, weights: dict[str, PackedWeight], key: str, place: int
) -> str:
    shard, tensor = checkpoint.tensors[key]
    with ByteReader(shard.path, shard.size) as reader:
        value = int(reader.read(tensor.start + place, 1)[0])
    if key in weights:
        where = f"elements {2 * place} and {2 * place + 1}"
    else:
        width = max(1, tensor.nbytes // max(1, tensor.numel))
        where = f"element {place // width}"
    return (
        f"{key} in {shard.path.name}: byte {place:,} ({where}) is 0x{value:02x}, not what the "
        "source gives; it is the first difference"
    )
