"""Is this output what it should be?  Three levels, each needing more than the one before.

Alone: every file opens, every quantization state is complete and sane, config.json says what the
tensors need.  With the manifest beside it: every byte is the one that was written.  With the
source: every byte is the one that the source gives, by quantizing again in memory, with the same
code that writes, and comparing.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from . import bnb_format, selection
from .codebook import codebook
from .conversion import Conversion
from .digest import digest_shard
from .engines import Engine
from .errors import InputError, UsageError
from .limits import Resources
from .manifest import Manifest
from .packed import PackedReader, PackedWeight, Placed, by_shard, find_weights, standard_nested_map
from .pipeline import Progress, no_progress, run
from .plan import Plan, TensorPlan, make_plan
from .reader import ByteReader, ShardReaders
from .records import SAFETENSORS_NAME, TORCH_NAME, Checkpoint, QuantConfig, Shard
from .source import MANIFEST, open_checkpoint

if TYPE_CHECKING:
    from numpy.typing import NDArray

LEVELS = ("structure", "config", "state", "manifest", "source")
_BLOCKS_AT_A_TIME = 1 << 18


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        level: one of LEVELS.
        where: the file or tensor.
        message: what was found and what was expected.
    """

    level: str
    where: str
    message: str


@dataclass(frozen=True, slots=True)
class Check:
    """One check that was made.

    Attributes:
        level: as of its findings.
        what: what holds when it is ok.
        ok: whether it had no finding.
    """

    level: str
    what: str
    ok: bool


@dataclass(slots=True)
class Report:
    """What was checked, what was not, and what is wrong.

    Attributes:
        findings: empty when all is well.
        checks: in the order they were made.
        unchecked: what could not be checked, and what it would take.
    """

    findings: list[Finding] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)

    def check(self, level: str, what: str) -> None:
        """All findings of this level are in."""
        self.checks.append(Check(level, what, all(f.level != level for f in self.findings)))

    def add(self, level: str, where: str, message: str) -> None:
        self.findings.append(Finding(level, where, message))

    @property
    def ok(self) -> bool:
        return not self.findings


def verify(
    path: Path,
    source: Path | None,
    engine: Engine,
    resources: Resources,
    progress: Progress = no_progress,
) -> Report:
    """Check a 4-bit checkpoint, written by nf4 or not.

    Args:
        path: the checkpoint.
        source: the full-precision checkpoint that it was made from, for the proof.

    Raises:
        InputError: `path` or `source` is not a checkpoint at all.
    """
    report = Report()
    try:
        checkpoint = open_checkpoint(path)
    except InputError as error:
        if not path.is_dir() or not any(path.glob("*.safetensors")):
            raise
        report.add("structure", str(path), str(error))
        return report
    with ShardReaders(checkpoint.shards) as readers:
        weights = _check_structure(checkpoint, readers, report)
        _check_config(checkpoint, weights, report)
        _check_states(PackedReader(readers, engine), weights, report)
    manifest = _check_manifest(checkpoint, weights, resources, report, progress)
    if source is None:
        report.unchecked.append(
            "that the bytes are what the source gives: run again with --source DIRECTORY"
        )
    else:
        _check_source(checkpoint, weights, manifest, source, engine, resources, report, progress)
    report.findings.sort(key=lambda finding: LEVELS.index(finding.level))
    return report


# -- alone ------------------------------------------------------------------------------------


def _check_structure(
    checkpoint: Checkpoint, readers: ShardReaders, report: Report
) -> dict[str, PackedWeight]:
    weights, problems = find_weights(checkpoint, readers)
    for owner, problem in problems:
        report.add("structure", owner, problem)
    if not weights and not problems:
        raise InputError(
            f"{checkpoint.root} holds no bitsandbytes 4-bit weight: there is nothing to verify. "
            "Make one with nf4 quantize"
        )
    parts = {part[1].name for weight in weights.values() for part in weight.parts()}
    for name, (_, tensor) in checkpoint.tensors.items():
        stateless = name not in parts and bnb_format.companion_owner(name) is None
        if stateless and tensor.dtype == "U8" and tensor.shape[1:] == (1,):
            report.add("structure", name, f"{name} looks packed but has no quant_state")
    report.check(
        "structure",
        f"every file opens, {len(weights)} quantization states are complete",
    )
    return weights


def _check_config(checkpoint: Checkpoint, weights: dict[str, PackedWeight], report: Report) -> None:
    if not checkpoint.config:
        report.unchecked.append("config.json: there is none")
        return
    for problem in bnb_format.config_problems(
        checkpoint.config, (weight.state for weight in weights.values())
    ):
        report.add("config", "config.json", problem)
    if not bnb_format.has_skip_list(checkpoint.config):
        report.unchecked.append(
            "which modules are not packed: config.json has no llm_int8_skip_modules, so each "
            "version of transformers derives its own list"
        )
        report.check("config", "config.json says what the tensors need")
        return
    keys = bnb_format.skip_list(checkpoint.config)
    packed = {selection.module_path(name) for name in weights}
    for module in sorted(packed):
        key = next((key for key in keys if bnb_format.hits(key, module)), None)
        if key is not None:
            report.add(
                "config",
                "config.json",
                f"llm_int8_skip_modules has {key!r}, which some loader takes to mean {module}, "
                "whose weight is packed",
            )
    context = selection.Context.of(checkpoint)
    for name, (_, tensor) in checkpoint.tensors.items():
        if name in weights or bnb_format.companion_owner(name) in weights:
            continue
        rule = selection.rule_of(context, tensor)
        module = selection.module_path(name)
        if rule.name in ("linear", "head") and not any(
            form_hit(key, module, context) for key in keys
        ):
            report.add(
                "config",
                name,
                f"{name} is full precision but no entry of llm_int8_skip_modules means it: loaders "
                "expect it in 4 bit and fail at the first forward",
            )
    report.check("config", "config.json says what the tensors need")


def form_hit(key: str, module: str, context: selection.Context) -> bool:
    """Whether `key` means `module` under either of the names that models give it."""
    forms = bnb_format.path_forms(module, selection.base_prefix(context.model_types))
    return any(bnb_format.hits_v5(key, form) or bnb_format.hits_v4(key, form) for form in forms)


def _check_states(reader: PackedReader, weights: dict[str, PackedWeight], report: Report) -> None:
    for weight in by_shard(weights):
        for message in _state_problems(reader, weight):
            report.add("state", weight.name, message)
    report.check("state", "tables are bitsandbytes' own, statistics are finite")


def _state_problems(reader: PackedReader, weight: PackedWeight) -> Iterable[str]:
    table = reader.floats(weight.quant_map)
    if not np.array_equal(table, codebook(weight.state.quant_type).decode):
        yield f"{weight.name}: quant_map is not the {weight.state.quant_type} table"
    if weight.nested_quant_map is not None and not standard_nested_map(
        reader.floats(weight.nested_quant_map)
    ):
        yield f"{weight.name}: nested_quant_map is not bitsandbytes' dynamic map"
    if weight.nested_absmax is not None:
        nested = reader.floats(weight.nested_absmax)
        if not np.isfinite(nested).all() or (nested < 0).any():
            yield f"{weight.name}: nested_absmax holds a value that is negative or not finite"
            return
    all_zero = True
    for first in range(0, weight.blocks, _BLOCKS_AT_A_TIME):
        absmax = reader.absmax(weight, first, min(_BLOCKS_AT_A_TIME, weight.blocks - first))
        if not np.isfinite(absmax).all():
            bad = first + int(np.argmin(np.isfinite(absmax)))
            yield f"{weight.name}: absmax of block {bad} is {absmax[bad - first]}"
            return
        all_zero = all_zero and not absmax.any()
    if all_zero:
        yield f"{weight.name}: every absmax is zero, so the whole weight decodes to zeros"


# -- with the manifest --------------------------------------------------------------------------


def _check_manifest(
    checkpoint: Checkpoint,
    weights: dict[str, PackedWeight],
    resources: Resources,
    report: Report,
    progress: Progress,
) -> Manifest | None:
    path = checkpoint.root / MANIFEST
    if not path.is_file():
        report.unchecked.append(
            f"that the bytes are the ones written: there is no {MANIFEST} "
            "(another program wrote this, or the run did not finish)"
        )
        return None
    try:
        manifest = Manifest.from_file(path)
    except InputError as error:
        report.add("manifest", MANIFEST, str(error))
        return None
    here = {shard.path.name: shard for shard in checkpoint.shards}
    for name in sorted(manifest.output_files.keys() - here.keys()):
        report.add("manifest", name, f"{name} is missing: the manifest lists it")
    for name in sorted(here.keys() - manifest.output_files.keys()):
        report.add("manifest", name, f"{name} is not in the manifest: it is of another run")
    for weight in weights.values():
        record = manifest.tensors.get(weight.name)
        if record is not None and record.state is not None and record.state != weight.state:
            report.add(
                "manifest",
                weight.name,
                f"{weight.name}: its quantization state is {weight.state}, the manifest has "
                f"{record.state}",
            )
    expected = {k: d for record in manifest.tensors.values() for k, d in record.outputs.items()}
    for key in sorted(expected.keys() - checkpoint.tensors.keys()):
        report.add("manifest", key, f"{key} is missing: the manifest lists it")
    lock = threading.Lock()

    def check(shard: Shard) -> None:
        findings = list(_digest_findings(shard, manifest, expected, progress))
        with lock:
            report.findings += findings

    shards = [shard for name, shard in here.items() if name in manifest.output_files]
    run(shards, lambda: check, min(resources.workers, max(1, len(shards))), lambda: None)
    report.check("manifest", f"every byte is the one written ({manifest.digest} of the manifest)")
    return manifest


def _digest_findings(
    shard: Shard, manifest: Manifest, expected: Mapping[str, str], progress: Progress
) -> Iterable[Finding]:
    name = shard.path.name
    record = manifest.output_files[name]
    if shard.size != record.size:
        yield Finding(
            "manifest", name, f"{name} has {shard.size:,} bytes, the manifest says {record.size:,}"
        )
    digest, tensors = digest_shard(
        shard, manifest.digest, progress=lambda count: progress(name, count)
    )
    wrong = [key for key, found in tensors.items() if found != expected.get(key)]
    for key in wrong:
        what = "is not in the manifest" if key not in expected else "is not what was written"
        wanted = f", expected {expected[key]}" if key in expected else ""
        yield Finding(
            "manifest", key, f"{key} in {name} {what}: its digest is {tensors[key]}{wanted}"
        )
    if digest != record.digest and not wrong:
        yield Finding(
            "manifest",
            name,
            f"{name}: {manifest.digest} is {digest}, the manifest says {record.digest}; no tensor "
            "differs, so the header does",
        )


# -- with the source ----------------------------------------------------------------------------


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
        there = self._readers[shard].read(tensor.start + offset, data.nbytes)
        with self._lock:
            self.compared += data.nbytes
        if np.array_equal(there, data):
            return
        place = offset + int(np.argmax(there != data))
        with self._lock:
            self.first[key] = min(place, self.first.get(key, place))

    def _compare_states(self, key: str, placed: Placed, data: NDArray[np.uint8]) -> None:
        """Two quant_state blobs that mean the same are the same: padding and spacing are free."""
        shard, tensor = placed
        there = self._readers[shard].read(tensor.start, tensor.nbytes).tobytes()
        expected = bnb_format.decode_state(data.tobytes(), key)
        try:
            same = bnb_format.decode_state(there, key) == expected
        except InputError:
            same = False
        with self._lock:
            self.compared += data.nbytes
            if not same:
                self.states[key] = f"{key} is {there[:300]!r}, the source gives {expected}"

    def finish(self, plan: TensorPlan) -> None: ...

    def abort(self) -> None: ...


def _check_source(
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
        plan = make_plan(original, config)
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
        digests, _ = conversion.source_digests()
        for name, record in manifest.source_files.items():
            if digests.get(name) not in (None, record.digest):
                report.add(
                    "source",
                    name,
                    f"{source if source.is_file() else source / name} is not the file that this "
                    f"was made from: its {manifest.digest} is {digests[name]}, the manifest has "
                    f"{record.digest}",
                )
    _compare_headers(checkpoint, plan, report)
    _compare_config(checkpoint, plan, report)
    for key, place in sorted(sink.first.items()):
        report.add("source", key, _difference(checkpoint, weights, key, place))
    for key, message in sorted(sink.states.items()):
        report.add("source", key, message)
    report.check(
        "source",
        f"every byte is the one the source gives ({sink.compared:,} bytes, quantized again with "
        f"{engine.name})",
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
    keys = bnb_format.skip_list(checkpoint.config)
    keep = [
        selection.module_path(name)
        for name, (_, tensor) in checkpoint.tensors.items()
        if name not in weights
        and bnb_format.companion_owner(name) not in weights
        and selection.rule_of(context, tensor).name == "linear"
        and any(form_hit(key, selection.module_path(name), context) for key in keys)
    ]
    return QuantConfig(
        quant_type=weight.state.quant_type,
        blocksize=weight.state.blocksize,
        double_quant=weight.state.nested,
        quant_storage=bnb_format.storage_of(weight.packed[1]) or "uint8",
        compute_dtype=str(compute) if compute in SAFETENSORS_NAME else "auto",
        dtype=kept,
        keep=tuple(keep),
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


def _compare_config(checkpoint: Checkpoint, plan: Plan, report: Report) -> None:
    expected = plan.output_config
    if expected is None:
        return
    for key in sorted(expected.keys() - {"quantization_config", "transformers_version"}):
        if checkpoint.config.get(key) != expected[key]:
            report.add(
                "source",
                "config.json",
                f"config.json: {key} is {checkpoint.config.get(key)!r}, the source gives "
                f"{expected[key]!r}",
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
