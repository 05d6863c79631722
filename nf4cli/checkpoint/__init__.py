"""Checkpoints on the disk: safetensors files, their digests, and bitsandbytes' keys in them.

Files of others are read with bounds and checks, since they may be damaged or hostile.
"""
