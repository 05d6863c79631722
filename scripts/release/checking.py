"""Checks what a wheel says of itself against what is in it."""

from __future__ import annotations

import re
import zipfile
from email.parser import HeaderParser
from pathlib import Path

from building import ROOT, ZIG, run
from elftools.elf.dynamic import DynamicSection
from elftools.elf.elffile import ELFFile
from elftools.elf.gnuversions import GNUVerNeedSection
from elftools.elf.sections import SymbolTableSection
from macholib import mach_o
from macholib.MachO import MachO
from macholib.SymbolTable import SymbolTable
from platforms import Platform

LIBRARY = "nf4cli/engines/_nf4.so"
SYSTEM = re.compile(
    r"(libc|libm|libdl|libpthread|ld-linux[\w-]*)\.so(\.\d+)?|/usr/lib/libSystem\.B\.dylib"
)
"""The C library, which every machine has; not the compiler's own libraries."""
ELF_CPUS = {"x86_64": "EM_X86_64", "aarch64": "EM_AARCH64"}
MACH_CPUS = {"x86_64": 0x01000007, "arm64": 0x0100000C}


def must(holds: bool, what: str) -> None:
    """Raise SystemExit, with a message, if a condition does not hold."""
    if not holds:
        raise SystemExit(f"error: {what}")


def check_wheel(wheel: Path, platform: Platform, place: Path) -> Path:
    """Check a wheel; return its library, unpacked in `place`. Raise SystemExit at a fault."""
    with zipfile.ZipFile(wheel) as archive:
        (info,) = (name for name in archive.namelist() if name.endswith(".dist-info/WHEEL"))
        headers = HeaderParser().parsestr(archive.read(info).decode())
        library = Path(archive.extract(LIBRARY, place))
    must(headers.get_all("Tag") == [f"py3-none-{platform.tag}"], f"the tags of {wheel.name}")
    must(headers["Root-Is-Purelib"] == "false", f"{wheel.name} is for every platform")
    run("check-wheel-contents", wheel)
    run("twine", "check", "--strict", wheel)
    if platform.macos:
        check_macho(library, platform)
    else:
        check_elf(library, platform)
        # auditwheel looks for musl's libc.so on this machine and takes glibc's file of that name.
        if not platform.tag.startswith("musl"):
            check_auditwheel(wheel, platform)
    content = library.read_bytes()
    for path in (ROOT, ZIG.parent, place.parent, Path.home()):
        must(str(path).encode() + b"/" not in content, f"{wheel.name} holds the path {path}")
    return library


def check_names(exported: set[str], needed: set[str], what: str) -> None:
    """Check what a library gives to others and takes from them."""
    foreign = {name for name in exported if not re.match(r"nf4_\w+$", name)}
    must(not foreign, f"{what} exports {', '.join(sorted(foreign))}")
    must("nf4_quantize_generic" in exported, f"{what} exports no nf4_quantize_generic")
    strange = {name for name in needed if not SYSTEM.fullmatch(name)}
    must(not strange, f"{what} needs {', '.join(sorted(strange))}")


def check_elf(library: Path, platform: Platform) -> None:
    """Check a library for Linux: processor, symbols, what it needs, versions of glibc."""
    with library.open("rb") as file:
        elf = ELFFile(file)
        (dynamic,) = (s for s in elf.iter_sections() if isinstance(s, DynamicSection))
        symbols = elf.get_section_by_name(".dynsym")
        assert isinstance(symbols, SymbolTableSection)
        exported = {s.name for s in symbols.iter_symbols() if s["st_shndx"] != "SHN_UNDEF"}
        needed = {tag.needed for tag in dynamic.iter_tags("DT_NEEDED")}
        check_names(exported, needed, platform.tag)
        cpu = platform.zig.split("-")[0]
        must(elf["e_machine"] == ELF_CPUS[cpu], f"{platform.tag} is for {elf['e_machine']}")
        versions = {
            auxiliary.name
            for section in elf.iter_sections()
            if isinstance(section, GNUVerNeedSection)
            for _, auxiliaries in section.iter_versions()
            for auxiliary in auxiliaries
        }
    if platform.tag.startswith("musl"):
        must(not versions, f"{platform.tag} needs {', '.join(sorted(versions))}")
    for version in versions:
        found = re.fullmatch(r"GLIBC_(\d+)\.(\d+)(\.\d+)?", version)
        must(bool(found), f"{platform.tag} needs {version}")
        assert found
        must((int(found[1]), int(found[2])) <= platform.version, f"{platform.tag} needs {version}")


def check_auditwheel(wheel: Path, platform: Platform) -> None:
    """Check that auditwheel gives a wheel for Linux its tag, or one of more machines."""
    said = run("auditwheel", "show", wheel)
    kind = platform.tag.split("_")[0]
    found = re.findall(rf'"{kind}_(\d+)_(\d+)_{platform.zig.split("-")[0]}"', said)
    must(bool(found), f"auditwheel on {wheel.name}:\n{said}")
    major, minor = found[0]
    must((int(major), int(minor)) <= platform.version, f"auditwheel on {wheel.name}:\n{said}")


def check_macho(library: Path, platform: Platform) -> None:
    """Check a library for macOS: processor, symbols, what it needs, version, signature."""
    (header,) = MachO(str(library)).headers
    cpu = platform.tag.split("_", 3)[3]
    must(header.header.cputype == MACH_CPUS[cpu], f"{platform.tag} is for another processor")
    commands = {entry[0].cmd: entry[1] for entry in header.commands}
    if mach_o.LC_BUILD_VERSION in commands:
        number = int(commands[mach_o.LC_BUILD_VERSION].minos)
    else:
        number = int(commands[mach_o.LC_VERSION_MIN_MACOSX].version)
    must((number >> 16, number >> 8 & 255) == platform.version, f"{platform.tag} has {number:#x}")
    # Apple's processors run nothing that is not signed, if only by the linker.
    must(cpu != "arm64" or mach_o.LC_CODE_SIGNATURE in commands, f"{platform.tag} is not signed")
    symbols = SymbolTable(MachO(str(library)), header=header).extdefsyms
    exported = {name.decode().removeprefix("_") for _, name in symbols}
    exported -= {"_mh_dylib_header", "__dso_handle"}  # the linker's own: where the image begins
    needed = {name for _, _, name in header.walkRelocatables()}
    check_names(exported, needed, platform.tag)
