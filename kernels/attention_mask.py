"""Which earlier keys a query sees: everything, its own chunk, or a window and the first ones.

Knows positions; needs no torch, so that schedulers and planners count by the same rule as kernels.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionMaskSpec:
    """The query at position p sees keys `first(p)` to p, and keys below `sinks`.

    Positions count from the sequence's start and are never renumbered, neither in the mask nor in
    RoPE: so were models with a sliding window trained (Beltagy and others, "Longformer", 2020;
    Jiang and others, "Mistral 7B", 2023). Keeping the first tokens as attention sinks is after
    Xiao and others, "Efficient Streaming Language Models with Attention Sinks", 2023, who number
    positions within the cache instead.

    Attributes:
        chunk_size: C > 0: keys from p // C * C on (Llama 4's chunked attention).
        window: W > 0: keys from p - W + 1 on: the last W, the query's own among them.
        sinks: with a window: the first so many keys too.

    Raises:
        ValueError: a negative size, a chunk and a window at once, or sinks without a window.
    """

    chunk_size: int = 0
    window: int = 0
    sinks: int = 0

    def __post_init__(self) -> None:
        if min(self.chunk_size, self.window, self.sinks) < 0:
            raise ValueError(f"{self}: sizes start at 0, for off")
        if self.chunk_size and self.window:
            raise ValueError(f"{self}: a chunk and a window exclude each other")
        if self.sinks and not self.window:
            raise ValueError(f"{self}: `sinks` are kept beside a `window`; without one all are")

    def first(self, position: int) -> int:
        """The first key that a query at `position` sees, sinks aside."""
        if self.chunk_size:
            return position // self.chunk_size * self.chunk_size
        return max(0, position - self.window + 1) if self.window else 0


FULL_ATTENTION = AttentionMaskSpec()
