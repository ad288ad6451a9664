"""Writing a model folder: safetensors shards and their index, tensor by tensor.

Knows files; holds one tensor at a time. The folder appears whole or not at all.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from arriero.shards.checkpoint.index import INDEX_FILE
from arriero.shards.checkpoint.safetensors_header import make_header
from arriero.shards.errors import CheckpointError

Progress = Callable[[int, int, str], None]
"""Called with tensors written so far, tensors in all, and the name of the last."""

Entries = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]

SHARD_BYTES = 5 * 10**9


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `out` at the end and is gone if that is not reached.

    Raises:
        CheckpointError: `out` exists, or cannot be written.
    """
    if out.exists():
        raise CheckpointError(f"{out}: exists already; remove it or choose another folder")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))
    except OSError as error:
        raise CheckpointError(f"{out}: cannot be written: {error.strerror or error}") from None
    try:
        partial.chmod(0o755)
        yield partial
        partial.rename(out)
    except OSError as error:
        raise CheckpointError(f"{out}: cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_shards(
    folder: Path,
    entries: Entries,
    tensor: Callable[[str], Tensor],
    progress: Progress | None = None,
) -> None:
    """Write shards of at most `SHARD_BYTES`, in the order of `entries`, and their index.

    Args:
        folder: exists.
        entries: dtype and shape of each tensor.
        tensor: gives each, when it is due.
        progress: told of every tensor written.
    """
    shards: list[dict[str, tuple[torch.dtype, tuple[int, ...]]]] = [{}]
    room = SHARD_BYTES
    for name, (dtype, shape) in entries.items():
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        if nbytes > room and shards[-1]:
            shards.append({})
            room = SHARD_BYTES
        shards[-1][name] = (dtype, shape)
        room -= nbytes
    placed: dict[str, str] = {}
    for i, held in enumerate(shards):
        file_name = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        with (folder / file_name).open("wb") as stream:
            stream.write(make_header(held))
            for name, (dtype, shape) in held.items():
                made = tensor(name)
                assert made.dtype == dtype and tuple(made.shape) == shape, f"{name} is as announced"
                stream.write(made.contiguous().view(-1).view(torch.uint8).numpy().data)
                placed[name] = file_name
                if progress is not None:
                    progress(len(placed), len(entries), name)
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": placed}, indent=1))
