"""All slices of a group in one process, a thread each: their logits without an engine."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from arriero.kernels.flat_batch import FlatBatch
from arriero.kernels.kv_cache import cache_dtype
from arriero.kernels.lora import AdapterRows
from arriero.kernels.ops import Ops
from arriero.kernels.select import ops_for
from arriero.shards.adapters.adapter import Adapter
from arriero.shards.checkpoint.kv_scales import kv_scales
from arriero.shards.checkpoint.reader import Checkpoint
from arriero.shards.collectives.mesh import Mesh
from arriero.shards.config.group import GroupConfig
from arriero.shards.layout.families import parts_of
from arriero.shards.models.model_slice import ModelSlice, SliceSettings, load_slice
from arriero.shards.worker.rope_table import Rope

CPU = torch.device("cpu")
BLOCK = 16


class ThreadMesh:
    """What a slice asks of its mesh; sums are in rank order, as `Mesh.reduce` takes them."""

    def __init__(self, tp: int, tp_rank: int, parts: list[Any], barrier: threading.Barrier) -> None:
        self.tp, self.device = tp, CPU
        self._rank, self._parts, self._barrier = tp_rank, parts, barrier

    def reduce(self, x_TH: Tensor) -> Tensor:
        if self.tp == 1:
            return x_TH
        self._parts[self._rank] = x_TH.clone()
        self._barrier.wait(60)
        total = self._parts[0].clone()
        for part in self._parts[1:]:
            total += part
        self._barrier.wait(60)
        return cast(Tensor, total)

    def reduce_norm(self, *operands: object) -> None:
        """No kernel sums and norms here."""

    def first_half(self, num_rows: int, row_nbytes: int, *, routed: bool) -> int:
        """Steps stay whole."""
        return 0


def exact_ops(kernels: str) -> Ops:
    """A backend that does not round the inputs of products to bfloat16, as it otherwise may."""
    if kernels == "cpu":
        try:
            from arriero.kernels.cpu.backend import CpuOps

            return CpuOps(CPU, 1, exact_inputs=True)
        except RuntimeError as error:
            pytest.skip(str(error))
    return ops_for(CPU, kernels, threads=1)


def logits_of(
    path: Path | str,
    tokens: list[int],
    *,
    tp: int = 1,
    pp: int = 1,
    kernels: str = "reference",
    make_ops: Callable[[], Ops] | None = None,
    quantization: str | None = None,
    adapter: Adapter | None = None,
    kv_dtype: Literal["int8", "fp8"] | None = None,
    visit: Callable[[ModelSlice], object] = lambda model: None,
) -> Tensor:
    """Logits [T, V] of one sequence, float32 weights and activations.

    `visit` is called with each slice after its layers, while the cache holds the sequence.
    """
    checkpoint = Checkpoint.open(path)
    checkpoint.check_whole()
    config = checkpoint.config
    group = GroupConfig(model_path=str(path), tp=tp, pp=pp, dtype="float32", kv_dtype=kv_dtype)
    parts = parts_of(config, group)
    length = len(tokens)
    num_blocks = -(-length // BLOCK)
    positions = torch.arange(length, dtype=torch.int32)
    cos, sin = Rope(config.inv_freq(), length, CPU).at(positions)
    rows = None if adapter is None else AdapterRows.of(np.zeros(length, np.int32))
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
        adapters=rows,
    )
    x: Tensor | None = None
    for stage in range(pp):
        barrier, shared = threading.Barrier(tp), [None] * tp

        def run(rank: int, stage: int = stage, given: Tensor | None = x) -> Tensor:
            mesh = ThreadMesh(tp, rank, shared, barrier)  # noqa: B023
            ops = make_ops() if make_ops else exact_ops(kernels)
            part = parts[stage * tp + rank]
            held = load_slice(
                checkpoint,
                part,
                cast(Mesh, mesh),
                ops,
                SliceSettings(
                    dtype=torch.float32,
                    num_blocks=num_blocks,
                    block_size=BLOCK,
                    quantization=quantization,
                    kv_dtype=cache_dtype(group.cache_dtype),
                    kv_scales=kv_scales(checkpoint, part.layers) if group.scales_kv else {},
                    adapters=() if adapter is None else (adapter,),
                ),
            )
            if part.first_stage:
                out = held.embed(torch.tensor(tokens, dtype=torch.int32), rows)
            else:
                assert given is not None
                out = given.clone()
            out = held.decoder(out, batch)
            visit(held)
            return held.logits(out, rows) if part.last_stage else out

        with ThreadPoolExecutor(tp) as pool:
            outs = list(pool.map(run, range(tp)))
        x = torch.cat(outs, 1) if stage == pp - 1 else outs[0]
    assert x is not None
    return x
