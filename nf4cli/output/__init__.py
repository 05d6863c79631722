"""Describe a finished output, and check it against its own records: manifest, model card, findings
of a verification, inspection."""
