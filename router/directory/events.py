"""What a group says of its blocks: changes in numbered batches, or everything it has.

Knows the wire; knows nothing of how either end keeps it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from arriero.router.directory.table import Keys, Mask

Kinds = npt.NDArray[np.uint8]
"""Of `CacheChange`."""


class CacheChange(IntEnum):
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
        kinds: [N] uint8, of `CacheChange`.
        keys: [N] first 8 bytes of the blocks' keys.
    """

    number: int
    kinds: Kinds
    keys: Keys

    @property
    def near(self) -> Mask:
        """[N] which changes are about the device."""
        return self.kinds <= np.uint8(CacheChange.OFF_DEVICE)

    @property
    def present(self) -> Mask:
        """[N] after which changes the group has the block there."""
        return np.isin(self.kinds, (CacheChange.ON_DEVICE, CacheChange.KEPT))

    def to_wire(self) -> list[Any]:
        """As msgpack can carry it."""
        return [self.number, self.kinds.tobytes(), self.keys.astype("<u8").tobytes()]

    @classmethod
    def from_wire(cls, values: list[Any]) -> Batch:
        """Undo `to_wire`.

        Raises:
            ValueError: it is not one.
        """
        number, packed, listed = values
        kinds = np.frombuffer(packed, dtype=np.uint8)
        keys = np.frombuffer(listed, dtype="<u8")
        if len(kinds) != len(keys) or (kinds > max(CacheChange)).any():
            raise ValueError(f"{len(kinds)} changes of {len(keys)} blocks, or an unknown one")
        return cls(number, kinds, keys)


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
