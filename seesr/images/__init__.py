"""Image files: decode untrusted input, hold pixels with their metadata, encode the output."""
