"""The safetensors files of a folder and the tensors of each file.

Knows the index and the names of shards and unfinished downloads; knows nothing of the meaning of
tensors.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from arriero.shards.checkpoint.index import (
    INDEX_FILE,
    PICKLES,
    SINGLE_FILE,
    first_of,
    pickle_error,
    weight_map,
)
from arriero.shards.checkpoint.ranges import RangedFolder
from arriero.shards.checkpoint.safetensors_header import StoredTensor, read_header
from arriero.shards.errors import CheckpointError
from arriero.shards.files.bad_file import UNFINISHED, explain_error, unfinished_of

_SHARD = re.compile(r"model-(\d{5})-of-(\d{5})\.safetensors")
_PULL = "fetch it with `arriero models pull`"


def find_tensors(folder: Path, ranged: RangedFolder | None = None) -> dict[str, StoredTensor]:
    """Location of each tensor of a model folder: from the single file, index or shard names.

    Args:
        folder: model folder.
        ranged: remote weight files; None if all files are local.

    Raises:
        CheckpointError: a file or tensor is missing or malformed; the message names the file.
    """
    files: dict[str, Path] = {}
    if ranged is not None:
        ranged.need_headers()
        files = ranged.files
    try:
        single, index = files.get(SINGLE_FILE, folder / SINGLE_FILE), folder / INDEX_FILE
        if os.path.lexists(single):
            return read_header(single)
        if not os.path.lexists(index):
            return _read_all(_all_shards(folder))
        file_of_tensor = weight_map(index)
        shards = [files.get(name, folder / name) for name in sorted(set(file_of_tensor.values()))]
        _refuse_missing(index, shards)
        tensors = _read_all(shards)
    except OSError as error:
        raise CheckpointError(f"{folder}: {explain_error(folder, error)}") from None
    for name, file_name in file_of_tensor.items():
        actual_file = tensors[name].file.name if name in tensors else None
        if actual_file != file_name:
            raise CheckpointError(
                f"{index}: puts tensor {name[:200]!r} in {file_name}, but the tensor "
                + (f"is in {actual_file}; {_PULL}" if actual_file else f"is not there; {_PULL}")
            )
    return tensors


def _read_all(files: list[Path]) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        for name, tensor in read_header(file).items():
            if name in tensors:
                raise CheckpointError(
                    f"{file}: tensor {name[:200]!r} is in {tensors[name].file.name} too; {_PULL}"
                )
            tensors[name] = tensor
    return tensors


def _refuse_missing(index: Path, shards: list[Path]) -> None:
    missing = [file for file in shards if not os.path.lexists(file)]
    if not missing:
        return
    more = f" (and {len(missing) - 1} more of {len(shards)})" if len(missing) > 1 else ""
    unfinished = unfinished_of(missing[0])
    reason = f"; {unfinished} is an unfinished download" if unfinished else ""
    raise CheckpointError(
        f"{index}: names {missing[0].name!r}, which is missing{more}{reason}; {_PULL}"
    )


def _all_shards(folder: Path) -> list[Path]:
    """All shards by name, if the index is missing but no shard is."""
    names = sorted(entry.name for entry in folder.iterdir())
    shards = [match for match in map(_SHARD.fullmatch, names) if match is not None]
    if not shards:
        raise _no_weights(folder, names)
    count = int(shards[0][2])
    expected = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(min(count, 100_000))]
    present = [match[0] for match in shards]
    missing = [name for name in expected if name not in present]
    if missing or len(present) != len(expected):
        raise CheckpointError(
            f"{folder}: holds neither {SINGLE_FILE} nor {INDEX_FILE}, only {first_of(present)}"
            + (f"; missing: {first_of(missing)}" if missing else "")
            + f": {_PULL}"
        )
    return [folder / name for name in expected]


def _no_weights(folder: Path, names: list[str]) -> CheckpointError:
    problem = f"{folder}: holds neither {SINGLE_FILE} nor {INDEX_FILE}"
    pickles = [name for name in names if Path(name).suffix in PICKLES]
    loose = [name for name in names if Path(name).suffix in (".safetensors", ".gguf")]
    unfinished = [name for name in names if name.endswith(UNFINISHED) and ".safetensors" in name]
    if unfinished:
        return CheckpointError(
            f"{problem}: {first_of(unfinished)}: an unfinished download; {_PULL}"
        )
    if any(name.endswith(".gguf") for name in loose):
        return CheckpointError(
            f"{problem}, only {first_of(loose)}: convert with `arriero models import FILE`"
        )
    if loose:
        return CheckpointError(
            f"{problem}, only {first_of(loose)}: if this is the whole model under Hugging "
            f"Face names, rename the file to {SINGLE_FILE}; else {_PULL}"
        )
    if pickles:
        remedy = "; for Meta's release use `arriero models convert`" if _is_meta(names) else ""
        return CheckpointError(f"{problem}: {pickle_error(pickles)}{remedy}")
    return CheckpointError(f"{problem}; fetch the weights: `arriero models pull`")


def _is_meta(names: list[str]) -> bool:
    return any(name.startswith("consolidated.") and name.endswith(".pth") for name in names)
