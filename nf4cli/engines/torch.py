"""The reference engine: the format's arithmetic in plain torch, made to be read.

It is much slower than the compiled engines, which must equal it byte
for byte.  Each step is the corresponding step of bitsandbytes 0.50.2's default implementation
(bitsandbytes/backends/default/ops.py), except the order of the offset's sum, which bitsandbytes
leaves to the machine and we define.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .. import codebook
from ..errors import MachineError, NonFiniteError
from . import GRANULE

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from . import F32, F64, U8

_ROW = 16  # interleaved partial sums, see cuda/nf4_host.cpp


class TorchEngine:
    """See `Engine`.

    Args:
        device: a torch device with float64 ("cpu", "xpu", "cuda").

    Raises:
        MachineError: torch is not installed.
    """

    def __init__(self, device: str = "cpu") -> None:
        try:
            import torch
        except ImportError as error:
            raise MachineError(
                "the torch engine needs torch: pip install 'nf4cli[torch]' (or use --engine cpu)"
            ) from error
        self._torch: Any = torch
        self._device = torch.device(device)
        self._dtypes = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
        self.name = f"torch ({device})"

    def quantize(
        self, src: U8, dtype: str, blocksize: int, quant_type: str, packed: U8, absmax: F32
    ) -> F64:
        torch, book = self._torch, codebook.codebook(quant_type)
        x = self._load(src, dtype)
        bad = (~torch.isfinite(x)).nonzero()
        if len(bad):
            raise NonFiniteError(int(bad[0]))
        n = x.numel()
        full = n - n % blocksize
        blocks = x[:full].reshape(-1, blocksize)
        scale = blocks.abs().amax(dim=1) if full else x[:0]
        y = (blocks * (1.0 / scale.clamp(min=1e-38)).unsqueeze(1)).reshape(-1)
        if full < n:  # the tail block divides, and floors its absmax
            tail = x[full:].abs().max().clamp(min=1e-38)
            scale = torch.cat([scale, tail.unsqueeze(0)])
            y = torch.cat([y, x[full:] / tail])
        # Pad to whole blocks with 0.0: an odd n then has a nibble to spare, with 0.0's code.
        y = torch.nn.functional.pad(y, (0, -n % blocksize))
        rank = torch.bucketize(y, self._to(book.midpoints))  # midpoints below y
        codes = self._to(book.codes)[rank]
        _store(packed, ((codes[::2] << 4) | codes[1::2])[: (n + 1) // 2])
        _store(absmax, scale)
        return self._sums(y - self._to(book.values)[rank], y, scale, blocksize)

    def dequantize(
        self, packed: U8, n: int, blocksize: int, quant_type: str, absmax: F32, dtype: str, out: U8
    ) -> None:
        torch = self._torch
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
        return float(terms.cumsum(0)[-1])  # a scan adds strictly from left to right

    def nested_quantize(self, absmax: F32, offset: float, codes: U8, nested_absmax: F32) -> None:
        torch = self._torch
        x = self._to(absmax) - torch.tensor(offset, dtype=torch.float32, device=self._device)
        full = x.numel() - x.numel() % codebook.NESTED_BLOCKSIZE
        runs = x[:full].reshape(-1, codebook.NESTED_BLOCKSIZE)
        scale = runs.abs().amax(dim=1) if full else x[:0]
        y = (runs * (1.0 / scale.clamp(min=1e-38)).unsqueeze(1)).reshape(-1)
        if full < x.numel():
            tail = x[full:].abs().max().clamp(min=1e-38)
            scale = torch.cat([scale, tail.unsqueeze(0)])
            y = torch.cat([y, x[full:] / tail])
        _store(codes, torch.bucketize(y, self._to(codebook.nested_midpoints())).to(torch.uint8))
        _store(nested_absmax, scale)

    def nested_dequantize(
        self,
        codes: U8,
        nested_blocksize: int,
        nested_map: F32,
        nested_absmax: F32,
        offset: float,
        out: F32,
    ) -> None:
        torch = self._torch
        values = self._to(nested_map)[self._to(codes).to(torch.int64)]
        scale = self._to(nested_absmax).repeat_interleave(nested_blocksize)[: codes.size]
        product = values * scale
        _store(out, product + torch.tensor(offset, dtype=torch.float32, device=self._device))

    def cast(self, src: U8, from_dtype: str, dst: U8, to_dtype: str) -> None:
        torch = self._torch
        x = self._load(src, from_dtype)
        y = x.to(self._dtypes[to_dtype])
        _store(dst, y.view(torch.uint8))
        bad = (torch.isfinite(x) & ~torch.isfinite(y)).nonzero()
        if len(bad):
            raise NonFiniteError(int(bad[0]))

    def decode_float8(
        self, src: U8, first: int, columns: int, scale: F32, block: tuple[int, int],
        dst: U8, to_dtype: str,
    ) -> None:  # fmt: skip
        torch = self._torch
        values = self._to(src).view(torch.float8_e4m3fn).float()
        place = first + torch.arange(src.nbytes, device=self._device)
        row, column = place // columns, place % columns
        unit = self._to(scale)[row // block[0] * -(-columns // block[1]) + column // block[1]]
        y = (values * unit).to(self._dtypes[to_dtype])
        _store(dst, y.view(torch.uint8))
        bad = (~torch.isfinite(y)).nonzero()
        if len(bad):
            raise NonFiniteError(int(bad[0]))

    def _sums(self, error: Any, y: Any, scale: Any, blocksize: int) -> F64:
        """The error sums, added in the order that cuda/nf4_host.cpp defines."""
        torch = self._torch

        def block_sums(squares: Any) -> Any:
            rows = squares.reshape(-1, blocksize // _ROW, _ROW)
            lanes = torch.zeros_like(rows[:, 0])
            for i in range(rows.shape[1]):
                lanes = lanes + rows[:, i]
            while lanes.shape[1] > 1:
                half = lanes.shape[1] // 2
                lanes = lanes[:, :half] + lanes[:, half:]
            return lanes[:, 0].double()

        per_granule = GRANULE // blocksize
        missing = -scale.numel() % per_granule
        unit2 = scale.double() * scale.double()
        out = []
        for squares in (error * error, y * y):
            terms = torch.nn.functional.pad(unit2 * block_sums(squares), (0, missing))
            total = torch.zeros(
                terms.numel() // per_granule, dtype=torch.float64, device=self._device
            )
            for i in range(per_granule):
                total = total + terms.reshape(-1, per_granule)[:, i]
            out.append(total)
        worst = (error.abs().reshape(-1, blocksize) * scale.unsqueeze(1)).amax(dim=1)
        worst = torch.nn.functional.pad(worst, (0, missing)).reshape(-1, per_granule)
        out.append(worst.amax(dim=1).double())
        sums: F64 = torch.stack(out, dim=1).cpu().numpy()
        return sums

    def _load(self, src: U8, dtype: str) -> Any:
        return self._to(src).view(self._dtypes[dtype]).float()

    def _to(self, array: NDArray[Any]) -> Any:
        return _tensor(self._torch, array).to(self._device)


def _tensor(torch: Any, array: NDArray[Any]) -> Any:
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def _store(array: NDArray[Any], tensor: Any) -> None:
    np.copyto(array, tensor.cpu().numpy())
