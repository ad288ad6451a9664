"""What a group says of its blocks: changes in numbered batches, or everything it has.

Knows the wire; knows nothing of how either end keeps it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
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
    """

    number: int
    near: Keys = field(default_factory=_none)
    far: Keys = field(default_factory=_none)

    def to_wire(self) -> list[Any]:
        """As msgpack can carry it."""
        return [self.number, self.near.astype("<u8").tobytes(), self.far.astype("<u8").tobytes()]

    @classmethod
    def from_wire(cls, values: list[Any]) -> Snapshot:
        """Undo `to_wire`."""
        number, near, far = values
        return cls(number, np.frombuffer(near, dtype="<u8"), np.frombuffer(far, dtype="<u8"))
