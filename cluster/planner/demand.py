"""Input of a group's plan: the load, and the settings of the KV cache.

Knows sizes; knows nothing of devices and models.
"""

from __future__ import annotations

from dataclasses import dataclass

from arriero.cluster.planner.drafter_bytes import Drafter


@dataclass(frozen=True, kw_only=True, slots=True)
class KvDemand:
    """The load for which a group is planned.

    Attributes:
        context: tokens of a sequence; at least a sequence of this length must fit.
        max_sequences: number of sequences that run at once, on each data-parallel rank.
        max_batch_tokens: largest number of tokens of a step.
        block_size: tokens of a KV block.
        kv_dtype: dtype of the KV cache.
        kv_bytes: bytes of the whole group's pool; None takes all memory that is left.
        num_blocks: number of blocks of each dp rank, instead of `kv_bytes`.
        num_local_blocks: number of blocks of the chunk-local pool of each dp rank.
        spare_experts: second copies of busy experts on a rank in each routed layer.
        sliding_window, attention_sinks: as in `GroupConfig`; the leader decides whether the model
            may have a window.
        reserve_bytes: bytes that stay free; None takes the device's context and `RESERVE_SHARE` of
            the device's memory.
        drafter: the model that drafts on the slices of the last stage; None for none.
    """

    context: int
    max_sequences: int = 256
    max_batch_tokens: int = 2048
    block_size: int = 16
    kv_dtype: str = "bfloat16"
    kv_bytes: int | None = None
    num_blocks: int | None = None
    num_local_blocks: int | None = None
    spare_experts: int = 0
    sliding_window: int | None = None
    attention_sinks: int = 0
    reserve_bytes: int | None = None
    drafter: Drafter | None = None
