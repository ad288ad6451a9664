"""The index of a checkpoint in several files: which one holds which tensor.

Knows names of files, and which are none to open. Needs no torch; knows nothing of what is in them.
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
"""Suffixes of files that could run code."""


def weight_map(index: Path) -> dict[str, str]:
    """File name of each tensor, from an index; only plain names of safetensors files."""
    placed = read_json_object(index).get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise CheckpointError(f"{index}: `weight_map` must be an object from tensor to file name")
    for name, file_name in placed.items():
        _check_file_name(index, name, file_name)
    return placed


def _check_file_name(index: Path, name: str, file_name: Any) -> None:  # noqa: ANN401
    """Only plain names: a path in an index could reach any file of the machine."""
    plain = (
        isinstance(file_name, str)
        and PurePosixPath(file_name).name == file_name
        and "\\" not in file_name
        and "\0" not in file_name
    )
    if not plain:
        raise CheckpointError(
            f"{index}: tensor {name[:200]!r}: {str(file_name)[:200]!r} is not a plain file name"
        )
    suffix = PurePosixPath(file_name).suffix
    if suffix in PICKLES:
        raise CheckpointError(f"{index}: tensor {name[:200]!r}: {pickle_words([file_name])}")
    if suffix != ".safetensors":
        raise CheckpointError(
            f"{index}: tensor {name[:200]!r}: {file_name[:200]!r} does not end in .safetensors"
        )


def pickle_words(names: list[str]) -> str:
    """What to say of pickles."""
    return f"{first_of(names)}: a pickle, which could run code; convert it to safetensors"


def first_of(names: Iterable[str]) -> str:
    """The first name, and how many more there are."""
    listed = list(names)
    return listed[0][:200] + (f" and {len(listed) - 1} more" if len(listed) > 1 else "")
