"""Prove an output: by its manifest, by its source, or by a sample of its tensors."""
