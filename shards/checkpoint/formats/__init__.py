"""Checkpoint forms: names and shapes of tensors, the bytes each rank reads, quantized numbers."""
