"""Settings of a group's tiers below the device.

Knows numbers and paths; knows nothing of blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

RowType = Literal["int8", "fp8"]
"""Type of a number packed into a byte: see `packed_rows`."""
SCALE_BYTES = 4
"""Bytes of the float32 scale behind the numbers of a packed row."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TierConfig:
    """Tiers below the device; each is off at its default.

    Attributes:
        host_bytes: bytes of host memory, over the whole group.
        disk_path: folder on each slice's node; its blocks outlive the group.
        disk_bytes: most bytes of disk, over all slices of the group.
        shared_url: folder of a store reachable from all nodes, as an fsspec URL.
        max_tenant_share: largest share of a tier for one tenant's blocks, 0 to 1.
        dtype: "int8" and "fp8" store blocks below the device in about half of bfloat16's bytes,
            with a scale for each head's key and value of a token (see `packed_rows`): loaded blocks
            are close to the computed blocks, not equal. None stores blocks as on the device.
        transfer: way of blocks from another node's host memory: "tcp"; "nixl", where both ends
            have NIXL installed, else TCP; "auto" for NIXL only where network cards can read memory
            (RDMA).
        same_layout: use only blocks from groups of the same layout and kernels' dtype, for bitwise
            equal answers; otherwise all layouts share blocks, and agree to rounding.
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
