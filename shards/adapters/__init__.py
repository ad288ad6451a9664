"""LoRA adapters: files, parts of a rank, slots."""
