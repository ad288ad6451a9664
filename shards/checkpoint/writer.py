"""Writer of a model folder: safetensors shards and their index, tensor by tensor.

Knows files; knows nothing of models. Memory holds one tensor. The folder appears complete or not at
all.
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
"""Called with tensors written so far, total tensors, and the name of the last tensor."""

Entries = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]

SHARD_BYTES = 5 * 10**9


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A temporary folder, renamed to `out` at the end of the block and removed after an error.

    Raises:
        CheckpointError: `out` exists or cannot be written.
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
        folder: existing folder.
        entries: dtype and shape of each tensor, by name.
        tensor: returns a tensor by name; called in the order of `entries`.
        progress: called after each written tensor.
    """
    shards: list[dict[str, tuple[torch.dtype, tuple[int, ...]]]] = [{}]
    free_bytes = SHARD_BYTES
    for name, (dtype, shape) in entries.items():
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        if nbytes > free_bytes and shards[-1]:
            shards.append({})
            free_bytes = SHARD_BYTES
        shards[-1][name] = (dtype, shape)
        free_bytes -= nbytes
    file_of_tensor: dict[str, str] = {}
    for i, shard in enumerate(shards):
        file_name = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        with (folder / file_name).open("wb") as stream:
            stream.write(make_header(shard))
            for name, (dtype, shape) in shard.items():
                data = tensor(name)
                assert data.dtype == dtype and tuple(data.shape) == shape, (
                    f"{name}: dtype and shape of its entry"
                )
                stream.write(data.contiguous().view(-1).view(torch.uint8).numpy().data)
                file_of_tensor[name] = file_name
                if progress is not None:
                    progress(len(file_of_tensor), len(entries), name)
    (folder / INDEX_FILE).write_text(
        json.dumps({"metadata": {}, "weight_map": file_of_tensor}, indent=1)
    )
