"""Files beside config.json in which some tools describe the quantization of the weights."""

from __future__ import annotations

from pathlib import Path

SIDE_FILES = {
    "quantize_config.json": "gptq",
    "quant_config.json": "awq",
    "hf_quant_config.json": "modelopt",
}
"""Files of AutoGPTQ, AutoAWQ and ModelOpt, and the method of each; newer tools use config.json."""


def side_file(folder: Path) -> Path | None:
    """The file of `SIDE_FILES` in a folder, None if there is no such file."""
    return next((folder / name for name in SIDE_FILES if (folder / name).is_file()), None)
