"""How far an output is from its source, as a model: perplexity, KL divergence, embeddings (extra
`eval`)."""
