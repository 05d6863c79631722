"""What is asked of a conversion.

Its mistakes are told before anything numerical is imported.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from ..checkpoint.digest import ALGORITHMS
from ..convert.listener import NOBODY, Listener, Stage
from ..errors import UsageError
from ..format.config import QuantConfig
from ..planning.options import check_options
from .adapters import check_scales, read_adapters
from .machine import Machine
from .sources import Source, named, require_repository, require_there

if TYPE_CHECKING:
    from ..checkpoint.adapter_files import Adapter
    from ..checkpoint.importance_file import ImportanceFile
    from ..checkpoint.types import Checkpoint
    from ..convert.transfers import Transfers
    from ..hub.carrier import HubTransport
    from ..hub.publish import Publication
    from ..planning.answer import Answer
    from ..planning.plan import Plan
    from ..planning.recipe_file import Recipe
    from ..quality.calibration.run import Calibrating

SHARD_BYTES, LEAVING_SHARD_BYTES = 5_000_000_000, 1_000_000_000
"""Default of the largest output file: as loaders write it; where files leave a bounded disk."""


@dataclass(frozen=True)
class Request:
    """What to convert, how, and where the output goes.

    Attributes:
        source: a path, or a model on the Hub.
        output: a new directory. None for NAME-nf4 in the working directory; with `push_to`, None
            for an output on the Hub alone.
        config: the recipe; `recipe` replaces its `max_shard_size`.
        shard_size: bytes of the largest output file, None for the default.
        copy: patterns of files that are copied beside those that a model is made of.
        recipe_file: formats of modules, see planning/recipe_file.py; None for one format.
        importance_file: weights errors when scales are searched for, None for no data.
        calibrating: text to run through the model first, None for no calibration.
        exact: ask transformers which modules it holds in 4 bit, whatever the family.
        trust_remote_code: let transformers run the model's own code for that.
        digest: algorithm of the files' digests; "auto" is SHA-256 where a Hub is involved.
        machine: converts.
        disk: most bytes that may lie on the disk at once, None for no limit.
        push_to: the repository to publish the output in, None for none.
        public, replace_card: see `Publication`.
        fsync, resume: see `Execution`.
        listener: told of stages, progress and notes.
        adapters: merged first, in order: directories, or names on the Hub.
        adapter_scales: one for all adapters, or one for each; () for 1.

    Raises:
        UsageError: options that do not go together.
    """

    source: Path
    output: Path | None = None
    config: QuantConfig = field(default_factory=QuantConfig)
    shard_size: int | None = None
    copy: tuple[str, ...] = ()
    recipe_file: Path | None = None
    importance_file: Path | None = None
    calibrating: Calibrating | None = None
    exact: bool = False
    trust_remote_code: bool = False
    digest: str = "auto"
    machine: Machine = field(default_factory=Machine)
    disk: int | None = None
    push_to: str | None = None
    public: bool = False
    replace_card: bool = False
    fsync: bool = True
    resume: bool = False
    listener: Listener = NOBODY
    adapters: tuple[Path, ...] = ()
    adapter_scales: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.digest not in ("auto", *ALGORITHMS):
            raise UsageError(f"--digest {self.digest} is not one of auto, {', '.join(ALGORITHMS)}")
        if self.push_to is not None:
            require_repository(self.push_to)
        for option, given in (("--public", self.public), ("--replace-card", self.replace_card)):
            if given and self.push_to is None:
                raise UsageError(f"{option} needs --push-to")
        check_scales(self.adapters, self.adapter_scales)
        if self.adapters and self.calibrating is not None:
            raise UsageError(
                "--calibration measures the base without its adapter: leave --adapter out, or "
                "merge it with PEFT's merge_and_unload and calibrate the result"
            )
        if self.machine.ray is not None:
            self._require_for_ray()

    def _require_for_ray(self) -> None:
        """Raise UsageError for what a cluster does not do."""
        if self.calibrating is not None:
            raise UsageError(
                "--calibration is for one machine: save what it finds with --save-importance, and "
                "give the cluster that file with --importance"
            )
        if self.disk is not None and named(self.source) is None and not self.leaving:
            raise UsageError(
                "--disk bounds what each task of --ray fetches from a Hub, or holds until a Hub "
                "has it, and here is no Hub: leave it out"
            )

    def refuse_early(self) -> None:
        """Refuse what can be refused before a model is read, and what reads it is imported.

        Raises:
            InputError: there is nothing at the source's path.
            UsageError: the recipe has a value that is none.
        """
        require_there(self.source)
        check_options(self.recipe)

    @cached_property
    def module_recipe(self) -> Recipe | None:
        """The recipe file, read at its first use; None where none was asked for.

        Raises:
            InputError: it is damaged.
        """
        from ..planning.recipe_file import load_recipe

        return None if self.recipe_file is None else load_recipe(self.recipe_file)

    def require_recipe_of(self, checkpoint: Checkpoint) -> None:
        """Raise InputError if the recipe file was made for another model."""
        if self.module_recipe is not None and self.recipe_file is not None:
            self.module_recipe.require_model(checkpoint, self.recipe_file)

    @property
    def leaving(self) -> bool:
        """Return whether the output goes to the Hub alone."""
        return self.push_to is not None and self.output is None

    @cached_property
    def recipe(self) -> QuantConfig:
        """The recipe, with the formats of its file, and the largest output file decided."""
        from ..planning.recipe_file import with_recipe

        config = self.config
        if self.module_recipe is not None:
            config = with_recipe(config, self.module_recipe)
        leaves = self.disk is not None and self.leaving
        default = LEAVING_SHARD_BYTES if leaves else SHARD_BYTES
        return replace(config, max_shard_size=self.shard_size or default)

    def place(self, name: str) -> Path:
        """Return the output's directory; the run works beside it.

        Without an output on this disk the name is that of the repository, as the Hub's own cache
        would write it, so that no other file of the user is in its way.

        Args:
            name: of the source model.
        """
        if self.push_to is not None and self.leaving:
            return Path(f"models--{self.push_to.replace('/', '--')}")
        return self.output or Path(f"{name}-nf4")

    def algorithm(self, source: Source) -> str:
        """Return the algorithm of the files' digests: "blake3" or "sha256"."""
        if self.digest != "auto":
            return self.digest
        return "sha256" if source.snapshot or self.push_to else "blake3"

    @cached_property
    def importance(self) -> ImportanceFile | None:
        """The importance file, read at its first use; None where none was asked for.

        Raises:
            InputError: it is damaged.
        """
        from ..checkpoint.importance_file import load

        return None if self.importance_file is None else load(self.importance_file)

    @cached_property
    def merging(self) -> tuple[Adapter, ...]:
        """The adapters that are merged, read at their first use.

        Raises:
            UsageError, InputError, MachineError: see `read_adapters`.
        """
        return read_adapters(self.adapters, self.adapter_scales, self.machine)

    def oracle(self, model: Checkpoint) -> Answer | None:
        """Return what transformers says of a model; None where it need not be asked.

        An argument of `make_plan`.
        """
        from ..planning.families import consult

        return consult(model, self.exact, self.trust_remote_code)

    def scan(self, preliminary: Plan) -> frozenset[str]:
        """Return the names of the weights that hold a NaN or an infinity, read with progress.

        An argument of `make_plan`.
        """
        from ..convert.find_nonfinite import nonfinite_weights, scan_bytes

        limits = self.machine.resources(len(preliminary.tensors))
        stage = Stage("looking for NaN", scan_bytes(preliminary))
        with self.listener.stage(stage) as progress:
            return nonfinite_weights(preliminary, self.machine.engine, limits, progress)

    def transport(self, source: Source) -> HubTransport | None:
        """Return what fetches and uploads the files of a run; None for a run without a Hub."""
        from ..convert.transfers import Transfers
        from ..hub.carrier import HubTransport

        snapshot = source.snapshot if source.outline else None
        if snapshot is None and self.disk is None and self.push_to is None:
            return None
        transfers = Transfers()
        return HubTransport(
            snapshot, self.disk, self._publication(transfers), self.leaving, transfers,
            self.listener.note, on_nodes=self.machine.ray is not None,
        )  # fmt: skip

    def _publication(self, transfers: Transfers) -> Publication | None:
        """Return the commit in the making, None where nothing is published."""
        from ..hub.errors import report_to
        from ..hub.publish import Publication

        if self.push_to is None:
            return None
        report_to(self.listener.note)
        return Publication(
            self.push_to, self.public, self.replace_card, self.listener.note,
            transfers.add_uploaded,
        )  # fmt: skip
