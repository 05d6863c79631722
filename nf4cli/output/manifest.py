"""Write and read the manifest, `nf4_manifest.json`: what was done, to what, with which result.

docs/manifest.md describes the format, docs/manifest.schema.json is its JSON Schema.  A manifest
depends only on the source's bytes, the recipe and the tool's version: two runs on two machines with
two engines write the same one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from json.encoder import encode_basestring_ascii as _quoted
from math import isfinite
from pathlib import Path
from typing import Any

from ..checkpoint.bnb_format import QuantState, decode_state, encode_state, is_offset
from ..checkpoint.digest import ALGORITHMS, TENSOR_ALGORITHM
from ..checkpoint.types import FileDigests
from ..checkpoint.untrusted import RECORD, read_json
from ..errors import InputError
from ..format.config import BLOCKSIZES, AdapterRecord, ModuleFormat, QuantConfig
from ..planning.plan import Plan, TensorPlan
from ..version import __version__


@dataclass(frozen=True, slots=True)
class TensorError:
    """The error of rounding a weight to 4 bits.

    It is measured under each block's own float32 absmax, or under the scale as it will be decoded
    where scales were chosen.  Double quantization then moves a float32 absmax by a few thousandths
    of itself, which is not in these figures.

    Attributes:
        rel_rmse: root of (sum of squared error / sum of squared value).
        max_abs: largest error of one element.
        blocks: number of blocks; None where a manifest does not say.
        outlier_blocks: number of blocks whose absmax is above 10 times the root mean square of
            their other elements, which then have few codes left; None where a manifest does not
            say.
        worst_block: for codes that error feedback chose, the largest root mean square error of a
            block, in units of its scale; None where the codes are the nearest.
    """

    rel_rmse: float
    max_abs: float
    blocks: int | None = None
    outlier_blocks: int | None = None
    worst_block: float | None = None

    @property
    def outlier_share(self) -> float:
        """Share of outlier blocks among all, from 0 to 1; 0 where it is not known."""
        return (self.outlier_blocks or 0) / max(1, self.blocks or 0)

    def as_dict(self) -> dict[str, float | int]:
        """Return the figures that are known, by name."""
        return {name: value for name, value in _fields(self).items() if value is not None}


@dataclass(frozen=True, slots=True)
class Result:
    """What is known of a weight of the output once all of its bytes are written.

    Attributes:
        nested_offset: of its quantization state, None where there is no nested state.
        error: of rounding, None for a weight that is not quantized.
        sources: stored tensor that it was made from -> XXH3-128 of its bytes, as far as known.
    """

    nested_offset: float | None
    error: TensorError | None
    sources: Mapping[str, str]


VERSION = 1
"""Version of the format.  A reader refuses any other."""

ACTIONS = ("quantize", "cast", "copy", "drop")


@dataclass(frozen=True, slots=True)
class FileRecord:
    """Size and digest of a file.

    Attributes:
        size: bytes.
        digest: hexadecimal, in the manifest's algorithm.
    """

    size: int
    digest: str


@dataclass(frozen=True, slots=True)
class SourceRecord:
    """A stored tensor that a part of a weight was made from.

    Attributes:
        tensor: its name.
        file: name of the source shard that holds it.
        dtype, shape: as stored.
        digest: XXH3-128 of its bytes.
    """

    tensor: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    digest: str

    def as_dict(self) -> dict[str, Any]:
        """Return the entry in the document."""
        return {**_fields(self), "shape": list(self.shape)}


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """One weight of the output, or a source tensor that nothing was written for.

    Attributes:
        action: one of ACTIONS.
        rule, reason: the selection rule that decided, by name and in words (selection.py).
        transposed: whether the transpose of the stored matrix is written.
        source_tensor: the stored tensor that it was made from.  Several weights may be made of one.
        source_file: name of the source shard that holds `source_tensor`.
        source_dtype, source_shape: of `source_tensor`, as stored.
        source_digest: XXH3-128 of the bytes of `source_tensor`.
        output_file: name of the output shard; "" where nothing was written.
        outputs: key -> XXH3-128 of its bytes, for every tensor written for the weight.
        state, error: quantization state and error of rounding, None unless quantized.
        parts: of a stack of experts, the stored tensors that it was made from, in its order; else
            ().  `source_tensor` and so on are those of the first.
    """

    action: str
    rule: str
    reason: str
    transposed: bool
    source_tensor: str
    source_file: str
    source_dtype: str
    source_shape: tuple[int, ...]
    source_digest: str
    output_file: str
    outputs: Mapping[str, str]
    state: QuantState | None
    error: TensorError | None
    parts: tuple[SourceRecord, ...] = ()


@dataclass(frozen=True, slots=True)
class Manifest:
    """The content of a manifest.  `from_file` reads what `to_json` wrote.

    Attributes:
        config: the recipe, with every "auto" resolved.
        digest: algorithm of the digests of files.
        source_name: what the user called the source.
        source_files: name -> record of every source shard.
        output_files: name in the output -> record of every file but manifest and model card.
        tensors: name -> record of every weight, and of the source tensors left out.
        parameters: elements of all floating-point weights.
        quantized_parameters: elements of the weights in 4 bit.
        bits_per_weight: bits of all output tensors divided by `parameters`.
        source_repo, source_commit: where on a Hub the source comes from, None for a local one.
        tool_version: version of the nf4cli that wrote the manifest.
    """

    config: QuantConfig
    digest: str
    source_name: str
    source_files: Mapping[str, FileRecord]
    output_files: Mapping[str, FileRecord]
    tensors: Mapping[str, TensorRecord]
    parameters: int
    quantized_parameters: int
    bits_per_weight: float
    source_repo: str | None = None
    source_commit: str | None = None
    tool_version: str = __version__

    def to_json(self) -> str:
        """Return the text of the file: indented, and sorted where order has no meaning."""
        return "".join(self.pieces())

    def pieces(self) -> Iterator[str]:
        """Yield the text of the file, an entry of a tensor at a time: there may be 200,000."""
        beginning = indented({**self._without_tensors(), "tensors": {}})
        yield beginning.removesuffix("{}\n}")
        before = "{"
        for name in sorted(self.tensors):
            entry = indented(_tensor_dict(name, self.tensors[name]), "\n  ")
            yield f"{before}\n  {_quoted(name)}: {entry}"
            before = ","
        yield "\n }\n}\n" if self.tensors else "{}\n}\n"

    def to_dict(self) -> dict[str, Any]:
        """Return the document as docs/manifest.md describes it."""
        entries = {name: _tensor_dict(name, self.tensors[name]) for name in sorted(self.tensors)}
        return {**self._without_tensors(), "tensors": entries}

    def _without_tensors(self) -> dict[str, Any]:
        """Return the document without the entries of its tensors."""

        def file_list(records: Mapping[str, FileRecord]) -> list[dict[str, Any]]:
            return [{"name": name, **_fields(records[name])} for name in sorted(records)]

        return {
            "nf4_manifest": VERSION,
            "tool": {"name": "nf4cli", "version": self.tool_version},
            "digests": {"files": self.digest, "tensors": TENSOR_ALGORITHM},
            "recipe": self.config.as_dict(),
            "source": {
                "name": self.source_name,
                **_without_none({"repo": self.source_repo, "commit": self.source_commit}),
                "files": file_list(self.source_files),
            },
            "output": {
                "files": file_list(self.output_files),
                "parameters": self.parameters,
                "quantized_parameters": self.quantized_parameters,
                "bits_per_weight": round(self.bits_per_weight, 4),
            },
        }

    @staticmethod
    def from_file(path: Path) -> Manifest:
        """Read a manifest.

        Raises:
            InputError: it is no manifest, is damaged, or has another version of the format.
        """
        document = read_json(path, RECORD)
        version = document.get("nf4_manifest")
        if version != VERSION:
            raise InputError(
                f"{path} has manifest format {version!r}; this version of nf4 reads {VERSION}"
                + (": install a newer nf4cli" if type(version) is int and version > VERSION else "")
            )
        try:
            return _manifest_of(document)
        except (
            KeyError, TypeError, ValueError, AttributeError, OverflowError, InputError
        ) as error:  # fmt: skip
            raise InputError(
                f"{path} is damaged ({type(error).__name__}: {str(error)[:500]}): it was "
                "edited by hand, or is incomplete. Quantize again, or remove it to check the files "
                "without it"
            ) from error


def _fields(record: Any) -> dict[str, Any]:
    """Return the fields of a record by name, as they are: `asdict` would copy each."""
    return {name: getattr(record, name) for name in record.__slots__}


def indented(value: Any, line: str = "\n") -> str:
    """Return a JSON document as `json.dumps(value, indent=1)` does, in a fifth of the time.

    Args:
        line: the end of a line, with the spaces that the next one begins with.
    """
    inner = line + " "
    if isinstance(value, dict) and value:
        members = [f"{_quoted(key)}: {indented(item, inner)}" for key, item in value.items()]
        return f"{{{inner}{f',{inner}'.join(members)}{line}}}"
    if isinstance(value, (list, tuple)) and value:
        return f"[{inner}{f',{inner}'.join([indented(item, inner) for item in value])}{line}]"
    if type(value) is str:
        return _quoted(value)
    return str(value) if type(value) is int else json.dumps(value)


def _without_none(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def _tensor_dict(name: str, record: TensorRecord) -> dict[str, Any]:
    """Return a tensor's entry in the document.  What is absent or false is left out."""
    fields: dict[str, Any] = {
        "action": record.action,
        "rule": record.rule,
        "reason": record.reason,
        "source": {
            "file": record.source_file,
            "dtype": record.source_dtype,
            "shape": list(record.source_shape),
            "digest": record.source_digest,
        },
    }
    if record.parts:
        del fields["source"]
        fields["sources"] = [part.as_dict() for part in record.parts]
    elif record.source_tensor != name:
        fields["source"]["tensor"] = record.source_tensor
    if record.outputs:
        fields["output"] = {
            "file": record.output_file,
            "digests": dict(sorted(record.outputs.items())),
        }
    if record.transposed:
        fields["transposed"] = True
    if record.state is not None:
        fields["quant_state"] = {**_fields(record.state), "shape": list(record.state.shape)}
    if record.error is not None:
        fields["error"] = record.error.as_dict()
    return fields


def _manifest_of(document: Mapping[str, Any]) -> Manifest:
    """Return the content of a document.

    Raises:
        KeyError, TypeError, ValueError, AttributeError, OverflowError, InputError: a field is
            missing, or is not what it has to be.
    """
    if document["digests"]["files"] not in ALGORITHMS:
        raise ValueError(f"digest algorithm {document['digests']['files']!r}")
    for name, value in document["recipe"].items():
        lists = ("keep", "adapters", "formats")
        expected = list if name in lists else type(getattr(QuantConfig(), name))
        if type(value) is not expected:
            raise TypeError(f"recipe.{name} is {value!r}")
    if not all(isinstance(pattern, str) for pattern in document["recipe"]["keep"]):
        raise TypeError("recipe.keep holds something else than strings")
    return Manifest(
        config=_recipe(document["recipe"]),
        digest=document["digests"]["files"],
        source_name=_string(document["source"]["name"]),
        source_files=_file_records(document["source"]["files"]),
        output_files=_file_records(document["output"]["files"]),
        tensors={
            name: _tensor_record(name, fields) for name, fields in document["tensors"].items()
        },
        parameters=_count(document["output"]["parameters"]),
        quantized_parameters=_count(document["output"]["quantized_parameters"]),
        bits_per_weight=_number(document["output"]["bits_per_weight"]),
        source_repo=_optional(document["source"].get("repo")),
        source_commit=_optional(document["source"].get("commit")),
        tool_version=_string(document["tool"]["version"]),
    )


def _recipe(fields: Mapping[str, Any]) -> QuantConfig:
    """Return the recipe; what a manifest does not name is as in the versions before it."""
    before = {"expert_layout": "", "shard_cuts": ""}
    lists = {
        "keep": tuple(fields["keep"]),
        "formats": tuple(map(_module_format, fields.get("formats", ()))),
        "adapters": tuple(map(_adapter, fields.get("adapters", ()))),
    }
    return QuantConfig(**{**before, **fields, **lists})


def _module_format(fields: Mapping[str, Any]) -> ModuleFormat:
    if type(fields["double_quant"]) is not bool or fields["blocksize"] not in BLOCKSIZES:
        raise TypeError(f"recipe.formats has {fields['blocksize']!r}, {fields['double_quant']!r}")
    modules = tuple(map(_string, fields["modules"]))
    return ModuleFormat(fields["blocksize"], fields["double_quant"], modules)


def _adapter(fields: Mapping[str, Any]) -> AdapterRecord:
    """Return what a manifest says of an adapter."""
    texts = {name: _string(value) for name, value in fields.items() if name != "scale"}
    return AdapterRecord(**texts, scale=_number(fields["scale"]))


def _file_records(files: list[dict[str, Any]]) -> dict[str, FileRecord]:
    return {
        _string(file["name"]): FileRecord(_count(file["size"]), _string(file["digest"]))
        for file in files
    }


def _string(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{str(value)[:100]!r} where a string belongs")
    return value


def _optional(value: object) -> str | None:
    return None if value is None else _string(value)


def _count(value: object) -> int:
    if type(value) is not int or value < 0:
        raise TypeError(f"{str(value)[:100]!r} where a number of something belongs")
    return value


def _number(value: object) -> float:
    if type(value) not in (int, float) or not isfinite(float(str(value))):
        raise TypeError(f"{str(value)[:100]!r} where a number belongs")
    return float(str(value))


def _tensor_record(name: str, fields: dict[str, Any]) -> TensorRecord:
    state, error = fields.get("quant_state"), fields.get("error")
    parts = tuple(_source_record(source) for source in fields.get("sources", ()))
    source = fields["sources"][0] if parts else fields["source"]
    if fields["action"] not in ACTIONS:
        raise ValueError(f"the action {fields['action']!r} of {name}")
    if fields["action"] == "drop":
        output: dict[str, Any] = {"file": "", "digests": {}}
    else:
        output = fields["output"]
        if not output["digests"]:
            raise ValueError(f"no digest of {name}")
    return TensorRecord(
        action=_string(fields["action"]),
        rule=_string(fields["rule"]),
        reason=_string(fields["reason"]),
        transposed=fields.get("transposed", False) is True,
        source_tensor=_string(source.get("tensor", name)),
        source_file=_string(source["file"]),
        source_dtype=_string(source["dtype"]),
        source_shape=tuple(map(_count, source["shape"])),
        source_digest=_string(source["digest"]),
        output_file=_string(output["file"]),
        outputs={key: _string(digest) for key, digest in output["digests"].items()},
        state=None if state is None else _state(name, state),
        error=None if error is None else _error(error),
        parts=parts,
    )


def _source_record(fields: dict[str, Any]) -> SourceRecord:
    return SourceRecord(
        tensor=_string(fields["tensor"]),
        file=_string(fields["file"]),
        dtype=_string(fields["dtype"]),
        shape=tuple(map(_count, fields["shape"])),
        digest=_string(fields["digest"]),
    )


def _state(name: str, fields: dict[str, Any]) -> QuantState:
    """Return a quantization state of the manifest; it has to be one that a checkpoint may have."""
    state = QuantState(**{**fields, "shape": tuple(fields["shape"])})
    offset = state.nested_offset
    kind, types = state, {**fields, "nested_offset": None}
    if state.nested and is_offset(offset):
        kind = replace(state, nested_offset=0.0)
    if not _is_possible(kind, str(types)):
        raise ValueError(f"the state of {name} is {state}")
    return state


@lru_cache(1000)
def _is_possible(state: QuantState, types: str) -> bool:
    """Return whether a checkpoint may have such a quantization state; a model has a few of them.

    Args:
        types: its fields in words, since 64 == 64.0.
    """
    return decode_state(encode_state(state), "a state") == state


def _error(fields: dict[str, Any]) -> TensorError:
    counts = {name: fields.get(name) for name in ("blocks", "outlier_blocks")}
    for count in counts.values():
        if count is not None and (type(count) is not int or not 0 <= count < 1 << 63):
            raise ValueError(f"error has {counts}")
    worst = fields.get("worst_block")
    return TensorError(
        _number(fields["rel_rmse"]),
        _number(fields["max_abs"]),
        **counts,
        worst_block=None if worst is None else _number(worst),
    )


_NOTHING = Result(None, None, {})


def manifest_of(
    plan: Plan,
    algorithm: str,
    results: Mapping[str, Result],
    sources: Mapping[str, FileDigests],
    outputs: Mapping[str, str],
) -> Manifest:
    """Return the manifest of a finished conversion, still without the output's files.

    Args:
        algorithm: of the digests of the source files.
        results: weight -> what is known of it.
        sources: name -> digests of every source file and its tensors.
        outputs: key -> digest of every output tensor.
    """
    origin = plan.checkpoint.origin
    digests = {name: digest for file in sources.values() for name, digest in file.tensors.items()}
    return Manifest(
        config=plan.config,
        digest=algorithm,
        source_name=plan.checkpoint.name,
        source_files={
            shard.path.name: FileRecord(shard.size, sources[shard.path.name].digest)
            for shard in plan.checkpoint.shards
        },
        source_repo=origin.repo if origin else None,
        source_commit=origin.commit if origin else None,
        output_files={},
        tensors={
            t.name: TensorRecord(
                action=t.action,
                rule=t.rule,
                reason=t.reason,
                transposed=t.view is not None,
                source_tensor=t.weight.stored.name,
                source_file=t.weight.shard.path.name,
                source_dtype=t.weight.stored.dtype,
                source_shape=t.weight.stored.shape,
                source_digest=digests[t.weight.stored.name],
                output_file=plan.shards[t.file].filename if t.outputs else "",
                outputs={key: outputs.get(key, "") for key in t.outputs},
                state=_planned_state(t, results.get(t.name, _NOTHING)),
                error=results.get(t.name, _NOTHING).error,
                parts=tuple(
                    SourceRecord(
                        tensor=part.stored.name,
                        file=part.shard.path.name,
                        dtype=part.stored.dtype,
                        shape=part.stored.shape,
                        digest=digests[part.stored.name],
                    )
                    for part in t.weight.parts
                ),
            )
            for t in plan.tensors
        },
        parameters=plan.parameters,
        quantized_parameters=plan.quantized_parameters,
        bits_per_weight=plan.bits_per_weight,
    )


def _planned_state(plan: TensorPlan, result: Result) -> QuantState | None:
    """Return the quantization state as it was written, with its nested_offset."""
    if plan.state is None or result.nested_offset is None:
        return plan.state
    return replace(plan.state, nested_offset=result.nested_offset)
