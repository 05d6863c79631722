"""The plan of a whole model: of one checkpoint, or of a pipeline's components and what lies beside
them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..checkpoint.discovery import is_weight_file
from ..checkpoint.types import Shard
from .plan import Plan


def path_in_model(part: str, name: str) -> str:
    """Return the path of a part's file within its model: `COMPONENT/NAME`, or NAME alone.

    Args:
        part: a pipeline's component, "" for a checkpoint that is no part of one.
    """
    return f"{part}/{name}" if part else name


@dataclass(frozen=True, slots=True)
class Copies:
    """Files that go into an output as they are.

    Attributes:
        root: where they come from.
        files: path in the output -> path under root.
        texts: path in the output -> content of a file that the source has in another form.
        left: paths under root that are not copied.
    """

    root: Path
    files: dict[str, str]
    texts: dict[str, str]
    left: list[str]

    @property
    def weight_files(self) -> dict[str, int]:
        """Bytes of each file that holds weights, by its path in the output."""
        return {
            name: (self.root / source).stat().st_size
            for name, source in self.files.items()
            if is_weight_file(name.rpartition("/")[2]) and not name.endswith(".json")
        }

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        copied = sum((self.root / name).stat().st_size for name in self.files.values())
        return copied + sum(len(text.encode()) for text in self.texts.values())

    def write(self, directory: Path) -> None:
        """Write everything into an output's directory."""
        for name, source in self.files.items():
            place_for(directory, name)
            shutil.copyfile(self.root / source, directory / name)
        self.write_texts(directory)

    def write_texts(self, directory: Path) -> None:
        """Write the files that the source has in another form."""
        for name, text in self.texts.items():
            place_for(directory, name).write_text(text, "utf-8")


def place_for(directory: Path, name: str) -> Path:
    """Make the directories above a file in `directory`, and return the file's path."""
    place = directory / name
    place.parent.mkdir(parents=True, exist_ok=True)
    return place


@dataclass(frozen=True, slots=True)
class ModelPlan:
    """Everything that a run will write.

    Attributes:
        root: directory of the source.
        is_file: the user named one file in it.
        name: what the user would call the source.
        parts: component -> its plan; "" alone is a checkpoint that is no part of a pipeline.
        copies: what lies beside the parts and is not converted.
        notes: what the user should know, one sentence each.
    """

    root: Path
    is_file: bool
    name: str
    parts: Mapping[str, Plan]
    copies: Copies
    notes: tuple[str, ...]

    @staticmethod
    def of(plan: Plan) -> ModelPlan:
        """Return the plan of a model that is one checkpoint."""
        source = plan.checkpoint
        copies = Copies(source.root, {}, {}, [])
        return ModelPlan(source.root, source.is_file, source.name, {"": plan}, copies, plan.notes)

    @property
    def is_pipeline(self) -> bool:
        """Whether the parts are components of a diffusers pipeline."""
        return "" not in self.parts

    @property
    def source_bytes(self) -> int:
        """Bytes of the source shards of all parts."""
        return sum(plan.source_bytes for plan in self.parts.values())

    @property
    def shard_bytes(self) -> int:
        """Bytes of the output shards of all parts, exactly."""
        return sum(plan.shard_bytes for plan in self.parts.values())

    @property
    def written(self) -> int:
        """Weights of the output."""
        return sum(plan.written for plan in self.parts.values())

    @property
    def parameters(self) -> int:
        """Elements of all floating-point weights."""
        return sum(plan.parameters for plan in self.parts.values())

    @property
    def tensors(self) -> int:
        """Stored tensors that are converted or copied."""
        return sum(len(plan.tensors) for plan in self.parts.values())

    @property
    def left_files(self) -> list[str]:
        """Paths of files that are not copied, sorted."""
        in_parts = [
            path_in_model(part, name)
            for part, plan in self.parts.items()
            for name in plan.checkpoint.left_files
        ]
        return sorted([*in_parts, *self.copies.left])

    @property
    def file_sizes(self) -> dict[str, int]:
        """Bytes of each output file that holds weights, by its path in the output."""
        shards = {
            path_in_model(part, layout.filename): layout.size
            for part, plan in self.parts.items()
            for layout in plan.shards
        }
        return {**shards, **self.copies.weight_files}

    def part_and_name(self, path: str) -> tuple[str, str]:
        """Return (part, name in it) of an output file's path; part "" for one beside the parts."""
        head, _, rest = path.partition("/")
        return (head, rest) if head in self.parts else ("", path)

    def source_shards(self) -> Iterator[tuple[str, Shard]]:
        """Yield (part, source shard) in the order in which they are read."""
        for part, plan in self.parts.items():
            for shard in plan.checkpoint.shards:
                yield part, shard
