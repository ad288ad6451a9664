"""Keys that a query attends to: all earlier keys, a chunk, or a window with attention sinks.

Knows positions; knows nothing of tensors. Needs no torch, so that schedulers and planners count by
the same rule as kernels.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionMaskSpec:
    """The query at position p attends to keys `first(p)` to p, and to keys below `sinks`.

    Positions count from the start of the sequence and never change, neither in the mask nor in
    RoPE, as in the training of models with a sliding window (Beltagy and others, "Longformer",
    2020; Jiang and others, "Mistral 7B", 2023). Attention sinks, the first tokens that stay
    visible, are after Xiao and others, "Efficient Streaming Language Models with Attention Sinks",
    2023; their paper numbers positions within the cache instead.

    Attributes:
        chunk_size: C > 0: keys from p // C * C on (Llama 4's chunked attention).
        window: W > 0: keys from p - W + 1 on: the last W keys, the query's own key included.
        sinks: number of first keys that stay visible; only with a window.

    Raises:
        ValueError: a size is negative, chunk and window are both set, or sinks have no window.
    """

    chunk_size: int = 0
    window: int = 0
    sinks: int = 0

    def __post_init__(self) -> None:
        if min(self.chunk_size, self.window, self.sinks) < 0:
            raise ValueError(f"{self}: sizes must be at least 0; 0 means off")
        if self.chunk_size and self.window:
            raise ValueError(f"{self}: set `chunk_size` or `window`, not both")
        if self.sinks and not self.window:
            raise ValueError(f"{self}: `sinks` need a `window`; set `window`, or `sinks` to 0")

    def first(self, position: int) -> int:
        """The first key that a query at `position` attends to, sinks aside."""
        if self.chunk_size:
            return position // self.chunk_size * self.chunk_size
        return max(0, position - self.window + 1) if self.window else 0


FULL_ATTENTION = AttentionMaskSpec()
