"""One conversion on many machines."""
