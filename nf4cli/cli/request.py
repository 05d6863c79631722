"""What the options of nf4 quantize ask for, whatever the source turns out to be."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from . import common
from .progress import ProgressDisplay

if TYPE_CHECKING:
    from ..engines import Engine, Notify
    from ..importance import ImportanceFile
    from ..planned import Plan
    from ..records import Answer, Checkpoint, QuantConfig
    from .calibrating import Calibrating
    from .hub import Source, Trip


@dataclass(frozen=True)
class Request:
    """Attributes:
    shard_size: as asked, None for the default.
    importance_file: what the loss of the scales is weighted by, None for no data.
    calibrating: what shall be run through the model first, None for nothing.
    memory: as asked.
    plan: only say what would be done.
    trip: what is asked of a Hub.
    """

    config: QuantConfig
    shard_size: str | None
    importance_file: Path | None
    calibrating: Calibrating | None
    exact: bool
    trust_remote_code: bool
    digest: str
    engine_name: str
    device: str | None
    workers: int | None
    memory: str | None
    fsync: bool
    resume: bool
    plan: bool
    json: bool
    quiet: bool
    verbose: bool
    trip: Trip

    def algorithm(self, source: Source) -> str:
        """Of the files' digests."""
        if self.digest != "auto":
            return self.digest
        return "sha256" if source.snapshot or self.trip.push_to else "blake3"

    @property
    def notify(self) -> Notify:
        """Who is told what a user should know."""
        return common.notices(self.quiet)

    @property
    def shows(self) -> bool:
        """Whether progress is shown."""
        return not self.quiet

    @cached_property
    def engine(self) -> Engine:
        """The one that was asked for, loaded when it is needed."""
        return common.load_engine(self.engine_name, self.device, self.quiet, self.memory)

    @cached_property
    def importance(self) -> ImportanceFile | None:
        """The file that was asked for, read when it is needed."""
        from ..importance import load

        return None if self.importance_file is None else load(self.importance_file)

    def oracle(self, model: Checkpoint) -> Answer | None:
        """For `make_plan`: what transformers says of a model, where it has to be asked."""
        from ..families import consult

        return consult(model, self.exact, self.trust_remote_code)

    def scan(self, preliminary: Plan) -> frozenset[str]:
        """For `make_plan`: the weights that hold a NaN or an infinity."""
        from ..nonfinite import nonfinite_weights, scan_bytes

        limits = common.resources(self.engine, self.workers, self.memory, len(preliminary.tensors))
        total = scan_bytes(preliminary)
        with ProgressDisplay(total, "looking for NaN", self.shows) as display:
            return nonfinite_weights(preliminary, self.engine, limits, display)
