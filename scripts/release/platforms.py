"""The platforms that a release has wheels for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Platform:
    """A platform as pip names it, and as zig does.

    Attributes:
        tag: the last part of a wheel's name, like manylinux_2_17_x86_64.
        zig: the target of zig, like x86_64-linux-gnu.2.17.
        runner: the command that runs a program for it on Linux x86-64; None if nothing does.
    """

    tag: str
    zig: str
    runner: tuple[str, ...] | None = None

    @property
    def macos(self) -> bool:
        return self.tag.startswith("macosx")

    @property
    def version(self) -> tuple[int, int]:
        """The version of macOS or of the C library that the tag promises to be enough."""
        major, minor = self.tag.split("_")[1:3]
        return int(major), int(minor)


PLATFORMS = (
    Platform("manylinux_2_17_x86_64", "x86_64-linux-gnu.2.17", ()),
    Platform("manylinux_2_17_aarch64", "aarch64-linux-gnu.2.17",
             ("qemu-aarch64", "-L", "/usr/aarch64-linux-gnu")),
    Platform("musllinux_1_2_x86_64", "x86_64-linux-musl", ("/lib/ld-musl-x86_64.so.1",)),
    Platform("musllinux_1_2_aarch64", "aarch64-linux-musl"),
    Platform("macosx_11_0_arm64", "aarch64-macos.11.0"),
    Platform("macosx_10_13_x86_64", "x86_64-macos.10.13"),
)  # fmt: skip
NATIVE = PLATFORMS[0]
"""The one whose wheel is installed and used as a whole."""
