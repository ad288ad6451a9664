"""Inputs of a model's layers, on one stage or several in one process.

Knows slices and taps; knows nothing of drafters.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from arriero.kernels.flat_batch import FlatBatch
from arriero.shards.checkpoint.reader import Checkpoint
from arriero.shards.collectives.mesh import Mesh
from arriero.shards.config.group import GroupConfig
from arriero.shards.layout.families import parts_of
from arriero.shards.models.model_slice import SliceSettings, load_slice
from arriero.shards.worker.rope_table import Rope
from support.slices import BLOCK, CPU, ThreadMesh, exact_ops


def outputs_and_taps(
    path: Path, token_ids: Sequence[int], taps: tuple[int, ...], *, pp: int = 1, kernels: str
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Output of the last layer and the taps, over `pp` stages; chunks must hold all tokens."""
    length = len(token_ids)
    num_blocks = -(-length // BLOCK)
    checkpoint = Checkpoint.open(path)
    config = checkpoint.config
    positions = torch.arange(length, dtype=torch.int32)
    cos, sin = Rope(config.inv_freq(), length, CPU).at(positions)
    batch = FlatBatch(
        positions_T=positions,
        query_start_S1=torch.tensor([0, length], dtype=torch.int32),
        context_S=torch.tensor([length], dtype=torch.int32),
        block_table_SB=torch.arange(num_blocks, dtype=torch.int32)[None],
        slots_T=positions,
        cos_TD=cos,
        sin_TD=sin,
        max_query=length,
        max_context=length,
    )
    batch = replace(batch, local=batch)
    tokens = torch.tensor(token_ids, dtype=torch.int32)
    x: Tensor | None = None
    kept: tuple[Tensor, ...] = ()
    for part in parts_of(config, GroupConfig(model_path=str(path), pp=pp)):
        mesh = cast(Mesh, ThreadMesh(1, 0, [], threading.Barrier(1)))
        settings = SliceSettings(
            dtype=torch.float32,
            num_blocks=num_blocks,
            num_local_blocks=num_blocks,
            block_size=BLOCK,
            taps=taps,
        )
        model = load_slice(checkpoint, part, mesh, exact_ops(kernels), settings)
        if x is None:
            x = model.embed(tokens)
        else:
            assert x.shape == (length, model.taps.width(config.hidden_size))
            x = model.taps.receive(x)
        x = model.decoder(x, batch)
        if part.last_stage:
            kept = model.taps.kept(length)
        else:
            x = model.taps.send(x)
    assert x is not None
    return x, kept
