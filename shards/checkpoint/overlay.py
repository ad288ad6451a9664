"""A model folder whose tensors are replaced by those of other folders and files.

A source with config.json is a whole checkpoint of the same model and replaces every tensor. Any
other source holds some tensors under their names and replaces those alone. Tokenizer, settings and
the scales of the KV cache stay those of the model folder. Knows headers; reads no tensor.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path

from arriero.shards.checkpoint.fit import KV_SCALES
from arriero.shards.checkpoint.reader import Checkpoint
from arriero.shards.checkpoint.safetensors_header import StoredTensor, read_header
from arriero.shards.checkpoint.sources import is_whole
from arriero.shards.checkpoint.tensor_folder import TensorFolder
from arriero.shards.errors import CheckpointError

Signature = tuple[tuple[str, int, int, int], ...]
"""Path, inode, size and time of the last change of each file."""


def open_weights(model_path: str, sources: Sequence[str]) -> Checkpoint:
    """The model folder with the tensors of `sources`, the later before the earlier.

    Raises:
        CheckpointError: a source is unreadable, is of another model, or holds no tensor; the
            message names the file. The tensors themselves are checked by `check_whole`.
    """
    base = Checkpoint.open(model_path)
    if not sources:
        return base
    stored = dict(base.stored)
    for source in sources:
        path = Path(source)
        if not path.is_absolute():
            raise CheckpointError(f"{source[:300]!r} is no absolute path; give one on every node")
        if is_whole(source):
            stored = dict(_whole(path, base).stored)
        else:
            stored.update(_some(path))
    # one set of scales for the life of the model folder: a trainer does not calibrate anew. The
    # digest of pushed weights, and with it the keys of blocks, then names the scales in use.
    stored = {name: x for name, x in stored.items() if not name.endswith(KV_SCALES)}
    stored |= {name: x for name, x in base.stored.items() if name.endswith(KV_SCALES)}
    return Checkpoint(base.path, base.config, stored, base.scheme, base.ranged)


def signature(folder: TensorFolder) -> Signature:
    """State of the files; equal while no file is written or replaced.

    Raises:
        CheckpointError: a file is gone.
    """
    states = []
    for file in folder.files:
        try:
            state = os.stat(file)
        except OSError as error:
            raise CheckpointError(f"{file}: is gone: {error.strerror}; write it again") from None
        states.append((str(file), state.st_ino, state.st_size, state.st_mtime_ns))
    return tuple(states)


def _whole(path: Path, base: Checkpoint) -> Checkpoint:
    other = Checkpoint.open(path)
    if other.config != base.config:
        names = ", ".join(_different(base.config, other.config)) or "the family"
        raise CheckpointError(
            f"{path}/config.json: differs from the served model's in {names}; a push replaces "
            "weights alone: use `arriero rollout` for another model"
        )
    if other.scheme != base.scheme:
        raise CheckpointError(
            f"{path}: is quantized otherwise than the served model; push weights of the same form, "
            "or use `arriero rollout`"
        )
    return other


def _different(before: object, after: object) -> list[str]:
    """Names of the fields of two settings that differ."""
    if type(before) is not type(after) or not is_dataclass(before):
        return []
    names = [field.name for field in fields(before)]
    return [name for name in names if getattr(before, name) != getattr(after, name)]


def _some(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a file, or of all safetensors files of a folder."""
    if not path.exists():
        raise CheckpointError(
            f"{path}: is not on this node; copy it here, or push the weights again"
        )
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files:
        raise CheckpointError(f"{path}: holds neither config.json nor a *.safetensors file")
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        if file.suffix != ".safetensors" or not file.is_file():
            raise CheckpointError(f"{file}: is no safetensors file; pickles are refused")
        for name, tensor in read_header(file).items():
            if name in tensors:
                raise CheckpointError(f"{file}: tensor {name[:200]!r} is in two files of {path}")
            tensors[name] = tensor
    if not tensors:
        raise CheckpointError(f"{path}: holds no tensor")
    return tensors
