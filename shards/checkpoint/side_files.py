"""Files beside config.json that say how weights are quantized, as old tools wrote them."""

from __future__ import annotations

from pathlib import Path

SIDE_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
"""Files in which AutoGPTQ and AutoAWQ once wrote what config.json holds now."""


def side_file(folder: Path) -> Path | None:
    """The file beside config.json that says how weights are quantized, as old tools wrote it."""
    return next((folder / one for one in SIDE_FILES if (folder / one).is_file()), None)
