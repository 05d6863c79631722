"""The CUDA engine: runs the kernels of cuda/gpu_kernels.cu on one or several GPUs.

A calling thread borrows a lane: a stream with device memory and pinned host memory of its own.  So
one thread's chunk is copied while another's is computed and a third is read from the disk.  With
several GPUs, each in turn lends a lane.  Buffers from `buffer` are pinned, and are copied directly
between the GPU and their place in host memory.

The class extends the CPU engine, which keeps the work that a GPU would do more slowly: sums with a
fixed order, casts, and decoding of stored codes.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..callbacks import Notify, no_notice
from ..errors import MachineError, NonFiniteError
from ..format import codebook
from ..format.dtypes import ITEMSIZE
from ..process_memory import resident_bytes
from . import launches
from .cpu import CpuEngine
from .device import DeviceMemoryError
from .protocol import (
    GRANULE,
    OUTLIERS,
    STATS,
    ChosenScales,
    Codes,
    Importance,
    NestedAbsmax,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..format.codebook import Ladder
    from .device import Device, Memory
    from .launches import Launch
    from .protocol import F32, F64, U8

ARENA = 16 << 20
"""Bytes of device memory of a lane: enough for a chunk of 8 MiB and its results."""
STAGING = 4 << 20
"""Bytes of pinned host memory of a lane; arrays that are not pinned are copied through it."""
_SMALLEST_ARENA = 1 << 20  # bytes that hold a granule of the widest kind of work, and its tables
_COMPILER_MEMORY = 110_000_000  # bytes: NVRTC at its peak, as measured
_ALIGN = 256  # bytes: arrays in device memory start at multiples of it
_ARRAYS = 16  # more arrays than any piece of work has
_WIDEST = 1 << 16  # columns of a matrix of codes whose scales fit beside a granule
_WIDEST_WEIGHTED = 1 << 17  # columns whose importance fits beside a granule


def open_devices(indices: tuple[int, ...] | None) -> Sequence[Device]:
    """Return the GPUs with these indices, None for all; tests replace this with emulated GPUs."""
    from . import cupy_device

    return cupy_device.open_devices(indices)


class CudaEngine(CpuEngine):
    """The `Engine` of NVIDIA GPUs; see there for the methods.

    Args:
        indices: numbers of the GPUs to use, None for all.
        devices: GPUs that are open already, used instead of `indices`.
        notify: called when a GPU has too little free memory for lanes of the usual size.

    Raises:
        MachineError: no GPU can be used; the message says what is missing.
        UsageError: there is no GPU with one of these indices.
    """

    def __init__(
        self,
        indices: tuple[int, ...] | None = None,
        devices: Sequence[Device] | None = None,
        notify: Notify = no_notice,
    ) -> None:
        super().__init__()
        before = resident_bytes() or 0  # CUDA's own part differs with driver and GPU
        self.devices = tuple(devices or open_devices(indices))
        first = self.devices[0]
        count = f"{len(self.devices)} GPUs, " if len(self.devices) > 1 else ""
        self.name = f"cuda ({count}{first.name}, sm_{first.arch})"
        self.spare_threads = len(self.devices)
        self.worker_memory += STAGING
        self.item_bytes = 8 << 20
        self.extra_memory = max(0, (resident_bytes() or 0) - before) + _COMPILER_MEMORY
        self._notify = notify
        self._ready = threading.Condition()
        self._turns = itertools.cycle(self.devices)
        self._lanes: deque[_Lane] = deque()  # those that no thread has borrowed
        self._made = 0  # number of all lanes, borrowed or not
        self._rooms = {id(device): ARENA for device in self.devices}  # bytes of a new lane
        self._pinned: dict[int, int] = {}  # `buffer`: address of its first byte -> behind its last

    def buffer(self, nbytes: int) -> U8:
        array = self.devices[0].host_buffer(nbytes)
        address = array.ctypes.data
        self._pinned[address] = address + nbytes
        weakref.finalize(array, self._pinned.pop, address, None)
        return array

    def is_pinned(self, array: NDArray[Any]) -> bool:
        """Return whether an array lies within a living array that `buffer` returned."""
        start = array.ctypes.data
        return any(a <= start and start + array.nbytes <= b for a, b in list(self._pinned.items()))

    def quantize(
        self,
        src: U8,
        dtype: str,
        blocksize: int,
        quant_type: str,
        packed: U8,
        absmax: F32,
        codes: Codes | None = None,
    ) -> F64:
        n = src.nbytes // ITEMSIZE[dtype] if codes is None else codes.count(src)
        bits = 8 * ITEMSIZE[dtype] if codes is None else codes.bits
        if blocksize not in codebook.BLOCKSIZES:
            raise ValueError(f"blocksize {blocksize}")
        if codes is not None and not _even(codes, n, blocksize, dtype):
            return super().quantize(src, dtype, blocksize, quant_type, packed, absmax, codes)
        stats = np.empty((-(-n // GRANULE), STATS), np.float64)
        with self._lane() as lane:
            for start, count in lane.pieces(n, lane.step(_quantize_need(bits, blocksize, codes))):
                blocks = slice(start // blocksize, -(-(start + count) // blocksize))
                granules = slice(start // GRANULE, -(-(start + count) // GRANULE))
                rows = launches.entries(count, blocksize)
                outputs: tuple[NDArray[Any], ...] = (
                    packed[start // 2 : (start + count + 1) // 2],
                    absmax[blocks],
                    stats[granules].reshape(-1),
                )
                factors = None if codes is None else lane.factors(codes.from_(start), count)
                source = lane.upload(src[start * bits // 8 : (start + count) * bits // 8])
                places = [lane.room(out.nbytes) for out in outputs]
                nibbles, scales, sums = places
                results = launches.Quantized(
                    nibbles, scales, lane.room(8 * rows), lane.room(4 * rows), sums
                )
                book = lane.books[quant_type]
                lane.run(
                    launches.quantize(
                        count, dtype, blocksize, quant_type, book, source, results, factors
                    )
                )
                for out, address in zip(outputs, places, strict=True):
                    lane.download(out.view(np.uint8), address)
        # The CPU engine does some granules again: those with an element that is not finite, to
        # find out which; and those with a count of -1, where the GPU could not tell from its sums
        # whether a block holds more than zeros beside its largest values.
        for row in np.flatnonzero(~np.isfinite(stats[:, 0]) | (stats[:, OUTLIERS] < 0)).tolist():
            first, last = row * GRANULE, min(n, (row + 1) * GRANULE)
            try:
                (again,) = super().quantize(
                    src[first * bits // 8 : last * bits // 8], dtype, blocksize, quant_type,
                    packed[first // 2 : (last + 1) // 2],
                    absmax[first // blocksize : -(-last // blocksize)],
                    None if codes is None else codes.from_(first),
                )  # fmt: skip
            except NonFiniteError as error:
                raise NonFiniteError(first + error.index) from None
            if not np.isfinite(stats[row, 0]):
                raise AssertionError("the GPU found a value that is not finite where there is none")
            stats[row, OUTLIERS] = again[OUTLIERS]
        return stats

    def search(
        self,
        src: U8,
        dtype: str,
        blocksize: int,
        quant_type: str,
        ladder: Ladder,
        importance: Importance | None,
        packed: U8,
        scales: ChosenScales,
    ) -> F64:
        n, run = src.nbytes // ITEMSIZE[dtype], blocksize * ladder.run
        if blocksize not in codebook.BLOCKSIZES:
            raise ValueError(f"blocksize {blocksize}")
        columns = 0 if importance is None else importance.columns.size
        if columns > _WIDEST_WEIGHTED:
            return super().search(
                src, dtype, blocksize, quant_type, ladder, importance, packed, scales
            )
        stats = np.empty((-(-n // GRANULE), STATS), np.float64)
        work = _Search(dtype, blocksize, quant_type, ladder, importance)
        with self._lane() as lane:
            step = lane.step(work.need())
            measured = step < min(n, run)  # the arena holds no run: its unit comes first
            if measured:
                work.measure(lane, src, scales.unit)
                step = GRANULE
            elif step > run:
                step -= step % run
            for start, count in lane.pieces(n, step):
                last = start + count
                work.run(
                    lane,
                    src[start * ITEMSIZE[dtype] : last * ITEMSIZE[dtype]],
                    start,
                    packed[start // 2 : (last + 1) // 2],
                    ChosenScales(
                        scales.index[start // blocksize : -(-last // blocksize)],
                        scales.unit[start // run : -(-last // run)],
                    ),
                    stats[start // GRANULE : -(-last // GRANULE)],
                    measured,
                )
        bad = np.flatnonzero(~np.isfinite(stats[:, 0]))
        if bad.size:  # the CPU engine looks for the element, in the granule and what shares a unit
            first = int(bad[0]) * GRANULE // run * run
            last = min(n, max(first + run, int(bad[0]) * GRANULE + GRANULE))
            self._refuse(src[first * ITEMSIZE[dtype] : last * ITEMSIZE[dtype]], first, work)
        return stats

    def _refuse(self, src: U8, first: int, work: _Search) -> None:
        """Raise NonFiniteError for elements that the GPU found one in that is not finite.

        Args:
            src: elements, from the start of a run on.
            first: place of the first one.
            work: the search.
        """
        n = src.nbytes // ITEMSIZE[work.dtype]
        index = np.empty(-(-n // work.blocksize), np.uint8)
        unit = np.empty(-(-index.size // work.ladder.run), np.float32)
        try:
            super().search(
                src, work.dtype, work.blocksize, work.quant_type, work.ladder, None,
                np.empty((n + 1) // 2, np.uint8), ChosenScales(index, unit),
            )  # fmt: skip
        except NonFiniteError as error:
            raise NonFiniteError(first + error.index) from None
        raise AssertionError("the GPU found a value that is not finite where there is none")

    def dequantize(
        self,
        packed: U8,
        n: int,
        blocksize: int,
        quant_type: str,
        absmax: F32 | NestedAbsmax,
        dtype: str,
        out: U8,
    ) -> None:
        if blocksize not in codebook.BLOCKSIZES:
            raise ValueError(f"blocksize {blocksize}")
        itemsize = ITEMSIZE[dtype]
        with self._lane() as lane:
            for start, count in lane.pieces(
                n, lane.step(_dequantize_need(itemsize, blocksize, absmax))
            ):
                first, last = start // blocksize, -(-(start + count) // blocksize)
                scales = lane.scales(absmax, first, last)
                codes = lane.upload(packed[start // 2 : (start + count + 1) // 2])
                values = lane.room(count * itemsize)
                book = lane.books[quant_type]
                lane.run(launches.dequantize(count, dtype, blocksize, book, codes, scales, values))
                lane.download(out[start * itemsize : (start + count) * itemsize], values)

    def nested_quantize(self, absmax: F32, offset: float, codes: U8, nested_absmax: F32) -> None:
        run = codebook.NESTED_BLOCKSIZE
        with self._lane() as lane:
            for start, count in lane.pieces(absmax.size, lane.step(_Need(6 * GRANULE))):
                runs = nested_absmax[start // run : -(-(start + count) // run)]
                source = lane.upload(absmax[start : start + count].view(np.uint8))
                to_codes, to_nested = lane.room(count), lane.room(runs.nbytes)
                lane.run(
                    launches.nested_quantize(
                        count, offset, lane.midpoints, source, to_codes, to_nested
                    )
                )
                lane.download(codes[start : start + count], to_codes)
                lane.download(runs.view(np.uint8), to_nested)

    def try_out(self) -> None:
        """Make a lane on every GPU and run a small piece of work on each.

        Raises:
            MachineError: a GPU has no memory, its kernels cannot be compiled or loaded, or it
                failed.
        """
        with self._ready:
            self._lanes += [lane for lane in (self._new_lane() for _ in self.devices) if lane]
        for _ in self.devices:
            nested = np.empty(1, np.float32)
            self.nested_quantize(np.ones(1, np.float32), 0.0, np.empty(1, np.uint8), nested)

    @contextmanager
    def _lane(self) -> Iterator[_Lane]:
        """Lend a lane to the calling thread; a lane that failed is not lent again.

        Lanes are lent in turn, so that all GPUs are used.  If no lane is free and no GPU has memory
        for a new one, the thread waits until another thread gives one back.

        Raises:
            MachineError: no GPU has memory for even one lane, or a GPU failed.
        """
        with self._ready:
            lane = self._lanes.popleft() if self._lanes else self._new_lane()
            while lane is None:
                self._ready.wait()
                lane = self._lanes.popleft() if self._lanes else self._new_lane()
        try:
            yield lane
        except BaseException:
            with suppress(Exception):  # wait: the GPU may still use the memory that is freed here
                lane.finish()
            with self._ready:
                self._made -= 1
                self._ready.notify()
            raise
        with self._ready:
            self._lanes.append(lane)
            self._ready.notify()

    def _new_lane(self) -> _Lane | None:
        """Return a lane on the next GPU that has room, or None if none has but lanes exist.

        Raises:
            MachineError: no GPU has room, and there is no lane to wait for.
        """
        for device in itertools.islice(self._turns, len(self.devices)):
            lane = self._lane_on(device)
            if lane is not None:
                self._made += 1
                return lane
        if self._made:
            return None
        names = " and ".join(dict.fromkeys(device.name for device in self.devices))
        raise MachineError(
            f"{names} has no {_SMALLEST_ARENA:,} bytes of memory left: end what else runs on it, "
            "choose another GPU with --device, or use --engine cpu"
        )

    def _lane_on(self, device: Device) -> _Lane | None:
        """Return a lane on this GPU, smaller where memory is short, or None if it has no room."""
        room = self._rooms[id(device)]
        while room >= _SMALLEST_ARENA:
            try:
                lane = _Lane(self, device, device.allocate(room), room)
            except DeviceMemoryError:
                room //= 2
                continue
            if room < self._rooms[id(device)]:
                self._rooms[id(device)] = room
                self._notify(
                    f"{device.name} is short of memory: working in chunks of {room / 2**20:.3g} MiB"
                )
            return lane
        return None


def _even(codes: Codes, n: int, blocksize: int, dtype: str) -> bool:
    """Return whether the kernels can decode n codes of a matrix.

    They take some kinds of codes, and need 8 neighbours that share a scale, and whole blocks.  Of
    these kinds, weights of real models are so; others stay with the CPU engine.
    """
    columns = codes.columns
    eights = columns % 8 == 0 and (codes.block[1] % 8 == 0 or codes.block[1] >= columns)
    known = codes.kind in launches.CODE_SOURCES and codes.through in (None, "F32", dtype)
    return known and eights and n % blocksize == 0 and columns <= _WIDEST


@dataclass(frozen=True, slots=True)
class _Need:
    """Bytes of device memory that a piece of work needs.

    Attributes:
        granule: for each granule of the piece.
        fixed: for the whole piece.
    """

    granule: int
    fixed: int = 0


def _quantize_need(bits: int, blocksize: int, codes: Codes | None) -> _Need:
    """Return the device memory for quantizing; bits: of a source element."""
    arrays = GRANULE // 2 + 4 * (GRANULE // blocksize) + 8 * STATS
    arrays += 12 * launches.entries(GRANULE, blocksize)
    if codes is None:
        return _Need(GRANULE * bits // 8 + arrays)
    # At most one scale for every 8 elements, and those of the piece's first and last row; as many
    # zero points.
    numbers = 1 if codes.zero is None else 2
    scales, edges = numbers * GRANULE // 2, numbers * 8 * -(-codes.columns // codes.block[1])
    return _Need(GRANULE * bits // 8 + scales + arrays, edges)


def _dequantize_need(itemsize: int, blocksize: int, absmax: F32 | NestedAbsmax) -> _Need:
    """Return the device memory for decoding; itemsize: bytes of a decoded element."""
    arrays = GRANULE // 2 + GRANULE * itemsize
    if isinstance(absmax, NestedAbsmax):
        # The fixed part holds the map, and the codes of the run that the piece begins in.
        return _Need(arrays + 5 * (GRANULE // blocksize), 1024 + 2 * absmax.blocksize)
    return _Need(arrays + 4 * (GRANULE // blocksize))


@dataclass(frozen=True, slots=True)
class _Search:
    """A search for scales, as `Engine.search` is asked for it, by the pieces of a lane."""

    dtype: str
    blocksize: int
    quant_type: str
    ladder: Ladder
    importance: Importance | None

    def need(self) -> _Need:
        """Return the device memory of a piece."""
        a_block = 4 + 4 + 4 + 1 + 1  # absmax, unit, scale, index, outlier
        arrays = GRANULE // 2 + a_block * (GRANULE // self.blocksize) + 8 * STATS
        arrays += 12 * launches.entries(GRANULE, self.blocksize)
        columns = 0 if self.importance is None else self.importance.columns.nbytes
        table = launches.ladder(self.ladder).nbytes
        return _Need(GRANULE * ITEMSIZE[self.dtype] + arrays, columns + table)

    def measure(self, lane: _Lane, src: U8, unit: F32) -> None:
        """Write the unit of each run; a run is larger than a piece, and a multiple of a granule."""
        itemsize = ITEMSIZE[self.dtype]
        n = src.nbytes // itemsize
        absmax = np.empty(-(-n // self.blocksize), np.float32)
        for start, count in lane.pieces(n, lane.step(self.need())):
            last = start + count
            source = lane.upload(src[start * itemsize : last * itemsize])
            out = absmax[start // self.blocksize : -(-last // self.blocksize)].view(np.uint8)
            largest = lane.room(out.nbytes)
            lane.run(launches.measure(count, self.dtype, self.blocksize, source, largest))
            lane.download(out, largest)
        unit[:] = np.maximum.reduceat(absmax, np.arange(0, absmax.size, self.ladder.run))

    def run(
        self, lane: _Lane, src: U8, first: int, packed: U8, scales: ChosenScales, stats: F64,
        measured: bool,
    ) -> None:  # fmt: skip
        """Search the scales of a piece.

        Args:
            src: its elements.
            first: place of the first of them.
            packed, scales, stats: output; if `measured`, `scales.unit` is input.
        """
        n, blocks = src.nbytes // ITEMSIZE[self.dtype], scales.index.size
        rows = launches.entries(n, self.blocksize)
        weights = None
        if self.importance is not None:
            columns = self.importance.columns
            weights = launches.Weights(
                lane.upload(columns.view(np.uint8)),
                columns.size,
                (self.importance.first + first) % columns.size,
            )
        unit, absmax = scales.unit.view(np.uint8), lane.room(4 * blocks)
        if self.ladder.run == 1:
            at_unit = absmax
        else:
            at_unit = lane.upload(unit) if measured else lane.room(unit.nbytes)
        results = launches.Searched(
            lane.room(packed.nbytes), lane.room(blocks), at_unit, absmax, lane.room(4 * blocks),
            lane.room(blocks), lane.room(8 * rows), lane.room(4 * rows), lane.room(stats.nbytes),
        )  # fmt: skip
        tables = launches.Tables(
            lane.books[self.quant_type], lane.upload(launches.ladder(self.ladder)), self.ladder.run
        )
        source = lane.upload(src)
        lane.run(
            launches.search(
                n, self.dtype, self.blocksize, self.quant_type, tables, source, results, weights,
                measured,
            )
        )  # fmt: skip
        lane.download(packed, results.packed)
        lane.download(scales.index, results.index)
        lane.download(stats.reshape(-1).view(np.uint8), results.stats)
        if not measured:
            lane.download(unit, results.unit)


class _Lane:
    """A stream of one GPU with memory of its own, used by one thread at a time.

    Its device memory (the arena) is handed out from front to back, and all of it is free again at
    the start of each piece of work.

    Args:
        engine: the engine that knows which arrays are pinned.
        device: the GPU.
        memory: the arena.
        nbytes: bytes of the arena.

    Attributes:
        books: device address of each 4-bit table by quant_type, see `launches.book`.
        midpoints: device address of `codebook.nested_midpoints()`.
    """

    def __init__(self, engine: CudaEngine, device: Device, memory: Memory, nbytes: int) -> None:
        self._engine = engine
        self._memory = memory
        self._end = nbytes
        self._stream = device.stream()
        self._staging = device.host_buffer(STAGING)
        self._waiting: list[tuple[U8, U8]] = []  # (target, staging memory that it is copied from)
        self._base = self._next = self._staged = 0
        self.books = {q: self.upload(launches.book(q)) for q in codebook.QUANT_TYPES}
        self.midpoints = self.upload(codebook.nested_midpoints().view(np.uint8))
        self.finish()
        self._base = self._next

    def step(self, need: _Need) -> int:
        """Return the elements of the largest piece that the arena allows: whole granules."""
        slack = _ARRAYS * _ALIGN  # what aligning the arrays may cost
        return GRANULE * max(1, (self._end - self._base - need.fixed - slack) // need.granule)

    def pieces(self, n: int, step: int) -> Iterator[tuple[int, int]]:
        """Cut n elements into pieces of `step` elements and a last one with the rest.

        The arena is free again at the start of each piece; its results are in place when the next
        piece starts.

        Yields:
            (index of the piece's first element, elements in it).
        """
        for start in range(0, n, step):
            self._next = self._base
            yield start, min(step, n - start)
            self.finish()

    def room(self, nbytes: int) -> int:
        """Return the device address of `nbytes` free bytes of the arena."""
        place = self._next
        self._next += -(-nbytes // _ALIGN) * _ALIGN
        if self._next > self._end:
            raise AssertionError("a piece of work is larger than its lane")
        return self._memory.address + place

    def upload(self, array: U8) -> int:
        """Copy an array to the arena and return its device address."""
        address = self.room(array.nbytes)
        if self._engine.is_pinned(array):
            self._stream.upload(address, array)
            return address
        for start in range(0, array.nbytes, STAGING):
            part = array[start : start + STAGING]
            staged = self._stage(part.nbytes)
            staged[:] = part
            self._stream.upload(address + start, staged)
        return address

    def download(self, array: U8, address: int) -> None:
        """Copy device memory into `array`, which holds the bytes only after `finish`."""
        if self._engine.is_pinned(array):
            self._stream.download(array, address)
            return
        for start in range(0, array.nbytes, STAGING):
            part = array[start : start + STAGING]
            staged = self._stage(part.nbytes)
            self._stream.download(staged, address + start)
            self._waiting.append((part, staged))

    def run(self, work: Iterable[Launch]) -> None:
        """Launch kernels on the stream, in order."""
        for launch in work:
            self._stream.launch(launch.kernel, launch.blocks, launch.threads, launch.arguments)

    def finish(self) -> None:
        """Wait until all work is done and every downloaded array is filled.

        Raises:
            MachineError: the GPU failed.
        """
        self._stream.synchronize()
        for array, staged in self._waiting:
            array[:] = staged
        self._waiting.clear()
        self._staged = 0

    def factors(self, codes: Codes, count: int) -> launches.Codes:
        """Upload the scales of `count` codes and return the kernels' argument."""
        rows, columns = codes.block
        row, column = divmod(codes.first, codes.columns)
        wide = -(-codes.columns // columns)
        first, last = row // rows, (codes.first + count - 1) // codes.columns // rows
        part = slice(first * wide, (last + 1) * wide)
        scale, zero = codes.scale[part], None if codes.zero is None else codes.zero[part]
        return launches.Codes(
            row - first * rows, column, codes.columns, (rows, columns), wide,
            self.upload(scale.view(np.uint8)), codes.kind,
            0 if zero is None else self.upload(zero.view(np.uint8)),
        )  # fmt: skip

    def scales(self, absmax: F32 | NestedAbsmax, first: int, last: int) -> launches.Scales:
        """Upload the absmax of blocks [first, last) and return the kernels' argument."""
        if not isinstance(absmax, NestedAbsmax):
            return launches.Scales(absmax=self.upload(absmax[first:last].view(np.uint8)))
        first, last = absmax.skip + first, absmax.skip + last
        run = first // absmax.blocksize
        units = absmax.absmax[run : -(-last // absmax.blocksize)]
        return launches.Scales(
            codes=self.upload(absmax.codes[first:last]),
            nested_map=self.upload(absmax.map.view(np.uint8)),
            nested_absmax=self.upload(units.view(np.uint8)),
            offset=absmax.offset,
            nested_blocksize=absmax.blocksize,
            first=first - run * absmax.blocksize,
        )

    def _stage(self, nbytes: int) -> U8:
        """Return pinned memory for one copy; wait for earlier copies if all of it is in use."""
        if self._staged + nbytes > STAGING:
            self.finish()
        start = self._staged
        self._staged += -(-nbytes // _ALIGN) * _ALIGN
        return self._staging[start : start + nbytes]
