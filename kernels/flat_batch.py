"""The tokens of a step: places of all sequences' tokens in the KV cache.

Knows index tensors; knows nothing of caches, layers and requests. Shape legend: kernels/ops.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from arriero.kernels.lora import AdapterRows


@dataclass(frozen=True, kw_only=True, slots=True)
class FlatBatch:
    """The tokens of a step and their places in the KV cache. Made once per step for all layers.

    All index tensors are int32, on the device.

    Attributes:
        positions_T: position of each token in its sequence.
        query_start_S1: shape [S + 1], first token of each sequence in the flat batch.
        context_S: tokens of the sequence in the cache, the tokens of this step included.
        block_table_SB: block ids by sequence, in order; entries past the context are arbitrary.
        slots_T: slot of each token's key and value: block id * block size + offset.
        cos_TD: shape [T, D / 2], float32; RoPE cosines at `positions_T`.
        sin_TD: shape [T, D / 2], float32; RoPE sines.
        max_query: longest query of the batch (a host integer: needs no device sync).
        max_context: longest context of the batch.
        local: the same tokens for layers with chunked attention that have a separate cache.
            Positions there count from a multiple of the chunk size, for each sequence, so that
            tables stay short; `cos_TD` and `sin_TD` are of global positions.
        adapters: tokens of requests with an adapter; None without one.
    """

    positions_T: Tensor
    query_start_S1: Tensor
    context_S: Tensor
    block_table_SB: Tensor
    slots_T: Tensor
    cos_TD: Tensor
    sin_TD: Tensor
    max_query: int
    max_context: int
    local: FlatBatch | None = None
    adapters: AdapterRows | None = None
