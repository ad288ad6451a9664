"""The work of a step on a rank: bytes, operations, launches and collectives by item.

Knows names and units; knows nothing of models and devices.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

Item = Literal[
    "step inputs",
    "embedding",
    "q, k, v product",
    "RoPE, cache write",
    "attention",
    "o product",
    "norms, residual",
    "MLP",
    "router",
    "dispatch, combine",
    "experts",
    "shared expert",
    "TP sums",
    "EP exchange",
    "PP hand-over",
    "vocabulary product",
    "logits to rank 0",
    "sampling",
]
"""Parts of a step, in the order of the account."""
ITEMS: tuple[Item, ...] = get_args(Item)

Kind = Literal["product", "float8 product", "triton product", "attention", "rows", "sampling"]
"""Kinds of kernels, each with efficiencies of its own; collectives have their own constants."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepLoad:
    """The sequences of a step, on each data-parallel rank.

    Attributes:
        sequences: number of sequences.
        new_tokens: new tokens of each sequence: 1 in a decode step.
        context: tokens of each sequence after the step.
        draws: a sequence has a temperature; else all rows are greedy.
    """

    sequences: int
    new_tokens: int = 1
    context: int
    draws: bool = False

    @property
    def tokens(self) -> int:
        """New tokens of all sequences."""
        return self.sequences * self.new_tokens

    @property
    def decodes(self) -> bool:
        """Each sequence has a single new token."""
        return self.new_tokens == 1

    def halves(self, num_rows: int) -> tuple[StepLoad, StepLoad]:
        """The first `num_rows` tokens, about half of all, and the others.

        A single sequence is cut; of several, whole sequences go to either half.
        """
        if self.sequences > 1:
            first = self.sequences // 2
            return replace(self, sequences=first), replace(self, sequences=self.sequences - first)
        left = self.new_tokens - num_rows
        return (
            replace(self, new_tokens=num_rows, context=self.context - left),
            replace(self, new_tokens=left),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """Work of an item.

    Attributes:
        item: the part of the step.
        kind: kind of the kernels.
        nbytes: bytes from and to device memory.
        operations: floating-point operations of products.
        launches: launches by kernel: names of Triton kernels, of torch's ops ("aten::mm") and of
            collectives ("all_gather").
        link_bytes: bytes that the rank receives from other ranks.
        network: the bytes and messages cross machines.
        messages: collectives and sends by name.
        meetings: times that a launch waits for the same launch of the other ranks.
        host_waits: times that the host waits for the device.
        captured: the kernels run in a CUDA graph.
        beside: sums of half a step's rows that run beside products of the other half.
    """

    item: Item
    kind: Kind = "rows"
    nbytes: float = 0.0
    operations: float = 0.0
    launches: Mapping[str, float] = field(default_factory=dict)
    link_bytes: float = 0.0
    network: bool = False
    messages: Mapping[str, float] = field(default_factory=dict)
    meetings: float = 0.0
    host_waits: float = 0.0
    captured: bool = True
    beside: float = 0.0

    @property
    def num_launches(self) -> float:
        """Launches of all kernels, collectives included."""
        return sum(self.launches.values()) + self.num_messages

    @property
    def num_messages(self) -> float:
        """Collectives and sends."""
        return sum(self.messages.values())

    def times(self, count: float) -> Work:
        """The work `count` times."""
        return Work(
            item=self.item,
            kind=self.kind,
            nbytes=self.nbytes * count,
            operations=self.operations * count,
            launches={name: number * count for name, number in self.launches.items()},
            link_bytes=self.link_bytes * count,
            network=self.network,
            messages={name: number * count for name, number in self.messages.items()},
            meetings=self.meetings * count,
            host_waits=self.host_waits * count,
            captured=self.captured,
            beside=self.beside * count,
        )


def launches_by_kernel(works: Iterable[Work]) -> Counter[str]:
    """Launches of all items by kernel, without collectives."""
    total: Counter[str] = Counter()
    for work in works:
        for name, number in work.launches.items():
            total[name] += round(number)
    return total
