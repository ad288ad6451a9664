"""Verification of a model folder: in seconds from headers, or in full from every byte.

Knows stored checkpoints; knows nothing of slices, engines and printed reports.
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
from arriero.shards.checkpoint.formats.form_fit import non_finite_scales
from arriero.shards.checkpoint.reader import Checkpoint
from arriero.shards.checkpoint.safetensors_header import StoredTensor
from arriero.shards.errors import CheckpointError
from arriero.shards.files.json_file import read_json_object

VerifyProgress = Callable[[int, int, str], None]
"""Called with bytes read so far, total bytes, and the name of the current file."""

_PIECE_BYTES = 16 * 1024 * 1024
_MAX_SCALE_BYTES = 256 * 1024 * 1024
"""Limit in bytes for scales that are read without `deep`; more would take too long."""
_TOKENIZER = "tokenizer.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """Result of a verification.

    Attributes:
        path: the folder.
        problems: one sentence each; empty if the folder is right.
        num_files: number of safetensors files.
        num_tensors: number of stored tensors.
        num_parameters: number of weights in the config's model, a tied head counted once.
        nbytes: bytes of all tensors.
        nbytes_by_dtype: bytes of all tensors by dtype, such as "bfloat16".
        form: dtype of plain weights, or name of the quantization.
        digest: `TensorFolder.digest`; empty if the folder could not be opened.
        notes: accepted settings and tensors without effect, one sentence each.
        file_digests: with `deep`: BLAKE2b (32 hex digits) of all bytes of each file.
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
        """Whether there are no problems."""
        return not self.problems


def verify(path: Path | str, deep: bool = False, progress: VerifyProgress | None = None) -> Report:
    """Compare index, headers, names, shapes, dtypes and sizes of a folder with the config.

    Defects are reported, never raised.

    Args:
        path: model folder.
        deep: also read every byte: find values that are infinite or not a number, and compute the
            digest of each file.
        progress: called after each file of a deep verification.
    """
    folder = Path(path)
    try:
        checkpoint = Checkpoint.open(folder)
        problems = [*checkpoint.misfits(), *_tokenizer_problems(folder)]
        digest = checkpoint.digest
        scales_read = deep
        if not deep and not problems and checkpoint.scheme is not None:
            bad_values, scales_read = non_finite_scales(checkpoint, _MAX_SCALE_BYTES)
            problems += bad_values
    except CheckpointError as error:
        return Report(path=folder, problems=(str(error),))
    model, scheme = checkpoint.config, checkpoint.scheme
    notes = _notes(checkpoint)
    if scheme is not None and not scales_read:
        notes.append("scales were not checked: only a deep verification reads them")
    file_digests: dict[str, str] = {}
    if deep:
        total, done = sum(checkpoint.data(file).numel() for file in checkpoint.files), 0
        for file in checkpoint.files:
            tensors = [tensor for tensor in checkpoint.stored.values() if tensor.file == file]
            file_digests[file.name], bad_values = _read_all(checkpoint.data(file), tensors)
            problems += [f"{file.name}: {problem}" for problem in bad_values]
            done += checkpoint.data(file).numel()
            if progress is not None:
                progress(done, total, file.name)
    by_dtype: Counter[str] = Counter()
    for tensor in checkpoint.stored.values():
        by_dtype[str(tensor.dtype).removeprefix("torch.")] += tensor.nbytes
    return Report(
        path=folder,
        problems=tuple(problems),
        num_files=len(checkpoint.files),
        num_tensors=len(checkpoint.names),
        num_parameters=model.num_parameters(),
        nbytes=checkpoint.nbytes,
        nbytes_by_dtype=dict(by_dtype),
        form=model.torch_dtype if scheme is None else scheme.method,
        digest=digest,
        notes=tuple(notes),
        file_digests=file_digests,
    )


def _tokenizer_problems(folder: Path) -> list[str]:
    """Problems of tokenizer.json, which a gateway must read; a missing file is no problem here."""
    file = folder / _TOKENIZER
    if not os.path.lexists(file):
        return []
    try:
        read_json_object(file)
    except CheckpointError as error:
        return [str(error)]
    return []


def _notes(checkpoint: Checkpoint) -> list[str]:
    notes = [] if checkpoint.scheme is None else list(checkpoint.scheme.notes)
    extra = not_read(checkpoint, checkpoint.expected)
    if extra:
        more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
        notes.append(f"not read: {extra[0][:200]}{more}")
    return notes


def _read_all(data: torch.Tensor, tensors: list[StoredTensor]) -> tuple[str, list[str]]:
    """Digest of a file, and problems of the tensor values; each byte is read once."""
    digest = hashlib.blake2b(digest_size=16)
    problems: list[str] = []
    position = 0
    for tensor in sorted(tensors, key=lambda tensor: (tensor.start, tensor.stop)):
        digest.update(data[position : tensor.start].numpy().data)
        num_bad = 0
        for start in range(tensor.start, tensor.stop, _PIECE_BYTES):
            piece = data[start : min(start + _PIECE_BYTES, tensor.stop)]
            digest.update(piece.numpy().data)
            num_bad += count_non_finite(piece, tensor.dtype)
        if num_bad:
            problems.append(
                f"tensor {tensor.name!r} of shape {list(tensor.shape)} holds {num_bad} values that "
                "are infinite or not a number; fetch the file again"
            )
        position = tensor.stop
    digest.update(data[position:].numpy().data)
    return digest.hexdigest(), problems


def count_non_finite(piece: torch.Tensor, dtype: torch.dtype) -> int:
    """Number of values in bytes of a dtype that are infinite or not a number; 0 for integers."""
    if not dtype.is_floating_point:
        return 0
    if piece.storage_offset() % dtype.itemsize:
        piece = piece.clone()
    values = piece.view(dtype)
    if dtype.itemsize == 1:  # `torch.isfinite` does not support 8-bit formats
        values = values.to(torch.float32)
    return int(values.numel() - torch.isfinite(values).sum())
