"""The check of an EAGLE-3 head's folder: each tensor is claimed, or the folder is refused by name.

Knows files, and the maps between the vocabularies of head and target; knows nothing of steps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from arriero.shards.checkpoint.fit import NEVER_READ
from arriero.shards.checkpoint.safetensors_header import DTYPES
from arriero.shards.checkpoint.tensor_folder import TensorFolder
from arriero.shards.errors import CheckpointError
from arriero.shards.models.eagle3.config import Eagle3Config
from arriero.shards.models.eagle3.tensors import (
    D2T,
    EMBEDDING,
    HEAD,
    T2D,
    Eagle3Tensors,
    eagle3_specs,
)


def check_head(folder: TensorFolder, config: Eagle3Config) -> Eagle3Tensors:
    """Compare a folder with the tensors that the config requires.

    Raises:
        CheckpointError: a tensor is missing, has another shape or dtype, or is no part of a head;
            or a map between the vocabularies is missing or wrong. Names file and tensor.
    """
    has = Eagle3Tensors.of(folder.stored)
    _check_shared(folder, config, has)
    expected = {spec.name: spec for spec in eagle3_specs(config, has)}
    for name, spec in expected.items():
        tensor = folder.stored.get(name)
        if tensor is None:
            raise CheckpointError(
                f"{folder.path}: tensor {name!r} of shape {list(spec.shape)} is missing; fetch the "
                "EAGLE-3 head again"
            )
        if tensor.shape != spec.shape or tensor.dtype not in [DTYPES[x] for x in spec.dtypes]:
            raise CheckpointError(
                f"{tensor.file}: tensor {name!r} has shape {list(tensor.shape)} and dtype "
                f"{tensor.dtype}, but the config requires {list(spec.shape)} and one of "
                f"{', '.join(spec.dtypes)}; correct config.json, or fetch the head again"
            )
    for name, tensor in folder.stored.items():
        if name not in (*expected, D2T, T2D) and not name.endswith(NEVER_READ):
            raise CheckpointError(
                f"{tensor.file}: tensor {name[:200]!r} of shape {list(tensor.shape)} is no part of "
                "an EAGLE-3 head with this config; use a head of a supported layout"
            )
    vocabulary_map(folder, config)
    return has


def _check_shared(folder: TensorFolder, config: Eagle3Config, has: Eagle3Tensors) -> None:
    """Refuse a head that lacks a table which the target's cannot replace."""
    for name, present, fits in (
        (EMBEDDING, has.has_embedding, True),
        (HEAD, has.has_head, config.draft_vocab_size == config.layer.vocab_size),
    ):
        same = config.target_hidden_size == config.layer.hidden_size
        if not present and not (fits and same):
            raise CheckpointError(
                f"{folder.path}: tensor '{name}.weight' is missing, and the target's has another "
                f"shape: hidden size {config.target_hidden_size} against "
                f"{config.layer.hidden_size}, vocabulary {config.layer.vocab_size} against "
                f"{config.draft_vocab_size}; fetch the EAGLE-3 head again"
            )


def vocabulary_map(folder: TensorFolder, config: Eagle3Config) -> Tensor:
    """The target's token for each draft token, int64 [draft vocabulary].

    `d2t` holds offsets: draft token i is token i + d2t[i] of the target. `t2d` marks the target's
    tokens that the head can draft.

    Raises:
        CheckpointError: `d2t` is missing, although the vocabularies differ; or a map has another
            shape, names a token twice or none of the target; or both maps differ.
    """
    size, vocab = config.draft_vocab_size, config.layer.vocab_size
    targets = torch.arange(size)
    if D2T in folder.stored:
        _check_map(folder, D2T, (size,), (torch.int64, torch.int32))
        targets = targets + folder.copy(D2T).long()
    elif size != vocab:
        raise CheckpointError(
            f"{folder.path}: tensor {D2T!r} is missing, but `draft_vocab_size`={size} differs from "
            f"`vocab_size`={vocab}; fetch the EAGLE-3 head again"
        )
    outside = (targets < 0) | (targets >= vocab)
    if outside.any():
        at = int(outside.nonzero()[0])
        raise CheckpointError(
            f"{folder.path}: tensor {D2T!r} makes draft token {at} to token {int(targets[at])}, "
            f"but the target has {vocab} tokens; use the head of this target"
        )
    allowed = torch.zeros(vocab, dtype=torch.bool)
    allowed[targets] = True
    if int(allowed.sum()) < size:
        raise CheckpointError(
            f"{folder.path}: tensor {D2T!r} names tokens twice: {size} draft tokens, but "
            f"{int(allowed.sum())} different ones; fetch the EAGLE-3 head again"
        )
    if T2D in folder.stored:
        _check_map(folder, T2D, (vocab,), (torch.bool, torch.uint8, torch.int64))
        if not torch.equal(folder.copy(T2D).bool(), allowed):
            raise CheckpointError(
                f"{folder.path}: tensors {D2T!r} and {T2D!r} name different tokens; fetch the "
                "EAGLE-3 head again"
            )
    return targets


def _check_map(
    folder: TensorFolder, name: str, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]
) -> None:
    if folder.shape(name) != shape or folder.dtype(name) not in dtypes:
        raise CheckpointError(
            f"{folder.path}: tensor {name!r} has shape {list(folder.shape(name))} and dtype "
            f"{folder.dtype(name)}, but the config requires {list(shape)} of "
            f"{' or '.join(map(str, dtypes))}; correct config.json, or fetch the head again"
        )
