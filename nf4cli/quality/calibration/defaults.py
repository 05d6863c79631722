"""What a calibration takes where nothing else is asked for; docs/quality.md says what it gives."""

TOKENS, LENGTH = 32_768, 512
"""Tokens to run, and tokens of a window."""

DAMPING = 0.05
"""What is added to the diagonal of the second moments, in units of its mean."""
