"""Files of weights that are missing or cut short, found in milliseconds without torch.

`model_check` runs this before the whole check, whose import of torch takes seconds. Whatever this
does not find, the whole check finds. Knows lengths of safetensors files and their index; knows
nothing of tensors.
"""

from __future__ import annotations

import json
from pathlib import Path

from arriero.shards.checkpoint.safetensors_limits import LENGTH_BYTES, MAX_HEADER_BYTES

_INDEX = "model.safetensors.index.json"
_AGAIN = "fetch the file again"


def cut_files(folder: Path) -> list[str]:
    """Problems of the folder's files of weights, a sentence each; empty for none that shows."""
    names = _names(folder)
    if not names:
        return []
    return [problem for name in names if (problem := _problem(folder / name))]


def _names(folder: Path) -> list[str]:
    """Names of the files of weights; empty where the index is not readable."""
    index = folder / _INDEX
    if not index.is_file():
        return sorted(path.name for path in folder.glob("*.safetensors"))
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return []  # the whole check explains the index
    return sorted(name for name in names if isinstance(name, str) and "/" not in name)


def _problem(path: Path) -> str:
    """What is wrong with the length of a file; "" for nothing, or for what others explain."""
    if not path.is_file():
        return f"{path}: missing, although the index names the file; {_AGAIN}"
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(LENGTH_BYTES), "little")
        if size < LENGTH_BYTES or length > MAX_HEADER_BYTES:
            return ""
        if size < LENGTH_BYTES + length:
            follow = size - LENGTH_BYTES
            return f"{path}: truncated: header of {length} bytes, but {follow} follow; {_AGAIN}"
        try:
            entries = json.loads(file.read(length))
            stops = [
                int(entry["data_offsets"][1])
                for name, entry in entries.items()
                if name != "__metadata__"
            ]
        except (ValueError, KeyError, AttributeError, TypeError, IndexError):
            return ""
    data, follow = max(stops, default=0), size - LENGTH_BYTES - length
    if data > follow:
        needed = LENGTH_BYTES + length + data
        return (
            f"{path}: truncated: the file has {size:,} bytes, but the header requires {needed:,};"
            f" {_AGAIN}"
        )
    return ""
