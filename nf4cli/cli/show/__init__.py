"""Show plans, progress and results: on the terminal, in a log, or as JSON."""
