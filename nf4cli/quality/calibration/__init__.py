"""Run text through a model, one transformer block in memory at a time (extra `calibrate`)."""
