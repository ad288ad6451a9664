"""The messages of a group about its blocks: numbered batches of changes, and snapshots.

Knows the contents of a message; knows nothing of its bytes, or of how sender and receiver store
blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum

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

    Raises:
        ValueError: `kinds` and `keys` differ in length, or a kind is unknown.
    """

    number: int
    kinds: Kinds
    keys: Keys

    def __post_init__(self) -> None:
        kinds, keys = self.kinds, self.keys
        if len(kinds) != len(keys) or (kinds > max(CacheChange)).any():
            raise ValueError(f"{len(kinds)} changes of {len(keys)} blocks, or an unknown change")

    @property
    def near(self) -> Mask:
        """[N] whether the change concerns the device."""
        return self.kinds <= np.uint8(CacheChange.OFF_DEVICE)

    @property
    def present(self) -> Mask:
        """[N] whether the block is present after the change."""
        return np.isin(self.kinds, (CacheChange.ON_DEVICE, CacheChange.OFFLOADED))


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
