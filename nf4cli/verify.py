"""Is this output what it should be?  Three levels, each needing more than the one before.

Alone: every file opens, every quantization state is complete and sane, config.json says what the
tensors need.  With the manifest beside it: every byte is the one that was written.  With the
source: every byte is the one that the source gives, by quantizing again in memory, with the same
code that writes, and comparing.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from . import bnb_format, selection, skip_list
from .codebook import codebook
from .digest import digest_file, digest_shard
from .engines import Engine
from .errors import InputError
from .families import names_of
from .limits import Resources
from .manifest import FileRecord, Manifest
from .packed import PackedReader, PackedWeight, by_shard, find_weights, standard_nested_map
from .pipeline import Progress, no_progress, run
from .proof import check_source
from .reader import ShardReaders
from .records import Checkpoint, Shard
from .report import LEVELS, Finding, Report
from .source import MANIFEST, index_name, open_checkpoint
from .untrusted import home_of, is_regular, leads_out

if TYPE_CHECKING:
    pass

_BLOCKS_AT_A_TIME = 1 << 18


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
        check_source(checkpoint, weights, manifest, source, engine, resources, report, progress)
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
    index = index_name(checkpoint.stem)
    if len(checkpoint.shards) > 1 and not (checkpoint.root / index).is_file():
        report.add("structure", index, f"{index} is missing: loaders cannot find the shards")
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
        checkpoint.config,
        (weight.state for weight in weights.values()),
        {bnb_format.storage_of(weight.packed[1]) or "" for weight in weights.values()},
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
    context = selection.Context.of(checkpoint)
    hits = skip_list.hits_v4 if context.diffusers else skip_list.hits
    packed = {selection.module_path(name) for name in weights}
    for module in sorted(packed):
        key = next((key for key in keys if hits(key, module)), None)
        if key is not None:
            report.add(
                "config",
                "config.json",
                f"llm_int8_skip_modules has {key!r}, which some loader takes to mean {module}, "
                "whose weight is packed",
            )
    names = names_of(checkpoint.config)
    for name, (_, tensor) in checkpoint.tensors.items():
        if name in weights or bnb_format.companion_owner(name) in weights:
            continue
        rule = selection.rule_of(context, tensor)
        module = selection.module_path(name)
        if rule.name in ("linear", "head") and not any(
            skip_list.means(key, module, names) for key in keys
        ):
            report.add(
                "config",
                name,
                f"{name} is full precision but no entry of llm_int8_skip_modules means it: loaders "
                "expect it in 4 bit and fail at the first forward",
            )
    report.check("config", "config.json says what the tensors need")


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
        pieces = reader.float_pieces(weight.nested_absmax)
        if any(not np.isfinite(piece).all() or (piece < 0).any() for piece in pieces):
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
    if not is_regular(path):
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
    for name, file in sorted(manifest.output_files.items()):
        if name not in here:
            check_other_file(checkpoint.root, name, file, manifest.digest, report)
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


def check_other_file(
    root: Path, name: str, record: FileRecord, algorithm: str, report: Report
) -> None:
    """A file beside the shards: configuration, tokenizer, code."""
    path = root / name
    if leads_out(path, root, home_of(root)):
        report.add("manifest", name, f"{name} leads out of the directory")
    elif not is_regular(path):
        report.add("manifest", name, f"{name} is missing: the manifest lists it")
    elif (found := digest_file(path, algorithm)) != record.digest:
        if name == "README.md":
            report.unchecked.append("README.md: it was edited since, as a model card may be")
        else:
            report.add(
                "manifest",
                name,
                f"{name} is not what was written: {algorithm} is {found}, expected {record.digest}",
            )


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
