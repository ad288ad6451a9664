"""Settings of a group's tiers below the device.

Knows numbers and paths; knows nothing of blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

RowType = Literal["int8", "fp8"]
"""How a number is held in a byte: see `rows`."""
SCALE_BYTES = 4
"""Of a row that is held so: its float32 scale, behind the numbers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TierConfig:
    """Tiers below the device; each is off at its default.

    Attributes:
        host_bytes: host memory of the whole group.
        disk_path: folder on each slice's node; what it holds outlives the group.
        disk_bytes: most bytes of it that the group uses, over all its slices.
        shared_url: folder of a store that all nodes reach, as fsspec spells it.
        max_tenant_share: the most of a tier that one tenant's blocks may hold, 0 to 1.
        dtype: "int8" and "fp8" hold blocks below the device in about half of bfloat16's bytes, with
            a scale for each head's key and value of a token (see `rows`): what comes up from there
            is close to what was computed, and no more the same. None holds them as the device does.
        transfer: how blocks come from another node's host memory: "tcp"; "nixl", where both ends
            have it installed, else TCP; "auto" for NIXL where there are also network cards that
            read memory (RDMA).
        same_layout: use only blocks that a group of the same layout and kernels' dtype wrote,
            for those who need every bit; else layouts share, and agree to rounding.
    """

    host_bytes: int = 0
    disk_path: str | None = None
    disk_bytes: int = 0
    shared_url: str | None = None
    max_tenant_share: float = 1.0
    dtype: RowType | None = None
    transfer: Literal["auto", "tcp", "nixl"] = "auto"
    same_layout: bool = False

    @property
    def enabled(self) -> bool:
        """Whether there is any tier below the device."""
        return bool(self.host_bytes or self.disk_path or self.shared_url)
