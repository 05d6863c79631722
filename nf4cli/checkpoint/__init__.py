"""What lies on the disk: safetensors files, their digests and bitsandbytes' keys, read without
trust."""
