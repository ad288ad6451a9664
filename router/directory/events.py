"""The messages of a group about its blocks: numbered batches of changes, and snapshots.

Knows the message format; knows nothing of how sender and receiver store blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from arriero.router.directory.table import Keys, Mask

Kinds = npt.NDArray[np.uint8]
"""Values of `CacheChange`."""


class CacheChange(IntEnum):
    """Change of a block in a group."""

    ON_DEVICE = 0
    OFF_DEVICE = 1
    OFFLOADED = 2
    """Now in host memory or on disk."""
    DROPPED = 3
    """No longer in host memory or on disk."""


def _none() -> Keys:
    return np.zeros(0, dtype=np.uint64)


@dataclass(frozen=True, slots=True)
class Batch:
    """Changes in order of time.

    Attributes:
        number: of the batch; the first batch after a snapshot has the snapshot's number plus 1.
        kinds: [N] uint8, values of `CacheChange`.
        keys: [N] first 8 bytes of the blocks' keys.
    """

    number: int
    kinds: Kinds
    keys: Keys

    @property
    def near(self) -> Mask:
        """[N] whether the change concerns the device."""
        return self.kinds <= np.uint8(CacheChange.OFF_DEVICE)

    @property
    def present(self) -> Mask:
        """[N] whether the block is present after the change."""
        return np.isin(self.kinds, (CacheChange.ON_DEVICE, CacheChange.OFFLOADED))

    def to_wire(self) -> list[Any]:
        """Values for msgpack."""
        return [self.number, self.kinds.tobytes(), self.keys.astype("<u8").tobytes()]

    @classmethod
    def from_wire(cls, values: list[Any]) -> Batch:
        """Undo `to_wire`.

        Raises:
            ValueError: `values` is no batch.
        """
        number, kind_bytes, key_bytes = values
        kinds = np.frombuffer(kind_bytes, dtype=np.uint8)
        keys = np.frombuffer(key_bytes, dtype="<u8")
        if len(kinds) != len(keys) or (kinds > max(CacheChange)).any():
            raise ValueError(f"{len(kinds)} changes of {len(keys)} blocks, or an unknown change")
        return cls(number, kinds, keys)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All blocks of a group.

    Attributes:
        number: number of the last batch; the next batch has this number plus 1.
        near: keys of blocks on the device.
        far: keys of blocks in host memory or on disk.
        capacity: largest possible number of keys.
    """

    number: int
    near: Keys = field(default_factory=_none)
    far: Keys = field(default_factory=_none)
    capacity: int = 0

    def to_wire(self) -> list[Any]:
        """Values for msgpack."""
        near, far = (keys.astype("<u8").tobytes() for keys in (self.near, self.far))
        return [self.number, near, far, self.capacity]

    @classmethod
    def from_wire(cls, values: list[Any]) -> Snapshot:
        """Undo `to_wire`."""
        number, near, far, capacity = values
        near, far = (np.frombuffer(keys, dtype="<u8") for keys in (near, far))
        return cls(number, near, far, capacity)
