"""Names of the tensors of a folder, read without torch: from the index, or from headers of files.

Knows headers and the index; knows nothing of shapes, which the whole check of a folder compares.
"""

from __future__ import annotations

import json
from pathlib import Path

from arriero.shards.checkpoint.index import INDEX_FILE, weight_map
from arriero.shards.checkpoint.safetensors_limits import LENGTH_BYTES, MAX_HEADER_BYTES
from arriero.shards.errors import CheckpointError


def tensor_names(folder: Path) -> dict[str, Path]:
    """The file of each tensor, by name.

    Raises:
        CheckpointError: the folder has no safetensors file, or a header is malformed.
    """
    index = folder / INDEX_FILE
    if index.is_file():
        return {name: folder / file for name, file in weight_map(index).items()}
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder}: has no safetensors file; fetch the folder again")
    return {name: file for file in files for name in _header_names(file)}


def _header_names(path: Path) -> list[str]:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(LENGTH_BYTES), "little")
        if length > MAX_HEADER_BYTES:
            raise CheckpointError(
                f"{path}: header of {length} bytes exceeds {MAX_HEADER_BYTES}; fetch the file again"
            )
        try:
            entries = json.loads(file.read(length))
        except ValueError:
            entries = None
    if not isinstance(entries, dict):
        raise CheckpointError(f"{path}: the header is not a JSON object; fetch the file again")
    return [name for name in entries if name != "__metadata__"]
