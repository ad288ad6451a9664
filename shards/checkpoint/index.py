"""The index of a checkpoint in several files: the file of each tensor.

Knows file names and refuses unsafe names. Needs no torch; knows nothing of file contents.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from arriero.shards.errors import CheckpointError
from arriero.shards.files.json_file import read_json_object

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLES = {".bin", ".pth", ".pt", ".ckpt", ".pkl"}
"""Suffixes of pickle files, which can run code when loaded."""


def weight_map(index: Path) -> dict[str, str]:
    """File name of each tensor, from an index; accepts only plain names of safetensors files."""
    file_of_tensor = read_json_object(index).get("weight_map")
    if not isinstance(file_of_tensor, dict) or not file_of_tensor:
        raise CheckpointError(
            f"{index}: `weight_map` must be an object from tensor name to "
            "file name; fetch the file again"
        )
    for name, file_name in file_of_tensor.items():
        _check_file_name(index, name, file_name)
    return file_of_tensor


def _check_file_name(index: Path, name: str, file_name: Any) -> None:  # noqa: ANN401
    """Accept only plain names: a path in an index could reach any file of the machine."""
    plain = (
        isinstance(file_name, str)
        and PurePosixPath(file_name).name == file_name
        and "\\" not in file_name
        and "\0" not in file_name
    )
    if not plain:
        raise CheckpointError(
            f"{index}: tensor {name[:200]!r}: {str(file_name)[:200]!r} is not a plain file "
            "name; fetch the index again"
        )
    suffix = PurePosixPath(file_name).suffix
    if suffix in PICKLES:
        raise CheckpointError(f"{index}: tensor {name[:200]!r}: {pickle_error([file_name])}")
    if suffix != ".safetensors":
        raise CheckpointError(
            f"{index}: tensor {name[:200]!r}: {file_name[:200]!r} does not end in "
            ".safetensors; convert the weights to safetensors"
        )


def pickle_error(names: list[str]) -> str:
    """Error text for pickle files."""
    return f"{first_of(names)}: a pickle file, which can run code; convert it to safetensors"


def first_of(names: Iterable[str]) -> str:
    """The first name and the number of further names."""
    listed = list(names)
    return listed[0][:200] + (f" and {len(listed) - 1} more" if len(listed) > 1 else "")
