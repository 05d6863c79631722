"""Decide a conversion before it starts: which weights become 4-bit and why, the exact size of every
output file, threads and memory."""
