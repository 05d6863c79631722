"""Fuzzing: targets that any driver can call with bytes."""
