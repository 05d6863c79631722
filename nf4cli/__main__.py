"""The process of the command `nf4`, or `python -m nf4cli`, from its first line to its end."""

from __future__ import annotations

from . import stopping


def main() -> None:
    """Run the command; a signal is taken from here on, before anything large is imported."""
    stopping.listen()
    from .cli import main as command

    try:
        command()
    finally:
        stopping.ignore()


if __name__ == "__main__":
    main()
