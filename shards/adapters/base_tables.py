"""The base model's embedding and head within an adapter's file: must be the served model's.

peft writes both tables beside an adapter that changes them. Knows tables; knows nothing of
adapters' matrices.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from arriero.shards.adapters.bank_plan import EMBEDDINGS, HEAD
from arriero.shards.checkpoint.formats.modules import Module
from arriero.shards.checkpoint.reader import Checkpoint
from arriero.shards.checkpoint.tensor_folder import FLOAT_DTYPES, TensorFolder
from arriero.shards.errors import CheckpointError

_ENDS = (".base_layer.weight", ".weight")
_ROWS = 4096
"""Rows that are compared at a time."""


def table_of(name: str, modules: Mapping[str, Module]) -> str | None:
    """The module whose base table a tensor of an adapter's file is; None for another tensor.

    Args:
        name: name of the tensor.
        modules: modules by their name without any prefix.
    """
    for end in _ENDS:
        prefix = name.removesuffix(end)
        module = modules.get(prefix.rpartition(".")[2])
        if prefix != name and module is not None and module.kind in (EMBEDDINGS, HEAD):
            return module.name
    return None


def check_tables(
    folder: TensorFolder, tables: Mapping[str, str], modules: Mapping[str, Module], model_path: str
) -> None:
    """Refuse tables that differ from the model's by more than the rounding to their dtypes.

    Args:
        folder: the adapter's tensors.
        tables: name of each table in the file, by module.
        modules: modules of the model by name.
        model_path: folder of the model; "" if unknown.

    Raises:
        CheckpointError: a table differs, or the model's own table cannot be compared.
    """
    if not tables:
        return
    base = Checkpoint.open(model_path) if model_path else None
    for name, stored in tables.items():
        where = f"{folder.path / Path(folder.stored[stored].file).name}: {stored!r}"
        table, shape = _base_table(base, name), modules[name].shape
        if table is None:
            raise CheckpointError(
                f"{where} cannot be compared with the model's table, which is not stored as plain "
                "numbers; save the adapter with `save_embedding_layers=False`"
            )
        other = folder.tensor(stored)
        if tuple(other.shape) != shape or other.dtype not in FLOAT_DTYPES:
            raise CheckpointError(
                f"{where} has shape {list(other.shape)} and dtype {other.dtype}, but the model's "
                f"table has {list(shape)}; serve the adapter with its own base model"
            )
        if not _equal(table[: shape[0]], other):
            raise CheckpointError(
                f"{where} differs from the model's table; serve the adapter with its own base model"
            )


def _base_table(base: Checkpoint | None, name: str) -> Tensor | None:
    """The table of a checkpoint; that of the embedding for a head which is tied to it."""
    if base is None:
        return None
    stored = f"{name}.weight"
    if stored not in base.stored and name.endswith("lm_head"):
        stored = f"{name.removesuffix('lm_head')}model.embed_tokens.weight"
    if stored not in base.stored or base.dtype(stored) not in FLOAT_DTYPES:
        return None
    return base.tensor(stored)


def _equal(table: Tensor, other: Tensor) -> bool:
    """Whether one table is the other, rounded to its dtype."""
    for start in range(0, len(table), _ROWS):
        ours, theirs = table[start : start + _ROWS], other[start : start + _ROWS]
        same = torch.equal(ours.to(theirs.dtype), theirs) or torch.equal(
            theirs.to(ours.dtype), ours
        )
        if not same:
            return False
    return True
