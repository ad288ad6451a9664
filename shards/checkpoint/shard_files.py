"""Which safetensors files of a folder hold which tensors.

Knows the index, the names of shards and of downloads that were not finished; knows nothing of what
tensors mean.
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
    pickle_words,
    weight_map,
)
from arriero.shards.checkpoint.ranges import RangedFolder
from arriero.shards.checkpoint.safetensors_header import StoredTensor, read_header
from arriero.shards.errors import CheckpointError
from arriero.shards.files.bad_file import UNFINISHED, explain_error, unfinished_of

_SHARD = re.compile(r"model-(\d{5})-of-(\d{5})\.safetensors")
_PULL = "fetch it with `arriero models pull`"


def find_tensors(folder: Path, ranged: RangedFolder | None = None) -> dict[str, StoredTensor]:
    """Where each tensor of a model folder lies: by its one file, its index, or its shards' names.

    Args:
        folder: of the model.
        ranged: what fetches the files' bytes; None where they are all here.

    Raises:
        CheckpointError: something is missing or malformed; the message names the file.
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
        placed = weight_map(index)
        shards = [files.get(name, folder / name) for name in sorted(set(placed.values()))]
        _refuse_missing(index, shards)
        found = _read_all(shards)
    except OSError as error:
        raise CheckpointError(f"{folder}: {explain_error(folder, error)}") from None
    for name, file_name in placed.items():
        lies_in = found[name].file.name if name in found else None
        if lies_in != file_name:
            raise CheckpointError(
                f"{index}: places tensor {name[:200]!r} in {file_name}, but it "
                + (f"lies in {lies_in}" if lies_in else "is not there")
            )
    return found


def _read_all(files: list[Path]) -> dict[str, StoredTensor]:
    found: dict[str, StoredTensor] = {}
    for file in files:
        for name, one in read_header(file).items():
            if name in found:
                raise CheckpointError(
                    f"{file}: tensor {name[:200]!r} lies in {found[name].file.name} too"
                )
            found[name] = one
    return found


def _refuse_missing(index: Path, shards: list[Path]) -> None:
    missing = [file for file in shards if not os.path.lexists(file)]
    if not missing:
        return
    more = f" (and {len(missing) - 1} more of {len(shards)})" if len(missing) > 1 else ""
    unfinished = unfinished_of(missing[0])
    because = f"; {unfinished} is a download that was not finished" if unfinished else ""
    raise CheckpointError(
        f"{index}: names {missing[0].name!r}, which is missing{more}{because}; {_PULL}"
    )


def _all_shards(folder: Path) -> list[Path]:
    """Shards by their names, where the index is missing and every one of them is there."""
    names = sorted(one.name for one in folder.iterdir())
    shards = [found for found in map(_SHARD.fullmatch, names) if found is not None]
    if not shards:
        raise _no_weights(folder, names)
    count = int(shards[0][2])
    due = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(min(count, 100_000))]
    there = [found[0] for found in shards]
    missing = [name for name in due if name not in there]
    if missing or len(there) != len(due):
        raise CheckpointError(
            f"{folder}: holds neither {SINGLE_FILE} nor {INDEX_FILE}, only {first_of(there)}"
            + (f"; {first_of(missing)} missing" if missing else "")
            + f": {_PULL}"
        )
    return [folder / name for name in due]


def _no_weights(folder: Path, names: list[str]) -> CheckpointError:
    wanted = f"{folder}: holds neither {SINGLE_FILE} nor {INDEX_FILE}"
    pickles = [name for name in names if Path(name).suffix in PICKLES]
    loose = [name for name in names if Path(name).suffix in (".safetensors", ".gguf")]
    unfinished = [name for name in names if name.endswith(UNFINISHED) and ".safetensors" in name]
    if unfinished:
        return CheckpointError(
            f"{wanted}: {first_of(unfinished)}: a download that was not finished; {_PULL}"
        )
    if any(name.endswith(".gguf") for name in loose):
        return CheckpointError(
            f"{wanted}, only {first_of(loose)}: `arriero models import FILE` makes a folder of it"
        )
    if loose:
        return CheckpointError(
            f"{wanted}, only {first_of(loose)}: if that is the whole model in Hugging Face's "
            f"names, rename it to {SINGLE_FILE}; else {_PULL}"
        )
    if pickles:
        remedy = "; Meta's own release: `arriero models convert`" if _is_meta(names) else ""
        return CheckpointError(f"{wanted}: {pickle_words(pickles)}{remedy}")
    return CheckpointError(f"{wanted}; fetch the weights: `arriero models pull`")


def _is_meta(names: list[str]) -> bool:
    return any(one.startswith("consolidated.") and one.endswith(".pth") for one in names)
