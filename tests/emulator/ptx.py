"""NVRTC's PTX -> C++ over runtime.h, so that what NVIDIA's compiler made runs on a CPU.

Every instruction the kernels use has a line here; an unknown one raises `UnsupportedError`, so
nothing is skipped silently.  Registers become integers of raw bits, a kernel a function of gotos.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

_COMPARISONS = {
    "eq": "eq", "ne": "ne", "lt": "lt", "le": "le", "gt": "gt", "ge": "ge",
    "lo": "lt", "ls": "le", "hi": "gt", "hs": "ge", "geu": "geu", "leu": "leu",
    "gtu": "gtu", "ltu": "ltu", "neu": "neu",
}  # fmt: skip
_SPECIAL = {
    "%tid.x": "emu::current->thread", "%ctaid.x": "emu::current->block",
    "%ntid.x": "emu::current->threads", "%nctaid.x": "emu::current->blocks",
}  # fmt: skip
_SPACES = ("param", "shared", "global")
_SHARED_GAP = 64  # bytes between shared arrays, so that running over an end is noticed
LAUNCH = """
extern "C" int emu_launch(const char* name, unsigned first, unsigned count, unsigned threads,
                          const void* const* arguments) {{
{table}  return -1;
}}
extern "C" const char* emu_error() {{ return emu::error(); }}
"""
"""How a library of kernels is called; `table` finds a kernel by its name."""

_ENTRY = re.compile(r"\.entry\s+(\w+)\s*\(([^)]*)\)[^{]*\{")


class UnsupportedError(Exception):
    """The translator does not know this; teach it, with its meaning from the PTX manual."""


def translate(ptx: str, names: Mapping[str, str]) -> str:
    """C++ with `emu_launch(name, first block, blocks, threads, arguments)`.

    Args:
        names: the kernels that are wanted, name in the PTX -> name to launch it by.
    """
    text = re.sub(r"//[^\n]*|/\*.*?\*/", "", ptx, flags=re.S)
    kernels = []
    for match in _ENTRY.finditer(text):
        if match[1] not in names:
            continue
        start, depth = match.end(), 1
        end = start
        while depth:
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
        kernels.append(_Kernel(match[1], match[2], text[start : end - 1]))
    if re.search(r"\.func\b", text):
        raise UnsupportedError("functions")
    if missing := names.keys() - {kernel.name for kernel in kernels}:
        raise UnsupportedError(f"no kernel {missing}")
    table = "".join(
        f'  if (!strcmp(name, "{names[k.name]}"))\n'
        f"    return emu::launch(first, count, threads, [=] {{ {k.name}(arguments); }});\n"
        for k in kernels
    )
    code = "\n".join(kernel.code for kernel in kernels)
    return f'#include "ptx.h"\nusing namespace ptx;\n{code}{LAUNCH.format(table=table)}'


def instructions(ptx: str) -> list[tuple[str, list[str]]]:
    """(opcode with its modifiers, operands) of everything that is executed, in order."""
    text = re.sub(r"//[^\n]*", "", ptx)
    found = re.findall(r"^\s*(?:@!?%p\d+\s+)?([a-z][a-z0-9_.:]*)\s*([^;{}]*(?:\{[^}]*\}[^;{}]*)*);",
                       text, flags=re.M)  # fmt: skip
    return [(op, _operands(rest)) for op, rest in found]


def _operands(text: str) -> list[str]:
    """Split at the commas outside of braces and brackets."""
    return [part.strip() for part in re.split(r",(?![^{\[]*[}\]])", text) if part.strip()]


def _register(name: str) -> str:
    return name.replace("%", "r_").replace("$", "L_")


def _width(type_: str) -> int:
    return int(type_[1:])


def _ctype(type_: str) -> str:
    """f32, s32 and u32 are their own; untyped bits count as unsigned."""
    return "u" + type_[1:] if type_[0] == "b" else type_


class _Kernel:
    """One entry: its C++ is in `code`."""

    def __init__(self, name: str, parameters: str, body: str) -> None:
        self.name = name
        self._parameters = {
            p.split()[-1].partition("[")[0]: i for i, p in enumerate(parameters.split(","))
        }
        self._registers: dict[str, str] = {}
        self._shared: dict[str, tuple[int, int]] = {}  # array -> (first byte, bytes)
        lines = [line for part in self._statements(body) for line in self._statement(part)]
        declared = "".join(f"  {ctype} {reg};\n" for reg, ctype in self._registers.items())
        ranges = "".join(f"{{{a}, {a + n}}}, " for a, n in self._shared.values()) or "{0, 0}"
        size = max((a + n for a, n in self._shared.values()), default=1)
        self.code = (
            f"namespace {{\nalignas(128) EMU_SHARED u8 {name}_shared[{size}];\n"
            f"u8* {name}_at(u64 offset, unsigned bytes) {{\n"
            f"  for (const u64(&range)[2] : (const u64[][2]){{{ranges}}})\n"
            "    if (offset >= range[0] && offset + bytes <= range[1])\n"
            f"      return shared({name}_shared, offset, bytes, range[1]);\n"
            '  emu::trap("shared access out of bounds", offset);\n}\n'
            f"void {name}(const void* const* arguments) {{\n{declared}  "
            + "\n  ".join(lines)
            + "\n}\n}  // namespace\n"
        )

    @staticmethod
    def _statements(body: str) -> list[str]:
        """Labels and instructions; braces that open a scope vanish, those of vectors stay."""
        flat = re.sub(r"(?<=[;:{}])\s*[{}]|^\s*[{}]|[{}]\s*$", "", body)
        flat = re.sub(r"(\$\w+):", r"\1:;", flat)
        return [" ".join(part.split()) for part in flat.split(";") if part.strip()]

    def _statement(self, text: str) -> list[str]:
        if text.endswith(":"):
            return [f"{_register(text[:-1])}: ;"]
        if text.startswith("."):
            self._declare(text)
            return []
        guard = ""
        if match := re.match(r"@(!?)(%p\d+) (.*)", text):
            guard, text = f"if ({match[1]}{_register(match[2])}) ", match[3]
        op, _, rest = text.partition(" ")
        return [f"{guard}{{ {self._instruction(op, op.split('.'), _operands(rest))} }}"]

    def _declare(self, text: str) -> None:
        if match := re.fullmatch(r"\.reg \.(\w+) (%\w+)<(\d+)>", text):
            ctype = "bool" if match[1] == "pred" else f"u{_width(match[1])}"
            for i in range(int(match[3])):
                self._registers[_register(f"{match[2]}{i}")] = ctype
        elif match := re.fullmatch(r"\.shared \.align (\d+) \.b8 (\w+)\[(\d+)\]", text):
            align, end = int(match[1]), max((a + n for a, n in self._shared.values()), default=0)
            start = -(-(end + _SHARED_GAP if end else 0) // align) * align
            self._shared[match[2]] = (start, int(match[3]))
        elif not text.startswith((".pragma", ".loc")):
            raise UnsupportedError(text)

    def _value(self, text: str) -> str:
        if text in _SPECIAL:
            return _SPECIAL[text]
        if text.startswith("%"):
            return _register(text)
        if text.startswith("!%"):
            return f"(!{_register(text[1:])})"
        if re.fullmatch(r"0[fFdD][0-9a-fA-F]+", text):
            return f"0x{text[2:]}ull"
        if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)U?", text):
            return f"(u64)({text.rstrip('U')}ll)"
        if text in self._shared:
            return f"(u64){self._shared[text][0]}"
        raise UnsupportedError(f"operand {text}")

    def _address(self, text: str, space: str, count: int) -> str:
        """A pointer to `count` bytes."""
        match = re.fullmatch(r"\[(.+?)(?:\+(-?\d+))?\]", text)
        if match is None:
            raise UnsupportedError(f"address {text}")
        base, offset = match[1], match[2] or "0"
        if space == "param":
            return f"(const u8*)arguments[{self._parameters[base]}] + {offset}"
        where = f"{self._value(base)} + ({offset})"
        if space == "shared":
            return f"{self.name}_at((u32)({where}), {count})"
        return f"global({where}, {count})"

    def _instruction(self, op: str, parts: list[str], args: list[str]) -> str:
        """C++ of one instruction; `parts` is the opcode at its dots."""
        head, type_ = parts[0], parts[-1]
        if head in ("ret", "bra", "bar", "shfl"):
            return self._control(op, head, args)
        if head in ("ld", "st"):
            return self._memory(op, parts, args)
        if head == "mov" and "{" in "".join(args):
            return self._vector(op, type_, args)
        out = _register(args[0])
        values = [self._value(arg) for arg in args[1:]]
        if expression := self._special(parts, values):
            return f"{out} = {expression};"
        if head == "setp":
            compare = f"ptx::{_COMPARISONS[parts[1]]}<{_ctype(type_)}>({values[0]}, {values[1]})"
            if len(parts) == 3:
                return f"{out} = {compare};"
            if len(parts) == 4 and parts[2] in ("and", "or"):
                return f"{out} = {compare} {'&&' if parts[2] == 'and' else '||'} {values[2]};"
            raise UnsupportedError(op)
        if head in ("and", "or", "xor", "not", "mov", "selp"):
            return f"{out} = {self._logic(head, type_, values)};"
        modifiers = parts[1:-1]
        rounding = ["rn"] if type_ in ("f32", "f64") and head != "neg" else []
        if modifiers != rounding or head not in ("add", "sub", "mul", "div", "rem", "shl", "shr",
                                                 "neg", "bfi"):  # fmt: skip
            raise UnsupportedError(op)
        return f"{out} = ptx::{head}<{_ctype(type_)}>({', '.join(values)});"

    def _special(self, parts: list[str], values: list[str]) -> str | None:
        """What has a form of its own, None for the rest."""
        op, joined = ".".join(parts), ", ".join(values)
        exact = {
            "max.f32": "max", "min.f32": "least", "abs.f32": "magnitude", "fma.rn.f32": "fused",
            "rcp.rn.f32": "rcp",
            "cvt.f32.f16": "f32_of_f16", "cvt.f64.f32": "f64_of_f32", "clz.b32": "clz",
            "cvt.rn.f64.s32": "f64_of_s32", "cvt.rzi.s32.f32": "s32_of_f32",
        }  # fmt: skip
        if op in exact:
            return f"ptx::{exact[op]}({joined})"
        if op == "cvta.to.global.u64":
            return values[0]
        if match := re.fullmatch(r"(min|max)\.([us]\d+)", op):
            which = "smaller" if match[1] == "min" else "larger"
            return f"ptx::{which}<{match[2]}>({joined})"
        if match := re.fullmatch(r"mul\.lo\.([us]\d+)", op):
            return f"ptx::mul<{match[1]}>({joined})"
        if match := re.fullmatch(r"mad\.lo\.([us]\d+)", op):
            return (
                f"ptx::add<{match[1]}>(ptx::mul<{match[1]}>({values[0]}, {values[1]}), {values[2]})"
            )
        if match := re.fullmatch(r"(mul|mad)\.wide\.([us])(\d+)", op):
            narrow, wide = match[2] + match[3], f"{match[2]}{2 * int(match[3])}"
            product = f"ptx::mul_wide<{narrow}, {wide}>({values[0]}, {values[1]})"
            return product if match[1] == "mul" else f"ptx::add<{wide}>({product}, {values[2]})"
        if match := re.fullmatch(r"cvt\.([us]\d+)\.([us]\d+)", op):
            return f"(u{_width(match[1])})({match[1]})as<{match[2]}>({values[0]})"
        return None

    def _vector(self, op: str, type_: str, args: list[str]) -> str:
        """mov between a register and the registers of its parts, the lowest first."""
        if args[0].startswith("{"):
            parts = _operands(args[0].strip("{}"))
            width, whole = _width(type_) // len(parts), self._value(args[1])
            return " ".join(
                f"{_register(part)} = (u{width})((u64){whole} >> {i * width});"
                for i, part in enumerate(parts)
                if part != "_"
            )
        parts = _operands(args[1].strip("{}"))
        width = _width(type_) // len(parts)
        terms = [f"(u64)(u{width}){self._value(p)} << {i * width}" for i, p in enumerate(parts)]
        return f"{_register(args[0])} = (u{_width(type_)})({' | '.join(terms)});"

    @staticmethod
    def _logic(head: str, type_: str, values: list[str]) -> str:
        predicate = type_ == "pred"
        cast = "" if predicate else f"(u{_width(type_)})"
        if head == "mov":
            return f"{cast}{values[0]}" if not predicate else values[0]
        if head == "not":
            return f"!{values[0]}" if predicate else f"{cast}~{values[0]}"
        if head == "selp":
            return f"{values[2]} ? {cast}{values[0]} : {cast}{values[1]}"
        sign = {"and": "&", "or": "|", "xor": "^"}[head]
        return f"{cast}({values[0]} {sign} {values[1]})"

    def _memory(self, op: str, parts: list[str], args: list[str]) -> str:
        space = next((part for part in parts if part in _SPACES), "")
        vector = next((int(part[1]) for part in parts if part in ("v2", "v4")), 1)
        if not space or set(parts[1:-1]) - {space, "nc", "v2", "v4"}:
            raise UnsupportedError(op)
        ctype, size = _ctype(parts[-1]), _width(parts[-1]) // 8
        place, data = (args[1], args[0]) if parts[0] == "ld" else (args[0], args[1])
        registers = _operands(data.strip("{}")) if vector > 1 else [data]
        address = self._address(place, space, size * vector)
        if parts[0] == "st":
            moves = [f"store<{ctype}>(at + {size * i}, {self._value(r)});"
                     for i, r in enumerate(registers)]  # fmt: skip
            return f"u8* at = {address}; {' '.join(moves)}"
        # a signed narrow load extends its sign into a wider register
        widen = "(u64)(s64)" if ctype[0] == "s" else ""
        value = "as<{0}>(load<{0}>(at + {1}))" if widen else "load<{0}>(at + {1})"
        moves = [f"{_register(r)} = {widen}{value.format(ctype, size * i)};"
                 for i, r in enumerate(registers)]  # fmt: skip
        return f"const u8* at = {address}; {' '.join(moves)}"

    def _control(self, op: str, head: str, args: list[str]) -> str:
        if head == "ret":
            return "return;"
        if op in ("bra", "bra.uni"):
            return f"goto {_register(args[0])};"
        if op == "bar.sync" and args == ["0"]:
            return "emu::barrier();"
        if op == "bar.warp.sync":
            return f"emu::sync_warp((u32){self._value(args[0])});"
        if op == "shfl.sync.bfly.b32":  # the fourth operand is 31 for the whole warp
            out, _, predicate = args[0].partition("|")
            text = f"if ({self._value(args[3])} != 31) "
            text += 'emu::trap("a part of a warp shuffles", 0); '
            text += f"{_register(out)} = emu::shuffle_xor((u32){self._value(args[4])}, "
            text += f"(u32){self._value(args[1])}, (int){self._value(args[2])});"
            # the predicate says that the source lane is there, which the runtime insists on
            return text + (f" {_register(predicate)} = true;" if predicate else "")
        raise UnsupportedError(op)
