"""Is a model folder what it claims to be? In seconds from headers, or in full from every byte.

Knows checkpoints as stored; knows nothing of slices, engines or how a report is printed.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from arriero.shards.checkpoint.fit import not_read
from arriero.shards.checkpoint.formats.form_fit import unfit_scales
from arriero.shards.checkpoint.reader import Checkpoint
from arriero.shards.checkpoint.safetensors_header import StoredTensor
from arriero.shards.errors import CheckpointError
from arriero.shards.files.json_file import read_json_object

VerifyProgress = Callable[[int, int, str], None]
"""Called with bytes read so far, bytes in all, and the name of the file being read."""

_PIECE_BYTES = 16 * 1024 * 1024
_MOST_SCALES = 256 * 1024 * 1024
"""Bytes of scales that are read without `deep`; more take longer than headers do."""
_TOKENIZER = "tokenizer.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What was found.

    Attributes:
        path: the folder.
        problems: one sentence each; empty when all is well.
        num_files: safetensors files.
        num_tensors: tensors stored.
        num_parameters: weights that the config calls for, a tied head counted once.
        nbytes: bytes of all tensors.
        nbytes_by_dtype: the same by dtype, such as "bfloat16".
        form: "bfloat16" and the like for plain weights, or the quantization's name.
        digest: `TensorFolder.digest`; empty when the folder could not be opened.
        notes: what was accepted and is not followed or not read, one sentence each.
        file_digests: after a deep look, BLAKE2b (32 hex digits) of every byte of each file.
    """

    path: Path
    problems: tuple[str, ...]
    num_files: int = 0
    num_tensors: int = 0
    num_parameters: int = 0
    nbytes: int = 0
    nbytes_by_dtype: dict[str, int] = field(default_factory=dict)
    form: str = ""
    digest: str = ""
    notes: tuple[str, ...] = ()
    file_digests: dict[str, str] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Nothing is wrong."""
        return not self.problems


def verify(path: Path | str, deep: bool = False, progress: VerifyProgress | None = None) -> Report:
    """Compare a folder's index, headers, names, shapes, dtypes and sizes with its config.

    Defects are reported, never raised.

    Args:
        path: a model folder.
        deep: also read every byte: no value may be infinite or not a number, and each file gets
            its digest.
        progress: told of the bytes read by a deep look.
    """
    folder = Path(path)
    try:
        found = Checkpoint.open(folder)
        problems = [*found.misfits(), *_tokenizer_problems(folder)]
        digest = found.digest
        scales_read = deep
        if not deep and not problems and found.scheme is not None:
            unfit, scales_read = unfit_scales(found, _MOST_SCALES)
            problems += unfit
    except CheckpointError as error:
        return Report(path=folder, problems=(str(error),))
    model, scheme = found.config, found.scheme
    notes = _notes(found)
    if scheme is not None and not scales_read:
        notes.append("scales were not looked at: a deep look reads every byte")
    file_digests: dict[str, str] = {}
    if deep:
        total, done = sum(found.data(file).numel() for file in found.files), 0
        for file in found.files:
            tensors = [one for one in found.stored.values() if one.file == file]
            file_digests[file.name], unfit = _read_all(found.data(file), tensors)
            problems += [f"{file.name}: {one}" for one in unfit]
            done += found.data(file).numel()
            if progress is not None:
                progress(done, total, file.name)
    by_dtype: Counter[str] = Counter()
    for one in found.stored.values():
        by_dtype[str(one.dtype).removeprefix("torch.")] += one.nbytes
    return Report(
        path=folder,
        problems=tuple(problems),
        num_files=len(found.files),
        num_tensors=len(found.names),
        num_parameters=model.num_parameters(),
        nbytes=found.nbytes,
        nbytes_by_dtype=dict(by_dtype),
        form=model.torch_dtype if scheme is None else scheme.method,
        digest=digest,
        notes=tuple(notes),
        file_digests=file_digests,
    )


def _tokenizer_problems(folder: Path) -> list[str]:
    """A tokenizer.json that no gateway could read; whether there must be one is not said here."""
    file = folder / _TOKENIZER
    if not os.path.lexists(file):
        return []
    try:
        read_json_object(file)
    except CheckpointError as error:
        return [str(error)]
    return []


def _notes(found: Checkpoint) -> list[str]:
    notes = [] if found.scheme is None else list(found.scheme.notes)
    extra = not_read(found, found.wanted)
    if extra:
        more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
        notes.append(f"not read: {extra[0][:200]}{more}")
    return notes


def _read_all(data: torch.Tensor, tensors: list[StoredTensor]) -> tuple[str, list[str]]:
    """Digest of a file, and what is wrong with its tensors' values; each byte is read once."""
    digest = hashlib.blake2b(digest_size=16)
    unfit: list[str] = []
    position = 0
    for one in sorted(tensors, key=lambda tensor: (tensor.start, tensor.stop)):
        digest.update(data[position : one.start].numpy().data)
        num_unfit = 0
        for start in range(one.start, one.stop, _PIECE_BYTES):
            piece = data[start : min(start + _PIECE_BYTES, one.stop)]
            digest.update(piece.numpy().data)
            num_unfit += _count_unfit(piece, one.dtype)
        if num_unfit:
            unfit.append(
                f"tensor {one.name!r} of shape {list(one.shape)} holds {num_unfit} values that "
                "are infinite or not a number"
            )
        position = one.stop
    digest.update(data[position:].numpy().data)
    return digest.hexdigest(), unfit


def _count_unfit(piece: torch.Tensor, dtype: torch.dtype) -> int:
    if not dtype.is_floating_point:
        return 0
    if piece.storage_offset() % dtype.itemsize:
        piece = piece.clone()
    values = piece.view(dtype)
    if dtype.itemsize == 1:  # torch does not classify the 8-bit formats
        values = values.to(torch.float32)
    return int(values.numel() - torch.isfinite(values).sum())
