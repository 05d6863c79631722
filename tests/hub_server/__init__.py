"""A Hub for the tests: a local server that speaks the Hub's API as huggingface_hub calls it.

Written here because no package serves it: of those on PyPI, `hf-local-hub` wraps a program that is
not in the wheel, and `olah` mirrors a Hub that it needs to reach.
"""

from .faults import Fault
from .server import Hub

__all__ = ["Fault", "Hub"]
