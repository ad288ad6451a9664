"""Messages between leader and slices about adapters: what to load, to drop and to put into slots.

The leader alone decides. Loads travel on the channel of the plans, and slices make loads beside
their steps; a plan puts an adapter into a slot only after every slice has reported the load. Knows
the contents of a message; knows nothing of files and tensors.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class AdapterLoad:
    """An adapter to read into host memory: its digest, and its folder."""

    digest: str
    path: str


@dataclass(frozen=True, slots=True)
class SlotChange:
    """An adapter, by digest, that enters a slot of the device."""

    slot: int
    digest: str


@dataclass(slots=True)
class AdapterBatch:
    """Changes of the host memory for adapters.

    Attributes:
        dropped: digests of adapters to drop; made first.
        loads: adapters to read.
        dp_rank: data-parallel rank whose slices make the changes.
    """

    dropped: list[str] = field(default_factory=list)
    loads: list[AdapterLoad] = field(default_factory=list)
    dp_rank: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterResult:
    """The end of a load on one rank.

    Attributes:
        rank: rank that reports.
        digest: adapter.
        error: why the adapter cannot be served; "" after success.
        dp_rank: data-parallel rank of the rank.
    """

    rank: int
    digest: str
    error: str = ""
    dp_rank: int = 0
