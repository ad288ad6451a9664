"""Sizes that the safetensors format sets. Needs no torch; knows nothing of files."""

LENGTH_BYTES = 8
"""Bytes of the header's length, at the start of a file."""
MAX_HEADER_BYTES = 100_000_000
"""Largest header that the format allows."""
