"""Open a model's directory, or a single file, as a Checkpoint: find its files and check them.

quantize, dequantize, inspect and verify all open their checkpoints here, those that nf4 wrote as
well.  Nothing is unpickled, and no code of the checkpoint is run.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from ..errors import InputError
from . import model_files
from .model_files import PICKLES, Code
from .reader import read_shard
from .types import DIFFUSERS_STEM, MODEL_STEM, Checkpoint, Shard, TensorInfo
from .untrusted import (
    INDEX,
    MAX_ALL_TENSORS,
    home_of,
    is_plain,
    is_regular,
    leads_out,
    parse_json,
    read_json,
    read_start,
)

MANIFEST = "nf4_manifest.json"
PIPELINE_RECORD = "nf4_pipeline.json"
CARD = "README.md"
"""The model card.  A user may edit it, so neither manifest nor record lists it."""
REPOSITORYS = (CARD, ".gitattributes", ".gitignore")
"""Files that belong to a repository and not to the model; an output gets its own."""
IMPORTANCE = "nf4_importance.dat"
"""The importance file in an output whose scales were chosen with one.  It is not called
.safetensors, since some loaders would then take it for weights."""
_OURS = (MANIFEST, PIPELINE_RECORD, IMPORTANCE)

WEIGHTS_KEY = "transformers_weights"
"""The key of config.json that names the weight file, or the index, which transformers loads."""

# Formats that may hold the same weights again, or a pickle, which nf4 never reads: not copied.
_WEIGHT_FORMATS = (
    "*.safetensors", "*.bin", "*.pth", "*.pt", "*.ckpt", "*.gguf", "*.ggml", "*.h5", "*.msgpack",
    "*.onnx", "*.onnx_data", "*.onnx.data", "*.tflite", "*.ot", "*.npz", "*.pkl", "*.mlmodel",
    "*.index.json", "*.index.*.json",
)  # fmt: skip
_LONGEST_CODE = 2_000_000  # bytes of a module that are looked through; published ones have 200,000
LEFT_DIRECTORIES = (".git", ".cache", "__pycache__", ".ipynb_checkpoints")
"""Directories that are not part of a model."""
_NUMBERED = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors")
_VARIANT = re.compile(
    rf"({MODEL_STEM}|{DIFFUSERS_STEM})(?:\.[\w-]+?)?(-\d{{5}}-of-\d{{5}})?(?:\.[\w-]+)?\.safetensors"
)
"""Matches model.safetensors, model.fp16.safetensors, model.fp16-00001-of-00002.safetensors, and
model-00001-of-00002.fp16.safetensors, which earlier versions of diffusers wrote."""
_COMPUTED = re.compile(
    r"(^|\.)(inv_freq|\w*position_ids|token_type_ids|masked_bias|num_batches_tracked|"
    r"(attn|attention)\.bias|(cos|sin)_cached|causal_mask)$"
)
"""Matches buffers that models compute and earlier versions of them stored."""
_TO_MERGE = {
    "adapter_config.json": " It is a PEFT adapter: merge it into its base model first, with PEFT's "
    "merge_and_unload(), and give the merged model",
    "__0_0.distcp": " It is a distributed checkpoint of PyTorch: merge it first, with `accelerate "
    "merge-weights DIRECTORY OUT`",
    "zero_to_fp32.py": " DeepSpeed has split it over devices: merge it first, with `python "
    "zero_to_fp32.py . OUT --safe_serialization` in that directory",
}
"""A file of a directory that holds parts of a model -> how to make a model of them."""
_PIECE = re.compile(
    r".*?(?:^|[._-])(?:mp_|tp_|pp_|ep_)?(?:rank|tp|pp|ep|mp)[_-]?\d+.*|consolidated\.\d+",
    re.IGNORECASE,
)
"""Matches the stem of a file that holds one device's piece of a model."""
_INDEX = re.compile(r".+\.safetensors(\.[\w-]+)?\.index(\.[\w-]+)?\.json")


def require_output(path: Path) -> None:
    """Raise InputError if a path is no directory, so that it is no output either."""
    if not path.is_dir():
        raise InputError(f"{path} is no directory: give one that nf4 quantize wrote")


def open_checkpoint(path: Path) -> Checkpoint:
    """Find the shards, read every header, check the index, and list the other files.

    Args:
        path: a model's directory, or a .safetensors file; a config.json beside it is used.

    Raises:
        InputError: it is not a checkpoint, or it is damaged or contradicts itself.
    """
    if path.is_dir():
        root, name = path, name_of_directory(path)
        index, files = find_shards(root)
        if all(file.name.startswith("adapter_model") for file in files):
            raise InputError(_not_a_checkpoint(root, "it has no model", root.iterdir()))
    elif is_regular(path):
        root, name, index = path.parent, path.stem, None
        if path.suffix != ".safetensors":
            raise InputError(
                _not_a_checkpoint(path, f"{path.name} is no .safetensors file", [path])
            )
        beside = [file for file in root.glob("*.safetensors") if is_regular(file)]
        if _PIECE.fullmatch(path.stem):
            _refuse_pieces(beside)
        files = [path]
    else:
        what = "is no regular file" if os.path.lexists(path) else "does not exist"
        raise InputError(
            f"{path} {what}: give a model directory, a .safetensors file, or org/name of a model "
            "on the Hub"
        )
    shards = tuple(read_shard(file) for file in files)
    tensors = _merge(shards)
    if not tensors:
        raise InputError(f"{path} holds no tensor: {', '.join(s.path.name for s in shards)}")
    errors = () if index is None else _index_errors(root / index, shards, tensors)
    config = _config(root, "config.json", files)
    params = {} if config else _config(root, "params.json", files)
    if path.is_dir():
        extra, left = other_files(root, files, index)
    else:
        extra, left = _companions_of_file(root, files) if config else (), ()
    return Checkpoint(
        root, name, shards, tensors, config, not path.is_dir(), extra, left,
        params=params, index_errors=errors,
    )  # fmt: skip


def name_of_directory(root: Path) -> str:
    """Return the name of the model in a directory.

    It is the directory's name.  In the Hub's cache, models--ORG--NAME/snapshots/COMMIT, it is NAME.
    """
    root = root.resolve()
    if root.parent.name == "snapshots" and root.parent.parent.name.startswith("models--"):
        return root.parent.parent.name.rpartition("--")[2]
    return root.name


def _config(root: Path, name: str, files: Iterable[Path]) -> dict[str, Any]:
    """Return the content of a configuration file of a model, {} if there is none.

    Raises:
        InputError: it is damaged, or a link to a file that is not part of the model.  The output's
            own is made from it, and would publish that file.
    """
    path = root / name
    if not os.path.lexists(path):
        return {}
    if path.is_symlink() and leads_out(path, root, home_of(root, files)):
        raise InputError(
            f"{path} is a link to {path.readlink()}, which is not beside the model's weights: "
            "copy the file itself there"
        )
    return read_json(path)


def find_shards(root: Path) -> tuple[str | None, list[Path]]:
    """Find the shards of a model, in the same order of preference as loaders.

    What config.json names (`transformers_weights`) comes first.  Files of a variant
    (model.fp16.safetensors) are used if there are no others.

    Returns:
        (name of the index, or None; paths of the shards, in the order of their names).

    Raises:
        InputError: there are no shards, one is missing, or they cannot be told from other files.
    """
    named = _named_weights(root)
    if named is not None:
        return (named.name, _indexed_files(named)) if named.suffix == ".json" else (None, [named])
    files = sorted(p for p in root.iterdir() if p.suffix == ".safetensors" and is_regular(p))
    for stem in (MODEL_STEM, DIFFUSERS_STEM):
        single, index = root / shard_name(stem, 0, 1), root / index_name(stem)
        if is_regular(single):
            return None, [single]
        if is_regular(index):
            return index.name, _indexed_files(index)
    indexes = sorted(p for p in root.glob("*.json") if _INDEX.fullmatch(p.name))
    if len(indexes) == 1:
        return indexes[0].name, _indexed_files(indexes[0])
    if len(indexes) > 1:
        names = ", ".join(p.name for p in indexes)
        raise InputError(
            f"{root} has several indexes ({names}): give one .safetensors file instead"
        )
    if not files:
        why = "it has no .safetensors file"
        raise InputError(_not_a_checkpoint(root, why, root.iterdir()))
    matches = [_NUMBERED.fullmatch(p.name) for p in files]
    stems = {(m["stem"], m["count"]) for m in matches if m}
    if all(matches) and len(stems) == 1:
        count = int(next(iter(stems))[1])
        numbers = {int(m["number"]) for m in matches if m}
        missing = sorted(set(range(1, count + 1)) - numbers)
        if missing:
            raise InputError(
                f"{root} has {len(files)} of {count} shards; missing: "
                f"{', '.join(f'{n:05d}' for n in missing[:5])}. Download them again"
            )
        return None, files
    if len(files) == 1:
        return None, files
    _refuse_pieces(files)
    raise InputError(
        f"{root} has {len(files)} .safetensors files and no index that says which belong "
        f"together: {', '.join(p.name for p in files[:6])}. Give one file instead of the directory"
    )


def _refuse_pieces(files: Collection[Path]) -> None:
    """Raise InputError if files are the pieces of a model that was split over several devices.

    Each piece has a part of every weight, so none of them is a model.
    """
    pieces = [file for file in files if _PIECE.fullmatch(file.stem)]
    if len(pieces) > 1:
        raise InputError(
            f"{pieces[0].parent} has pieces of a model that was split over {len(pieces)} devices "
            f"({', '.join(p.name for p in pieces[:4])}), each with a part of every weight: have "
            "the program that wrote them save a whole model, and give that"
        )


def _named_weights(root: Path) -> Path | None:
    """Return the weight file or the index that config.json names, None if it names none.

    transformers loads this one, whatever else lies beside it.

    Raises:
        InputError: it is missing, or is neither of the two; see `_config`.
    """
    path = root / "config.json"
    name = _config(root, path.name, root.glob("*.safetensors")).get(WEIGHTS_KEY)
    if name is None:
        return None
    says = f"{path} says that the weights are in {str(name)[:200]!r} ({WEIGHTS_KEY})"
    if not isinstance(name, str) or not name.endswith((".safetensors", ".safetensors.index.json")):
        raise InputError(
            f"{says}, but transformers loads a .safetensors file or a .safetensors.index.json: "
            f"name one, or remove {WEIGHTS_KEY}"
        )
    if not is_plain(name) or not is_regular(root / name):
        there = ", ".join(sorted(p.name for p in root.glob("*.safetensors*"))[:6]) or "none"
        raise InputError(
            f"{says}, but there is no such file beside it (weight files there: {there}): download "
            f"it, or remove {WEIGHTS_KEY} if another file is the model"
        )
    return root / name


def weights_note(checkpoint: Checkpoint) -> list[str]:
    """Return a note about the weight files that config.json passes over, in a list; [] for none."""
    name = checkpoint.config.get(WEIGHTS_KEY)
    if name is None or checkpoint.is_file:
        return []
    others = [
        file
        for file in checkpoint.left_files
        if file.endswith((".safetensors", ".safetensors.index.json")) and "/" not in file
    ]
    also = f"; left, as transformers does not load it: {', '.join(others[:5])}" if others else ""
    return [
        f"the weights are those of {name}, which config.json names ({WEIGHTS_KEY}){also}. The "
        "output's config.json has no such key, because its files have the usual names"
    ]


def shard_name(stem: str, number: int, count: int) -> str:
    """Return the file name of a shard.

    Args:
        stem: see `Checkpoint.stem`.
        number: which shard it is, from 0.
        count: shards in total.
    """
    part = f"-{number + 1:05d}-of-{count:05d}" if count > 1 else ""
    return f"{stem}{part}.safetensors"


def index_name(stem: str) -> str:
    """Return the file name of the index of several shards; stem: see `Checkpoint.stem`."""
    return f"{stem}.safetensors.index.json"


def plain_name(name: str) -> str:
    """Return a weight file's name without its variant: model.safetensors of model.fp16.safetensors.

    A name without a variant is returned as it is.
    """
    match = _VARIANT.fullmatch(name)
    return f"{match[1]}{match[2] or ''}.safetensors" if match else name


def plain_index(name: str) -> str:
    """Return the name of the index that lists a weight file, without a variant."""
    match = _VARIANT.fullmatch(name)
    return index_name(match[1] if match else MODEL_STEM)


def is_left(directory: str) -> bool:
    """Return whether a directory, by its name, is not part of a model: a cache, or a workspace."""
    workspace = directory.startswith(".") and directory.endswith(".partial")
    return workspace or directory in LEFT_DIRECTORIES


def is_weight_file(name: str) -> bool:
    """Return whether a file, by its name, holds weights or an index of them, in any format."""
    return any(fnmatch(name, pattern) for pattern in _WEIGHT_FORMATS)


def shard_count(name: str) -> int:
    """Return the number of shards that a file name states (model-00001-of-00003.safetensors).

    It is 1 for a name without such a number.
    """
    match = _NUMBERED.fullmatch(name)
    return int(match["count"]) if match else 1


def _not_a_checkpoint(path: Path, why: str, files: Iterable[Path]) -> str:
    """Return the message for a path that is no checkpoint, with advice that fits the files there.

    Args:
        why: the reason, as a clause.
        files: what there is in the directory, or the file itself.
    """
    names = sorted(p.name for p in files)
    message = f"{path} is not a safetensors checkpoint: {why}."
    advice = next((text for name, text in _TO_MERGE.items() if name in names), None)
    if advice is not None:
        return message + advice
    if any(fnmatch(n, pattern) for n in names for pattern in PICKLES):
        diffusers = any(n.startswith(DIFFUSERS_STEM) for n in names)
        library, dtype = ("diffusers", "") if diffusers else ("transformers", ", dtype='auto'")
        directory = path if path.is_dir() else path.parent
        return (
            message
            + " It has pickled weights, which nf4 never opens because unpickling runs code. "
            f'If you trust them, convert them once: python -c "from {library} import AutoModel; '
            f"AutoModel.from_pretrained('{directory}'{dtype})"
            ".save_pretrained('OUT')\" (with your model's Auto class)"
        )
    if path.is_dir() and (inside := _modules_with_weights(path)):
        return message + (
            f" modules.json says that the model is in {inside[0]}: convert that directory, "
            f"{path / inside[0]}, to OUT/{inside[0]}, and copy the other files beside it"
        )
    if any(n.endswith(".gguf") for n in names):
        return message + (
            " It has a GGUF file, which is quantized already: start from the original checkpoint"
        )
    return message + " Expected model.safetensors, or model.safetensors.index.json and its shards"


def _indexed_files(index: Path) -> list[Path]:
    """Return the files that an index names, sorted.

    Raises:
        InputError: the index is damaged, or names a file that is missing or not beside it.
    """
    weight_map = _weight_map(index)
    files = []
    for name in sorted(set(weight_map.values())):
        if not is_plain(name):
            raise InputError(
                f"{index}: the file name {name!r} leads out of the directory; "
                "expected plain names of files beside the index"
            )
        path = index.parent / name
        if not is_regular(path):
            tensors = [t for t, f in weight_map.items() if f == name]
            what = "is no regular file" if os.path.lexists(path) else "does not exist"
            raise InputError(
                f"{index} names {name} (for {len(tensors)} tensors, first {tensors[0]!r}), which "
                f"{what}: download it again"
            )
        files.append(path)
    return files


def _weight_map(index: Path) -> dict[str, str]:
    """Return tensor name -> file name, from an index.

    Raises:
        InputError: the index is damaged.
    """
    weight_map = read_json(index, INDEX).get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(v, str) for v in weight_map.values())
    ):
        raise InputError(f'{index} has no "weight_map" of tensor names to file names')
    return weight_map


def _index_errors(
    index: Path, shards: Iterable[Shard], tensors: Mapping[str, tuple[Shard, TensorInfo]]
) -> tuple[str, ...]:
    """Return how an index differs from its shards without harm, one clause for each kind.

    Loaders take from it which files there are, and read all tensors of these.  So an entry with
    another file does no harm, nor a missing entry, nor one for a buffer that models compute.

    Raises:
        InputError: the index lists a weight that no shard has.
    """
    weight_map = _weight_map(index)
    missing = [name for name in weight_map if name not in tensors]
    lost = next((name for name in missing if not _COMPUTED.search(name)), None)
    if lost is not None:
        raise InputError(
            f"{index} says that {weight_map[lost]} holds {lost!r}, but neither its header nor "
            "another shard's lists it: index and shard are of different versions. Download both "
            "again"
        )
    unlisted = [name for name in tensors if name not in weight_map]
    moved = [
        name
        for name, file in weight_map.items()
        if name in tensors and tensors[name][0].path.name != file
    ]
    kinds = (
        (missing, "{} buffers that no shard has, such as {!r}, which models compute themselves"),
        (unlisted, "no entry for {} tensors of its shards, such as {!r}"),
        (moved, "another file for {} tensors than the one that has them, such as {!r}"),
    )
    return tuple(
        f"{index.name} has {text.format(f'{len(names):,}', names[0])}"
        for names, text in kinds
        if names
    )


def _merge(shards: Iterable[Shard]) -> Mapping[str, tuple[Shard, TensorInfo]]:
    """Return tensor name -> (its shard, the tensor), of all shards.

    Raises:
        InputError: there are too many tensors, or two of the same name.
    """
    tensors: dict[str, tuple[Shard, TensorInfo]] = {}
    for shard in shards:
        if len(tensors) + len(shard.tensors) > MAX_ALL_TENSORS:
            raise InputError(
                f"{shard.path.parent} holds more than {MAX_ALL_TENSORS:,} tensors: no model does"
            )
        for tensor in shard.tensors:
            if tensor.name in tensors:
                other = tensors[tensor.name][0].path.name
                raise InputError(
                    f"tensor {tensor.name!r} is in two shards, {other} and {shard.path.name}: "
                    "remove the stale one"
                )
            tensors[tensor.name] = (shard, tensor)
    return tensors


def other_files(
    root: Path, shards: Iterable[Path], index: str | None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """List the files of a model's directory beside its shards.

    Copied are the files that a model is made of (model_files.py), the code that it names, the
    modules of sentence-transformers, and parts: safetensors files with other weights than the
    model's own.  Links that lead out of the model are not, nor is what is no regular file.

    Returns:
        (files to copy, files not to copy), relative to root, sorted.
    """
    shards = tuple(shards)
    names, left = _walk(
        root, {index, *_OURS, *(path.name for path in shards)}, home_of(root, shards)
    )
    modules = {p.relative_to(root).as_posix() for p in sentence_transformers_modules(root)}
    is_part = _part_test(root, shards)
    code = _code_of(root, names)
    extra: list[str] = []
    for name in names:
        if name in REPOSITORYS or model_files.never_kind(name):
            copied = False
        elif is_weight_file(name.rpartition("/")[2]):
            of_module = name.endswith(".safetensors") and name.rpartition("/")[0] in modules
            copied = of_module or model_files.is_decoder(name) or is_part(name)
        else:
            of_module = any(name.startswith(f"{module}/") for module in modules)
            copied = of_module or model_files.is_of_model(name) or code.takes(name)
        (extra if copied else left).append(name)
    return tuple(sorted(extra)), tuple(sorted(left))


def _walk(
    root: Path, ours: Collection[str | None], home: frozenset[Path]
) -> tuple[list[str], list[str]]:
    """Return the files below a model's directory that may be copied, and those that may not.

    Args:
        ours: names of shards and of what a run writes itself, in neither list.
        home: see `home_of`.
    """
    names: list[str] = []
    left: list[str] = []
    for directory, subdirectories, files in os.walk(root):
        links = [d for d in subdirectories if (Path(directory) / d).is_symlink()]
        left += [(Path(directory) / d).relative_to(root).as_posix() for d in links]
        subdirectories[:] = sorted(d for d in subdirectories if not is_left(d) and d not in links)
        for file in files:
            path = Path(directory) / file
            name = path.relative_to(root).as_posix()
            if name in ours:
                continue
            good = is_regular(path) and not _is_foreign(path, root, home)
            (names if good else left).append(name)
    return names, left


def _part_test(root: Path, shards: tuple[Path, ...]) -> Callable[[str], bool]:
    """Return a function that tells whether a safetensors file is a part beside the model.

    A file that has the model's own weights once more is none, nor is one that cannot be read.
    """
    model: dict[str, object] = {}

    def is_part(name: str) -> bool:
        if not shards or not model_files.may_be_part(name):
            return False
        with suppress(InputError):
            if not model:
                model.update({t.name: t.shape for s in map(read_shard, shards) for t in s.tensors})
            part = {t.name: t.shape for t in read_shard(root / name).tensors}
            return bool(part) and not model_files.repeats(name, part, model)
        return False

    return is_part


def _code_of(root: Path, names: Iterable[str]) -> Code:
    """Return the custom code of a model: all its modules, if a configuration names any of them."""
    names = [name for name in names if not model_files.never_kind(name)]
    configs = [name for name in names if "/" not in name and name.endswith("config.json")]
    if not any(model_files.has_code(_readable_json(root / name)) for name in configs) and not any(
        name in ("modules.json", "model_index.json") for name in names
    ):
        return Code.of(())
    texts = []
    for name in names:
        if name.endswith(".py"):
            with suppress(InputError, OSError):
                texts.append(read_start(root / name, _LONGEST_CODE)[0].decode("utf-8", "replace"))
    return Code.of(texts)


def _readable_json(path: Path) -> Mapping[str, Any]:
    """Return a JSON file's content; {} if it cannot be read, which whoever needs it reports."""
    with suppress(InputError, OSError):
        return read_json(path)
    return {}


def with_copies(checkpoint: Checkpoint, patterns: Collection[str]) -> Checkpoint:
    """Return a checkpoint whose output also copies the files that match patterns of --copy.

    Raises:
        UsageError: a pattern matches nothing, or a file that cannot be copied.
    """
    if not patterns:
        return checkpoint
    names = set(checkpoint.left_files)
    if checkpoint.is_file:
        shards = [shard.path for shard in checkpoint.shards]
        names.update(*other_files(checkpoint.root, shards, None))
    names.update(checkpoint.extra_files)
    root = checkpoint.root
    chosen = model_files.chosen_files(patterns, names, str(root), why_not_copied(root))
    return checkpoint.with_extra(chosen)


def why_not_copied(root: Path) -> Callable[[str], str]:
    """Return a function that says why --copy cannot take a file, by its name; "" if it can."""
    home = home_of(root)

    def why(name: str) -> str:
        path = root / name
        if name in (*REPOSITORYS, *_OURS):
            return "an output has its own"
        if model_files.is_adapter(name):
            return "loaders would apply the adapter to the model once more"
        if "/" not in name and is_weight_file(name) and model_files.is_same_weights(name):
            return "loaders could take it for the model's weights"
        if os.path.lexists(path) and (not is_regular(path) or _is_foreign(path, root, home)):
            return "it is a link that leads out of the model, or no regular file"
        return ""

    return why


def _is_foreign(path: Path, root: Path, home: frozenset[Path]) -> bool:
    return path.is_symlink() and leads_out(path, root, home)


def _companions_of_file(root: Path, files: list[Path]) -> tuple[str, ...]:
    """Return the files that belong to a model of a single file, relative to root, sorted.

    They are recognised by their names, since the directory may hold anything else as well.
    """
    home = home_of(root, files)
    names = [p.name for p in root.iterdir() if is_regular(p) and not _is_foreign(p, root, home)]
    code = _code_of(root, names)
    return tuple(
        sorted(
            name
            for name in names
            if not is_weight_file(name)
            and name not in (*REPOSITORYS, *_OURS)
            and (model_files.is_of_model(name) or code.takes(name))
        )
    )


def sentence_transformers_modules(root: Path) -> set[Path]:
    """Return the subdirectories that the modules.json of sentence-transformers names.

    Their small weights (as in 2_Dense) belong to the model.
    """
    try:
        data, *_ = read_start(root / "modules.json", 1_000_000)
        # The file is a list.
        modules = parse_json(b'{"modules":' + data + b"}", "modules.json")["modules"]
        paths = {str(module["path"]) for module in modules}
    except (InputError, OSError, TypeError, KeyError):
        return set()
    return {root / path for path in paths if path}


def _modules_with_weights(root: Path) -> list[str]:
    """Return the subdirectories with safetensors files that modules.json names, sorted."""
    return sorted(
        directory.relative_to(root).as_posix()
        for directory in sentence_transformers_modules(root)
        if any(directory.glob("*.safetensors"))
    )
