"""How an output is proved: against its manifest, its source, or a sample of both."""
