"""nf4: stream full-precision checkpoints into bitsandbytes NF4, and prove what was written."""

__version__ = "0.2.0"
