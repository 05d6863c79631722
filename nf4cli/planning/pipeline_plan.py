"""Plan the conversion of a diffusers pipeline: which components become 4-bit, which files are
copied.

A component that is converted is a checkpoint like any other, with its own config.json and manifest.
This module knows the directory around the components.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ..checkpoint import bnb_format, model_files
from ..checkpoint.discovery import (
    MANIFEST,
    PIPELINE_RECORD,
    REPOSITORYS,
    find_shards,
    is_left,
    is_weight_file,
    name_of_directory,
    open_checkpoint,
    other_files,
    plain_index,
    plain_name,
    why_not_copied,
)
from ..checkpoint.types import Checkpoint, Origin
from ..checkpoint.untrusted import INDEX, home_of, is_plain, is_regular, leads_out, read_json
from ..errors import InputError, NothingToQuantizeError, UsageError
from ..format.config import QuantConfig
from .diffusers_rules import converts
from .families import consult
from .make_plan import Oracle, Scan, make_plan, no_scan
from .model_plan import Copies, ModelPlan
from .notes import copies_notes
from .plan import Plan
from .selection import matches, module_path

INDEX_FILE = "model_index.json"


@dataclass(frozen=True, slots=True)
class Component:
    """One entry of model_index.json.

    Attributes:
        name: its key, and its directory.
        library, class_name: its value.
    """

    name: str
    library: str
    class_name: str

    @property
    def converts(self) -> bool:
        """Return whether the component becomes 4-bit."""
        return converts(self.name, self.library, self.class_name)


def is_pipeline(path: Path) -> bool:
    """Return whether a path is a directory with a model_index.json."""
    return is_regular(path / INDEX_FILE)


def components_of(root: Path) -> dict[str, Component]:
    """Return the components of a pipeline, by name.

    Raises:
        InputError: model_index.json is not what diffusers writes, or names a component that has
            no directory of its own in the pipeline.
    """
    path = root / INDEX_FILE
    index = read_json(path)
    if not isinstance(index.get("_class_name"), (str, list)):
        raise InputError(
            f'{path} has no "_class_name": expected the index of a diffusers pipeline. Download '
            "it again"
        )
    components = {}
    for name, value in index.items():
        if name.startswith("_") or not _is_component(value):
            continue
        if not is_plain(name):
            raise InputError(
                f"{path}: the component {name!r} leads out of the directory; expected the plain "
                "name of a directory beside it"
            )
        if not _is_own_directory(root, name):
            raise InputError(
                f"{path} names the component {name} ({value[1]}), but {root / name} is no "
                "directory of its own: download it again, or set the entry to [null, null]"
            )
        components[name] = Component(name, value[0], value[1])
    return components


def _is_own_directory(root: Path, name: str) -> bool:
    """Return whether a component's directory lies in the pipeline, and is no link out of it."""
    path = root / name
    try:
        return path.is_dir() and path.resolve().is_relative_to(root.resolve())
    except (OSError, RuntimeError):  # a name that is too long, a loop of links
        return False


def _is_component(value: object) -> bool:
    return (
        isinstance(value, list) and len(value) == 2 and all(isinstance(part, str) for part in value)
    )


def packed_components(root: Path, components: Mapping[str, Component]) -> list[str]:
    """Return the names of the components with packed weights, by their manifests or config.json.

    A component whose config.json cannot be read counts as one: whoever opens it says what is wrong.
    """
    return [name for name, c in components.items() if c.converts and _says_packed(root / name)]


def _says_packed(directory: Path) -> bool:
    config = directory / "config.json"
    if (directory / MANIFEST).is_file() or not config.is_file():
        return (directory / MANIFEST).is_file()
    try:
        return bnb_format.quant_method(read_json(config)) == "bitsandbytes"
    except InputError:
        return True


def _no_origin(component: str) -> None:
    """Return None: the component comes from no Hub."""


def make_pipeline_plan(
    root: Path,
    config: QuantConfig,
    oracle: Oracle = consult,
    scan: Scan = no_scan,
    origin_of: Callable[[str], Origin | None] = _no_origin,
    copy: Collection[str] = (),
) -> ModelPlan:
    """Decide the whole conversion of a pipeline.

    Args:
        config: `keep` patterns may begin with a component's name, or be one.
        oracle, scan: see `make_plan`.
        origin_of: given a component's name, returns where it comes from.
        copy: patterns of files that are copied beside those that a pipeline is made of.

    Raises:
        UsageError: see `make_plan`; the target loads no pipelines; a pattern of `copy` matches
            nothing, or what is never copied.
        InputError: see `make_plan`; no component has anything to quantize.
    """
    if config.target != "transformers":
        raise UsageError(
            f"--target {config.target} does not load diffusers pipelines: leave the option out"
        )
    components = components_of(root)
    convertible = [name for name, component in components.items() if component.converts]
    if not convertible:
        names = ", ".join(f"{c.name} ({c.class_name})" for c in components.values())
        raise InputError(
            f"{root / INDEX_FILE} names no denoiser and no text encoder of diffusers' or "
            f"transformers' own classes, only {names or 'nothing'}: there is nothing to quantize"
        )
    kept = [name for name in convertible if name in config.keep]
    checkpoints = _open_components(root, [n for n in convertible if n not in kept], origin_of)
    patterns = _keep_patterns(config.keep, components, checkpoints)
    notes = [f"{name} is kept as it is, by --keep" for name in kept]
    parts: dict[str, Plan] = {}
    for name, checkpoint in checkpoints.items():
        try:
            plan = make_plan(checkpoint, replace(config, keep=patterns[name]), oracle, scan)
        except NothingToQuantizeError as error:
            notes.append(f"{name} is copied as it is: {error}")
            continue
        parts[name] = plan
        notes += [f"{name}: {note}" for note in plan.notes]
    if not parts:
        raise InputError(f"{root} has nothing to quantize: {'; '.join(notes)}")
    parts, copies = _with_copies(root, components, parts, copy)
    notes += [
        *copies_notes(root, copies.files, copies.left),
        *_full_precision_note(components.values(), copies),
    ]
    return ModelPlan(root, False, name_of_directory(root), parts, copies, tuple(notes))


def _with_copies(
    root: Path, components: Collection[str], parts: Mapping[str, Plan], patterns: Collection[str]
) -> tuple[dict[str, Plan], Copies]:
    """Return the parts and the copies of a pipeline, with the files that --copy adds to them.

    Raises:
        UsageError: see `chosen_files`.
    """
    copies = copies_of(root, components, parts)
    own = {
        f"{part}/{name}"
        for part, plan in parts.items()
        for name in (*plan.checkpoint.extra_files, *plan.checkpoint.left_files)
    }
    names = {*copies.left, *copies.files, *own}
    why = why_not_copied(root)
    chosen = model_files.chosen_files(patterns, names, str(root), why)
    with_files = {}
    for part, plan in parts.items():
        added = {
            name.removeprefix(f"{part}/") for name in chosen & own if name.startswith(f"{part}/")
        }
        with_files[part] = replace(plan, checkpoint=plan.checkpoint.with_extra(added))
    return with_files, copies_of(root, components, parts, sorted(chosen))


def _open_components(
    root: Path, names: Collection[str], origin_of: Callable[[str], Origin | None]
) -> dict[str, Checkpoint]:
    """Return the checkpoints of components, by name.

    Raises:
        InputError: a component cannot be read, or has no config.json.
    """
    checkpoints = {
        name: replace(open_checkpoint(root / name), origin=origin_of(name)) for name in names
    }
    for name, checkpoint in checkpoints.items():
        if not checkpoint.config:
            raise InputError(
                f"{root / name} has no config.json with content, without which diffusers cannot "
                f"load it: download it again, or leave it as it is with --keep {name}"
            )
    return checkpoints


def _full_precision_note(components: Iterable[Component], copies: Copies) -> list[str]:
    """Return a note that names the components with weights that never become 4-bit, if any."""
    names = ", ".join(
        f"{c.name} ({c.class_name}, {nbytes:,} bytes)"
        for c in components
        if not c.converts and (nbytes := _weight_bytes(copies, c.name))
    )
    return [f"in full precision stays {names}"] if names else []


def _weight_bytes(copies: Copies, component: str) -> int:
    return sum(
        (copies.root / source).stat().st_size
        for source in copies.files.values()
        if source.startswith(f"{component}/") and is_weight_file(source.rpartition("/")[2])
    )


def _keep_patterns(
    keep: Collection[str], components: Collection[str], checkpoints: Mapping[str, Checkpoint]
) -> dict[str, tuple[str, ...]]:
    """Return the --keep patterns that each component is planned with.

    Raises:
        UsageError: a pattern matches no module of any component.
    """
    modules = {n: {module_path(t) for t in c.tensors} for n, c in checkpoints.items()}
    patterns: dict[str, list[str]] = {name: [] for name in checkpoints}
    for pattern in keep:
        if pattern in components:
            continue
        has_match = False
        for name, paths in modules.items():
            own = _own_pattern(pattern, name)
            if any(matches(own, path) for path in paths):
                patterns[name].append(own)
                has_match = True
        if not has_match:
            raise UsageError(
                f"--keep {pattern!r} matches no module of {', '.join(checkpoints) or 'any part'}: "
                "give a component (text_encoder), a component and a module of it "
                "(transformer.proj_out), or a pattern for all of them ('*.to_q')"
            )
    return {name: tuple(dict.fromkeys(own)) for name, own in patterns.items()}


def _own_pattern(pattern: str, component: str) -> str:
    """Return a pattern as a component sees it: `transformer.proj_out` is `proj_out` to
    transformer."""
    head, dot, rest = pattern.partition(".")
    is_prefixed = dot and rest and fnmatchcase(component, head) and not head.startswith("*")
    return rest if is_prefixed else pattern


def copies_of(
    root: Path,
    components: Collection[str],
    converted: Collection[str],
    copy: Collection[str] = (),
) -> Copies:
    """Return what an output copies of a pipeline beside its converted components.

    Copied are the other components, what the list of a model's files names (model_files.py), and
    directories of such files and weights that model_index.json does not name.

    Args:
        copy: paths of files that are copied in any case.
    """
    copies = Copies(root, {}, {}, [])
    home = home_of(root)
    for path in sorted(root.iterdir()):
        if path.is_symlink() and leads_out(path, root, home):
            copies.left.append(path.name)
        elif path.is_dir():
            if path.name not in converted and not is_left(path.name):
                _add_directory(copies, path, path.name in components)
        elif path.name == PIPELINE_RECORD:
            continue
        elif is_regular(path) and _is_of_pipeline(path.name):
            copies.files[path.name] = path.name
        else:
            copies.left.append(path.name)
    for name in copy:
        if name in copies.left and is_regular(root / name):
            copies.left.remove(name)
            copies.files[name] = name
    return copies


def _is_of_pipeline(name: str) -> bool:
    """Return whether a file directly in a pipeline's directory is copied."""
    if is_weight_file(name) or name in REPOSITORYS or model_files.never_kind(name):
        return False
    return model_files.is_of_model(name) or name.endswith(".py")


def _add_directory(copies: Copies, directory: Path, component: bool) -> None:
    """Add a directory that stays as it is: one set of its weights, under plain names, and the rest.

    Args:
        copies: changed in place.
        component: whether model_index.json names the directory.
    """
    prefix = directory.name + "/"
    try:
        index, shards = find_shards(directory)
    except InputError:
        index, shards = None, []
    extra, not_copied = other_files(directory, shards, index)
    if component:  # its class is not for us to judge; without shards not even what its weights are
        more = {n for n in not_copied if _is_of_component(directory, n, bool(shards))}
        extra, not_copied = (*extra, *more), tuple(n for n in not_copied if n not in more)
    elif model_files.never_kind(prefix + "x") or model_files.is_same_weights(prefix + "x"):
        index, extra, not_copied = None, (), (*extra, *not_copied, *(s.name for s in shards))
        shards = []
    if (directory / MANIFEST).is_file():
        extra = (*extra, MANIFEST)
    copies.files.update({prefix + name: prefix + name for name in sorted(extra)})
    copies.left.extend(prefix + name for name in sorted(not_copied))
    copies.files.update({prefix + plain_name(s.name): prefix + s.name for s in shards})
    if index is None:
        return
    if all(plain_name(shard.name) == shard.name for shard in shards):
        copies.files[prefix + index] = prefix + index
        return
    content: dict[str, Any] = read_json(directory / index, INDEX)
    weight_map = {tensor: plain_name(file) for tensor, file in content["weight_map"].items()}
    text = json.dumps({**content, "weight_map": weight_map}, indent=2) + "\n"
    copies.texts[prefix + plain_index(shards[0].name)] = text


def _is_of_component(directory: Path, name: str, has_shards: bool) -> bool:
    """Return whether a file that no list names is copied with the component that it lies in.

    Args:
        has_shards: whether the component has safetensors weights, so that others are repetitions.
    """
    path = directory / name
    if model_files.never_kind(name) or not is_regular(path):
        return False
    if path.is_symlink() and leads_out(path, directory, home_of(directory)):
        return False
    return not has_shards or not (is_weight_file(name) or name in REPOSITORYS)


def stray_weights(root: Path, listed: Collection[str], converted: Collection[str]) -> list[str]:
    """Return the weight files of an output that are not `listed`, outside of its converted
    components."""
    names = (p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file())
    return sorted(
        name
        for name in names
        if name not in listed
        and name.partition("/")[0] not in converted
        and not re.search(r"(^|/)\.", name)
        and is_weight_file(name.rpartition("/")[2])
    )


def part_shards(path: Path) -> list[Path]:
    """Return the weight files directly in a checkpoint, or in the components of a pipeline."""
    if path.is_file():
        return [path]
    pattern = "*/*.safetensors" if is_pipeline(path) else "*.safetensors"
    return [file for file in path.glob(pattern) if is_regular(file)]
