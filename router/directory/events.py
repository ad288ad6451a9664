"""What a group says of its blocks: changes in numbered batches, or everything it has.

Knows the wire; knows nothing of how either end keeps it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from arriero.router.directory.table import Keys

Kinds = npt.NDArray[np.uint8]
"""Of `Change`."""


class Change(IntEnum):
    """What became of a block in a group."""

    ON_DEVICE = 0
    OFF_DEVICE = 1
    KEPT = 2
    """It is in host memory or on disk."""
    DROPPED = 3
    """It is in neither any more."""

    @property
    def on_device(self) -> bool:
        """Whether it is about the device."""
        return self in (Change.ON_DEVICE, Change.OFF_DEVICE)

    @property
    def holds(self) -> bool:
        """Whether the group has the block there now."""
        return self in (Change.ON_DEVICE, Change.KEPT)


def _none() -> Keys:
    return np.zeros(0, dtype=np.uint64)


@dataclass(frozen=True, slots=True)
class Batch:
    """Changes, in the order in which they came.

    Attributes:
        number: counts a group's batches up from its last snapshot, whose own number is one less.
        kinds: [N] uint8, of `Change`.
        keys: [N] first 8 bytes of the blocks' keys.
    """

    number: int
    kinds: Kinds
    keys: Keys

    def to_wire(self) -> list[Any]:
        """As msgpack can carry it."""
        return [self.number, self.kinds.tobytes(), self.keys.astype("<u8").tobytes()]

    @classmethod
    def from_wire(cls, values: list[Any]) -> Batch:
        """Undo `to_wire`."""
        number, kinds, keys = values
        return cls(number, np.frombuffer(kinds, dtype=np.uint8), np.frombuffer(keys, dtype="<u8"))


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All that a group holds.

    Attributes:
        number: the next batch has one more.
        near: keys of blocks on its device.
        far: keys of blocks in its host memory or on its disks.
        capacity: most keys that it can ever hold.
    """

    number: int
    near: Keys = field(default_factory=_none)
    far: Keys = field(default_factory=_none)
    capacity: int = 0

    def to_wire(self) -> list[Any]:
        """As msgpack can carry it."""
        near, far = (one.astype("<u8").tobytes() for one in (self.near, self.far))
        return [self.number, near, far, self.capacity]

    @classmethod
    def from_wire(cls, values: list[Any]) -> Snapshot:
        """Undo `to_wire`."""
        number, near, far, capacity = values
        near, far = (np.frombuffer(one, dtype="<u8") for one in (near, far))
        return cls(number, near, far, capacity)


def runs(kinds: Kinds, keys: Keys) -> Iterator[tuple[Change, Keys]]:
    """Changes of one kind together, such that making them in this order comes to the same."""
    edges = _edges(kinds)
    if len(edges) > 2 + len(kinds) // 8:  # they alternate: keep the last of each key, by kind
        places = kinds >> 1  # 0 for the device, 1 for below
        order = np.lexsort((np.arange(len(keys)), places, keys))
        last = np.ones(len(keys), dtype=np.bool_)
        last[:-1] = np.diff(keys[order]).astype(np.bool_) | np.diff(places[order]).astype(np.bool_)
        chosen = order[last]
        chosen = chosen[np.argsort(kinds[chosen], kind="stable")]
        kinds, keys = kinds[chosen], keys[chosen]
        edges = _edges(kinds)
    for start, end in pairwise(edges):
        if start < end:
            yield Change(int(kinds[start])), keys[start:end]


def _edges(kinds: Kinds) -> list[int]:
    return [0, *(np.flatnonzero(np.diff(kinds)) + 1).tolist(), len(kinds)]
