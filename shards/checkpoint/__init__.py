"""Model weights in files: read, check, import, convert, quantize."""
