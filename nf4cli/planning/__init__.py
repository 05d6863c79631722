"""What will be done: which weights become 4-bit and why, exact sizes, resources."""
