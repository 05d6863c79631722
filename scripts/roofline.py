#!/usr/bin/env python
"""What the GPU kernels can reach, on paper: their machine code held against a GPU's two limits.

    .venv/bin/python scripts/roofline.py [--json FILE]

Compiles the kernels for each generation with NVRTC and takes them apart with NVIDIA's cuobjdump;
no GPU is needed, and none is measured.  For each kernel: registers, spills, the widest load and
store, instructions a weight on the longest way through it, bytes of device memory a weight, and
which of two ends first: memory bandwidth, or the instructions that its processors can issue.  The
limits are those of data sheets (GPUS below); a real kernel reaches less of both.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from nf4cli.engines import nvrtc
from nf4cli.engines.protocol import GRANULE


@dataclass(frozen=True, slots=True)
class Gpu:
    """Limits from NVIDIA's data sheets.

    Attributes:
        bandwidth: bytes/s of device memory.
        issue: instructions/s, of single threads: processors x 4 schedulers x 32 threads x clock.
    """

    name: str
    bandwidth: float
    issue: float


GPUS = {
    "80": Gpu("A100 SXM 80GB", 2.039e12, 108 * 128 * 1.41e9),
    "90": Gpu("H100 SXM", 3.35e12, 132 * 128 * 1.98e9),
    "100": Gpu("B200", 8.0e12, 148 * 128 * 1.965e9),
}


@dataclass(frozen=True, slots=True)
class Kind:
    """One kernel of the table, at blocksize 64.

    Attributes:
        weights: of the model, that a thread deals with.
        nbytes: of device memory read and written a weight.
        trips: times that the body of a loop runs.
    """

    title: str
    kernel: str
    weights: float
    nbytes: float
    trips: int = 1


_SUMS, _ABSMAX = 12 / 64, 4 / 64
_CHOSEN = (4 + 4 + 1 + 1) / 64  # absmax, scale, index, outlier
_TURNS, _WEIGHTED_TURNS = 7, 54
"""Turns of the loop over two candidates, on average over warps, as counted on normally distributed
weights under the ladders with double quantization."""
KINDS = (
    Kind("quantize bf16 to NF4", "quantize<2, 2, 1, false, false>", 32, 2.5 + _ABSMAX + _SUMS),
    Kind("quantize f16 to NF4", "quantize<1, 1, 1, false, false>", 32, 2.5 + _ABSMAX + _SUMS),
    Kind("quantize f32 to NF4", "quantize<0, 0, 1, false, false>", 32, 4.5 + _ABSMAX + _SUMS),
    Kind("quantize float8 to NF4", "quantize<3, 2, 1, false, false>", 32, 1.5 + _ABSMAX + _SUMS),
    Kind("quantize bf16 to FP4", "quantize<2, 2, 2, false, false>", 32, 2.5 + _ABSMAX + _SUMS),
    Kind("largest magnitudes, bf16", "measure_blocks<2, false>", 32, 2 + _ABSMAX),
    Kind(
        "search bf16 to NF4", "search_scales<2, 1, false, true>", 32, 2.5 + _CHOSEN + _SUMS, _TURNS
    ),
    Kind(
        "the same with importance",
        "search_scales<2, 1, false, false>",
        32,
        2.5 + _CHOSEN + _SUMS,
        _WEIGHTED_TURNS,
    ),
    Kind("fold error sums", "fold_errors", GRANULE / 32, _SUMS + _ABSMAX, GRANULE // 64 // 32),
    Kind("double quantization", "nested_quantize<false>", 16 * 64, (5 + 4 / 256) / 64),
    Kind("dequantize to bf16, nested", "dequantize<2, true>", 32, 2.5 + 1 / 64),
    Kind("dequantize to f16, nested", "dequantize<1, true>", 32, 2.5 + 1 / 64),
    Kind("dequantize to f32, nested", "dequantize<0, true>", 32, 4.5 + 1 / 64),
)


@dataclass(frozen=True, slots=True)
class Code:
    """What cuobjdump says of one kernel.

    Attributes:
        registers: a thread.
        stack, local: bytes a thread: spills, and arrays that are not in registers.
        shared: bytes a block.
        instructions: (address, opcode with modifiers, operands), without padding.
    """

    registers: int
    stack: int
    local: int
    shared: int
    instructions: tuple[tuple[int, str, str], ...]

    def count(self, prefix: str) -> int:
        """Instructions whose opcode begins so."""
        return sum(op.startswith(prefix) for _, op, _ in self.instructions)

    def widest(self, opcode: str) -> int:
        """Bytes of the widest access of LDG or STG."""
        widths = [0]
        for _, op, _ in self.instructions:
            if op.split(".")[0] == opcode:
                found = re.search(r"\.(128|64|[US]?16|[US]?8)\b", op)
                widths.append(int(found[1].strip("US")) // 8 if found else 4)
        return max(widths)

    def longest_path(self, trips: int = 1) -> int:
        """Instructions on the longest way from the first to an EXIT, loops run `trips` times.

        Ways that exclude each other (a whole tile or the last one) are not added up.  What serves
        exceptions does not count: the slow path of divisions, a function that is called for
        subnormals only, and the copies of code for warps whose threads have come apart (BRA.DIV).
        """
        jumps = self._jumps()
        reached = self._reached(jumps)
        weight = [1] * len(self.instructions)
        for i, to in jumps.items():
            if to < i and i in reached:
                weight[to : i + 1] = [trips] * (i + 1 - to)
        best = [0] * (len(weight) + 1)
        for i in range(len(weight) - 1, -1, -1):
            onward = [best[k] for k in self._onward(i, jumps) if k > i]
            best[i] = weight[i] + max(onward, default=0)
        return best[0]

    def _jumps(self) -> dict[int, int]:
        """Return where branches lead: index of an instruction -> index of its target."""
        index = {address: i for i, (address, _, _) in enumerate(self.instructions)}
        jumps = {}
        for i, (_, op, operands) in enumerate(self.instructions):
            target = re.search(r"0x([0-9a-f]+)\s*$", operands)
            if op.split(".")[0] != "BRA" or op.startswith("BRA.DIV") or target is None:
                continue
            to = index.get(int(target[1], 16))
            if to is not None and to != i:  # otherwise padding behind the end
                jumps[i] = to
        return jumps

    def _onward(self, i: int, jumps: dict[int, int]) -> list[int]:
        """Return the instructions that may come after one."""
        _, op, operands = self.instructions[i]
        always = not operands.startswith("@")
        if always and op.split(".")[0] in ("EXIT", "RET"):
            return []
        if i not in jumps:
            return [i + 1]
        plain = op == "BRA" and always and re.fullmatch(r"0x[0-9a-f]+\s*", operands)
        return [jumps[i]] if plain else [i + 1, jumps[i]]

    def _reached(self, jumps: dict[int, int]) -> set[int]:
        """Return the instructions that there is a way to."""
        reached: set[int] = set()
        ahead = [0]
        while ahead:
            i = ahead.pop()
            if i not in reached and i < len(self.instructions):
                reached.add(i)
                ahead += self._onward(i, jumps)
        return reached


def tool(name: str) -> str:
    """A program of the nvidia-cuda-* packages."""
    for folder in sys.path:
        for path in Path(folder).glob(f"nvidia/cu*/bin/{name}"):
            return str(path)
    sys.exit(f"{name} is not installed: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")


def disassemble(cubin: bytes) -> dict[str, Code]:
    """Every kernel of a cubin by its name in there."""
    environment = {**os.environ, "PATH": f"{Path(tool('nvdisasm')).parent}:{os.environ['PATH']}"}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def dump(option: str) -> str:
            return subprocess.run(
                [tool("cuobjdump"), option, file.name],
                capture_output=True, text=True, env=environment, check=True,
            ).stdout  # fmt: skip

        usage, sass = dump("-res-usage"), dump("-sass")
    kernels = {}
    for part in re.split(r"\n\s*Function : ", sass)[1:]:
        name = part.split()[0]
        found = re.search(
            rf"Function {re.escape(name)}:\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage
        )
        assert found is not None, name
        registers, stack, shared, local = map(int, found.groups())
        lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+ )?\s*([A-Z][\w.]*)([^;]*);", part)
        instructions = tuple(
            (int(address, 16), op, guard + rest.strip())
            for address, guard, op, rest in lines
            if op != "NOP"
        )
        kernels[name] = Code(registers, stack, local, shared, instructions)
    return kernels


def machine_code(arch: str, kernels: tuple[str, ...]) -> Mapping[str, Code]:
    """Kernels, as C++ names them, compiled for a generation of GPUs and taken apart."""
    cubin, names = nvrtc.compile_kernels(kernels, f"sm_{arch}")
    found = disassemble(cubin)
    return {kernel: found[names[kernel]] for kernel in kernels}


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the table; rates are weights/s."""

    kernel: str
    arch: str
    gpu: str
    registers: int
    spills: int
    load: int
    store: int
    instructions: float
    nbytes: float
    memory_rate: float
    issue_rate: float

    @property
    def bound(self) -> str:
        return "memory" if self.memory_rate <= self.issue_rate else "issue"


def rows() -> list[Row]:
    """Every kernel of KINDS for every GPU of GPUS."""
    table = []
    for arch, gpu in GPUS.items():
        codes = machine_code(arch, tuple(kind.kernel for kind in KINDS))
        for kind in KINDS:
            code = codes[kind.kernel]
            instructions = code.longest_path(kind.trips) / kind.weights
            table.append(
                Row(
                    kind.title, arch, gpu.name, code.registers, code.stack + code.local,
                    code.widest("LDG"), code.widest("STG"), instructions, kind.nbytes,
                    gpu.bandwidth / kind.nbytes, gpu.issue / instructions,
                )
            )  # fmt: skip
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the table as JSON, too")
    options = parser.parse_args()
    table = rows()
    version = ".".join(map(str, nvrtc.compiler().getVersion()))
    print(f"Computed from the machine code of NVRTC {version}; not measured.\n")
    print("| kernel, blocksize 64 | GPU | registers, spills | widest load, store | instructions a "
          "weight | bytes a weight | limit of memory | limit of issue | bound |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|---|")
    for row in table:
        print(
            f"| {row.kernel} | {row.gpu}, sm_{row.arch} | {row.registers}, {row.spills} | "
            f"{row.load} B, {row.store} B | {row.instructions:.1f} | {row.nbytes:.2f} | "
            f"{row.memory_rate / 1e9:,.0f} G/s | {row.issue_rate / 1e9:,.0f} G/s | {row.bound} |"
        )
    if options.json:
        document = [{**asdict(row), "bound": row.bound} for row in table]
        options.json.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
