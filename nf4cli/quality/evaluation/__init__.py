"""Measure how far an output is from its source, as a model (extra `eval`).

Language models: perplexity, KL divergence, equal most likely tokens. Encoders: embeddings.
"""
