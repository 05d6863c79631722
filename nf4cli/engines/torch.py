"""The reference engine: the format's arithmetic in plain torch, written to be read.

It is much slower than the compiled engines, which must give the same bytes.  `quantize`,
`dequantize` and double quantization follow bitsandbytes 0.50.2's default implementation step by
step (bitsandbytes/backends/default/ops.py).  The order of `sum`, which gives the offset of double
quantization, depends on the machine in bitsandbytes and is defined here.  The error sums and the
search for scales are our own; cuda/codec.h and cuda/cpu_scales.h define them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import MachineError, NonFiniteError
from ..format import codebook
from .protocol import GRANULE, ROW, SEGMENT, ChosenScales, Codes, Importance, NestedAbsmax

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .protocol import F32, F64, U8

# Outlier blocks (cuda/codec.h) compare sums of squares as integers: the unit is a squared absmax,
# then come a hundredth of the unit, and the largest number of units that a segment counts.
_OUTLIER_UNIT, _OUTLIER_SHARE, _OUTLIER_MOST = 65_536, 655, 128


class TorchEngine:
    """The `Engine` in plain torch; see there for the methods.

    Args:
        device: a torch device that computes in float64 ("cpu", "xpu", "cuda").

    Raises:
        MachineError: torch is not installed, or cannot use the device.
    """

    def __init__(self, device: str = "cpu") -> None:
        try:
            import torch
        except ImportError as error:
            raise MachineError(
                "the torch engine needs torch: pip install 'nf4cli[torch]' (or use --engine cpu)"
            ) from error
        self._torch: Any = torch
        try:
            self._device = torch.device(device)
            torch.zeros(1, dtype=torch.float64, device=self._device)
        except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
            reason = str(error).splitlines()[0]
            raise MachineError(
                f"torch cannot use --device {device!r} ({reason}): name a device that this torch "
                "has and that computes in float64, such as cpu"
            ) from error
        self._dtypes = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
        self.name = f"torch ({device})"
        self.spare_threads = self.extra_memory = 0
        self.worker_memory = 2_000_000
        self.item_bytes = 4 << 20

    def buffer(self, nbytes: int) -> U8:
        return np.empty(nbytes, np.uint8)

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
        torch, book = self._torch, codebook.codebook(quant_type)
        x = self._load(src, dtype) if codes is None else self._decoded(src, codes, dtype).float()
        nonfinite = (~torch.isfinite(x)).nonzero()
        if len(nonfinite):
            raise NonFiniteError(int(nonfinite[0]))
        n = x.numel()
        full = n - n % blocksize
        blocks = x[:full].reshape(-1, blocksize)
        scale = blocks.abs().amax(dim=1) if full else x[:0]
        y = (blocks * (1.0 / scale.clamp(min=codebook.ABSMAX_FLOOR)).unsqueeze(1)).reshape(-1)
        if full < n:  # bitsandbytes divides the last, short block, and stores a floored absmax
            tail = x[full:].abs().max().clamp(min=codebook.ABSMAX_FLOOR)
            scale = torch.cat([scale, tail.unsqueeze(0)])
            y = torch.cat([y, x[full:] / tail])
        # Pad to whole blocks with 0.0; for an odd n, the spare nibble is then the code of 0.0.
        y = torch.nn.functional.pad(y, (0, -n % blocksize))
        rank = torch.bucketize(y, self._to(book.midpoints))  # number of midpoints below y
        nibbles = self._to(book.codes)[rank]
        _store(packed, ((nibbles[::2] << 4) | nibbles[1::2])[: (n + 1) // 2])
        _store(absmax, scale)
        sums = self._sums(y - self._to(book.values)[rank], y, scale, blocksize)
        return np.column_stack([sums, self._outliers(x, y, scale, blocksize)])

    def search(
        self,
        src: U8,
        dtype: str,
        blocksize: int,
        quant_type: str,
        ladder: codebook.Ladder,
        importance: Importance | None,
        packed: U8,
        scales: ChosenScales,
    ) -> F64:
        torch, book = self._torch, codebook.codebook(quant_type)
        x = self._load(src, dtype)
        nonfinite = (~torch.isfinite(x)).nonzero()
        if len(nonfinite):
            raise NonFiniteError(int(nonfinite[0]))
        n = x.numel()
        weight = None if importance is None else self._weights(importance, n, blocksize)
        flat = torch.nn.functional.pad(x, (0, -n % blocksize))
        blocks = flat.reshape(-1, blocksize)
        absmax = blocks.abs().amax(dim=1)
        runs = torch.nn.functional.pad(absmax, (0, -absmax.numel() % ladder.run))
        units = runs.reshape(-1, ladder.run).amax(dim=1)
        _store(scales.unit, units)
        units = units.repeat_interleave(ladder.run)[: absmax.numel()]
        best = self._best_steps(blocks, weight, absmax, units, ladder, quant_type)
        _store(scales.index, best.to(torch.uint8))
        scale = self._to(ladder.steps)[best] * units + 0.0
        y = (blocks * _inverse(torch, scale).unsqueeze(1)).reshape(-1)
        rank = torch.bucketize(y, self._to(book.midpoints))
        codes = self._to(book.codes)[rank]
        _store(packed, ((codes[::2] << 4) | codes[1::2])[: (n + 1) // 2])
        size = scale.abs()
        sums = self._sums(y - self._to(book.values)[rank], y, size, blocksize)
        ratio = size * (1.0 / absmax.clamp(min=codebook.ABSMAX_FLOOR))
        return np.column_stack(
            [sums, self._outliers(x, y, absmax, blocksize, (ratio * ratio).double())]
        )

    def _best_steps(
        self,
        blocks: Any,
        weight: Any,
        absmax: Any,
        unit: Any,
        ladder: codebook.Ladder,
        quant_type: str,
    ) -> Any:
        """Return the step of least loss for each block, tried in the order of cuda/cpu_scales.h.

        Args:
            blocks: float32 [blocks, blocksize].
            weight: float32 [blocks, blocksize], the importance of each element, or None.
            absmax: float32 [blocks].
            unit: float32 [blocks], the unit of each block's run.

        Returns:
            int64 [blocks], indices into `ladder.steps`.
        """
        torch, book = self._torch, codebook.codebook(quant_type)
        steps, zero = self._to(ladder.steps), ladder.zero
        low, high = (
            torch.tensor(bound, dtype=torch.float32, device=self._device) * absmax
            for bound in (ladder.low, ladder.high)
        )
        high = high.clamp(max=torch.finfo(torch.float32).max)
        smallest = torch.full_like(absmax, float("inf"))
        best = torch.full_like(absmax, zero + 1, dtype=torch.int64)
        for sign in (1, -1):
            half = steps[zero + 1 :] if sign > 0 else -steps[:zero].flip(0)
            below = (half.unsqueeze(0) * unit.unsqueeze(1) < low.unsqueeze(1)).sum(dim=1)
            first = below.clamp(max=half.numel() - 1)
            for further in range(half.numel()):
                place = (first + further).clamp(max=half.numel() - 1)
                tried = (first + further < half.numel()) & (half[place] * unit <= high)
                if further and not tried.any():
                    break
                step = sign * half[place]
                y = blocks * _inverse(torch, step * unit + 0.0).unsqueeze(1)
                rank = torch.bucketize(y, self._to(book.midpoints))
                error = y - self._to(book.values)[rank]
                terms = error * error * (y.abs() if weight is None else weight)
                sums = self._segments(terms.reshape(-1), min(blocks.shape[1], SEGMENT))
                total = torch.zeros_like(absmax)
                for part in sums.float().reshape(absmax.numel(), -1).unbind(1):
                    total = total + part
                loss = total * (step * step)
                if weight is None:
                    loss = loss * step.abs()
                better = (loss < smallest) & (tried | (further == 0))
                smallest = torch.where(better, loss, smallest)
                best = torch.where(better, zero + sign * (place + 1), best)
        return best

    def _weights(self, importance: Importance, n: int, blocksize: int) -> Any:
        """Return the importance of n elements, float32 [blocks, blocksize], padded with zeros."""
        torch = self._torch
        columns = self._to(importance.columns)
        place = (importance.first + torch.arange(n, device=self._device)) % columns.numel()
        flat = torch.nn.functional.pad(columns[place], (0, -n % blocksize))
        return flat.reshape(-1, blocksize)

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
        torch = self._torch
        if isinstance(absmax, NestedAbsmax):
            absmax = self.nested_dequantize(absmax)
        data = self._to(packed).to(torch.int64)
        codes = torch.stack([data >> 4, data & 15], dim=1).reshape(-1)[:n]
        values = self._to(codebook.codebook(quant_type).decode)[codes]
        scale = self._to(absmax).repeat_interleave(blocksize)[:n]
        _store(out, (values * scale).to(self._dtypes[dtype]).view(torch.uint8))

    def sum(self, values: F32, carry: float) -> float:
        torch = self._torch
        terms = torch.cat(
            [torch.tensor([carry], dtype=torch.float64), _tensor(torch, values).double()]
        )
        return float(terms.cumsum(0)[-1])  # cumsum adds strictly from left to right

    def nested_quantize(self, absmax: F32, offset: float, codes: U8, nested_absmax: F32) -> None:
        torch = self._torch
        x = self._to(absmax) - torch.tensor(offset, dtype=torch.float32, device=self._device)
        full = x.numel() - x.numel() % codebook.NESTED_BLOCKSIZE
        runs = x[:full].reshape(-1, codebook.NESTED_BLOCKSIZE)
        scale = runs.abs().amax(dim=1) if full else x[:0]
        y = (runs * (1.0 / scale.clamp(min=codebook.ABSMAX_FLOOR)).unsqueeze(1)).reshape(-1)
        if full < x.numel():
            tail = x[full:].abs().max().clamp(min=codebook.ABSMAX_FLOOR)
            scale = torch.cat([scale, tail.unsqueeze(0)])
            y = torch.cat([y, x[full:] / tail])
        _store(codes, torch.bucketize(y, self._to(codebook.nested_midpoints())).to(torch.uint8))
        _store(nested_absmax, scale)

    def nested_dequantize(self, nested: NestedAbsmax) -> F32:
        torch = self._torch
        values = self._to(nested.map)[self._to(nested.codes).to(torch.int64)]
        scale = self._to(nested.absmax).repeat_interleave(nested.blocksize)[: nested.codes.size]
        product = values * scale
        offset = torch.tensor(nested.offset, dtype=torch.float32, device=self._device)
        out: F32 = (product + offset)[nested.skip :].cpu().numpy()
        return out

    def cast(self, src: U8, from_dtype: str, dst: U8, to_dtype: str) -> None:
        torch = self._torch
        if from_dtype == "F64":
            x = self._to(src).view(torch.float64)
            y = (x.float() if to_dtype == "F32" else self._to_odd(x)).to(self._dtypes[to_dtype])
        else:
            x = self._load(src, from_dtype)
            y = x.to(self._dtypes[to_dtype])
        _store(dst, y.view(torch.uint8))
        nonfinite = (torch.isfinite(x) & ~torch.isfinite(y)).nonzero()
        if len(nonfinite):
            raise NonFiniteError(int(nonfinite[0]))

    def _to_odd(self, x: Any) -> Any:
        """Return float64 [n] as float32, with the last bit set where that is not exact.

        Rounding it to 16 bits then gives what rounding the float64 once would give; torch rounds to
        float32 and then again.
        """
        torch, near = self._torch, x.float()
        distance = near.double() - x
        away = torch.where(x > 0, distance > 0, distance < 0).int()
        odd = ((near.view(torch.int32) - away) | 1).view(torch.float32)
        return torch.where((distance == 0) | distance.isnan(), near, odd)

    def decode_codes(self, src: U8, codes: Codes, dst: U8, to_dtype: str) -> None:
        torch = self._torch
        y = self._decoded(src, codes, to_dtype)
        _store(dst, y.view(torch.uint8))
        nonfinite = (~torch.isfinite(y)).nonzero()
        if len(nonfinite):
            raise NonFiniteError(int(nonfinite[0]))

    def add_product(self, values: F32, first: int, left: F32, right: F32, scale: float) -> None:
        torch, (rows, rank), columns = self._torch, left.shape, right.shape[1]
        narrow, wide = self._to(left), self._to(right)
        product = torch.zeros(rows, columns, dtype=torch.float32, device=self._device)
        for k in range(rank):
            product = product + narrow[:, k : k + 1] * wide[k]
        product = product * torch.tensor(scale, dtype=torch.float32, device=self._device)
        part = product.reshape(-1)[first : first + values.size]
        _store(values, self._to(values) + part)

    def square_sums(self, values: F32) -> F64:
        torch = self._torch
        x = self._to(values).double()
        rows = torch.nn.functional.pad(x, (0, -x.shape[1] % ROW)).reshape(x.shape[0], -1, ROW)
        lanes = torch.zeros_like(rows[:, 0])
        for i in range(rows.shape[1]):
            lanes = lanes + rows[:, i] * rows[:, i]
        while lanes.shape[1] > 1:
            half = lanes.shape[1] // 2
            lanes = lanes[:, :half] + lanes[:, half:]
        sums: F64 = lanes[:, 0].cpu().numpy()
        return sums

    def _decoded(self, src: U8, codes: Codes, dtype: str) -> Any:
        """Return the values of stored codes as a tensor of `dtype`, [codes]."""
        torch, (rows, columns) = self._torch, codes.block
        data = self._to(src).to(torch.int64)
        if codes.bits == 4:
            data = torch.stack([data & 15, data >> 4], dim=1).reshape(-1)
        values = self._to(codebook.code_values(codes.kind))[data]
        place = codes.first + torch.arange(data.numel(), device=self._device)
        row, column = place // codes.columns, place % codes.columns
        wide = -(-codes.columns // columns)
        block = row // rows * wide + column // columns
        if codes.zero is not None:
            values = values - self._to(codes.zero)[block]
        values = values * self._to(codes.scale)[block]
        return values.to(self._dtypes[codes.through or "F32"]).to(self._dtypes[dtype])

    def _sums(self, error: Any, y: Any, scale: Any, blocksize: int) -> F64:
        """Return the first three columns of a row of error sums, see `Engine.quantize`.

        They are added in the order that cuda/codec.h defines.

        Args:
            error, y: float32 [blocks * blocksize], errors and values in units of the block's scale.
            scale: float32 [blocks].

        Returns:
            float64 [granules, 3].
        """
        torch = self._torch
        segment = min(blocksize, SEGMENT)
        worst = (error.abs().reshape(-1, blocksize) * scale.unsqueeze(1)).amax(dim=1)
        units = scale.double().repeat_interleave(blocksize // segment)
        per_granule = GRANULE // segment
        missing = -units.numel() % per_granule
        out = []
        for squares in (error * error, y * y):
            terms = torch.nn.functional.pad(
                units * units * self._segments(squares, segment), (0, missing)
            )
            total = torch.zeros(
                terms.numel() // per_granule, dtype=torch.float64, device=self._device
            )
            for i in range(per_granule):
                total = total + terms.reshape(-1, per_granule)[:, i]
            out.append(total)
        blocks = GRANULE // blocksize
        worst = torch.nn.functional.pad(worst, (0, -worst.numel() % blocks)).reshape(-1, blocks)
        out.append(worst.amax(dim=1).double())
        sums: F64 = torch.stack(out, dim=1).cpu().numpy()
        return sums

    def _segments(self, squares: Any, segment: int) -> Any:
        """Return the sum of each segment, added in the order that cuda/codec.h defines.

        Args:
            squares: float32 [segments * segment].

        Returns:
            float64 [segments]; the sums themselves are rounded to float32.
        """
        rows = squares.reshape(-1, segment // ROW, ROW)
        lanes = self._torch.zeros_like(rows[:, 0])
        for i in range(rows.shape[1]):
            lanes = lanes + rows[:, i]
        while lanes.shape[1] > 1:
            half = lanes.shape[1] // 2
            lanes = lanes[:, :half] + lanes[:, half:]
        return lanes[:, 0].double()

    def _outliers(
        self, x: Any, y: Any, scale: Any, blocksize: int, unit2: Any = None
    ) -> NDArray[np.int64]:
        """Return the number of outlier blocks in each granule, as cuda/codec.h defines them.

        Args:
            x: float32 [n], the elements.
            y: float32 [blocks * blocksize], the elements in units of the block's scale.
            scale: float32 [blocks], the absmax of each block.
            unit2: float64 [blocks], the square of scale / absmax where the scale is not the absmax;
                None where it is.

        Returns:
            int64 [granules].
        """
        torch = self._torch
        segment = min(blocksize, SEGMENT)
        squares = self._segments(y * y, segment)
        if unit2 is not None:
            squares = squares.float() * unit2.float().repeat_interleave(blocksize // segment)
        units = (squares.double().clamp(max=float(_OUTLIER_MOST)) * _OUTLIER_UNIT).floor()
        units = units.reshape(scale.numel(), -1).sum(dim=1)
        size = torch.full_like(units, blocksize)
        size[-1] -= -x.numel() % blocksize
        x = torch.nn.functional.pad(x.abs(), (0, -x.numel() % blocksize)).reshape(-1, blocksize)
        between = ((x != 0) & (x != scale.unsqueeze(1))).any(dim=1)
        outliers = (
            between
            & (scale > codebook.ABSMAX_FLOOR)
            & (units - _OUTLIER_UNIT < _OUTLIER_SHARE * (size - 1))
        )
        per_granule = GRANULE // blocksize
        outliers = torch.nn.functional.pad(outliers, (0, -outliers.numel() % per_granule))
        counts: NDArray[np.int64] = outliers.reshape(-1, per_granule).sum(dim=1).cpu().numpy()
        return counts

    def _load(self, src: U8, dtype: str) -> Any:
        """Return raw bytes of `dtype` as a float32 tensor on the device."""
        return self._to(src).view(self._dtypes[dtype]).float()

    def _to(self, array: NDArray[Any]) -> Any:
        """Return an array as a tensor on the device."""
        return _tensor(self._torch, array).to(self._device)


def _inverse(torch: Any, scale: Any) -> Any:
    """Return 1/scale with its sign, as nf4_signed_reciprocal of cuda/codec.h computes it."""
    inverse = 1.0 / scale.abs().clamp(min=codebook.ABSMAX_FLOOR)
    return torch.where(scale < 0, -inverse, inverse)


def _tensor(torch: Any, array: NDArray[Any]) -> Any:
    """Return an array as a tensor in host memory; torch wants writable memory, so copy others."""
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def _store(array: NDArray[Any], tensor: Any) -> None:
    """Copy a tensor into an array."""
    np.copyto(array, tensor.cpu().numpy())
