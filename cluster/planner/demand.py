"""Input of a group's plan: how the group divides its model, and the load.

Knows sizes; knows nothing of devices and models.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """How a group divides its model.

    Attributes:
        tp, pp: number of tensor-parallel slices of a stage, and of stages.
        dp: number of data-parallel attention ranks; 1 for a dense model.
        ep: number of slices that share the experts; None for a dense model, or for tp * dp.
        tp_shares, layer_split: as in `GroupConfig`.
    """

    tp: int = 1
    pp: int = 1
    dp: int = 1
    ep: int | None = None
    tp_shares: tuple[float, ...] | None = None
    layer_split: tuple[int, ...] | None = None

    @property
    def world_size(self) -> int:
        """Number of ranks of the group."""
        return self.tp * self.pp * self.dp

    def __str__(self) -> str:
        text = f"TP{self.tp}"
        if self.dp > 1:
            text += f"xDP{self.dp}"
        if self.pp > 1:
            text += f"xPP{self.pp}"
        if self.ep is not None:
            text += f" EP{self.ep}"
        return text


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
