"""The GPU of each rank of a group on one machine. Knows the environment alone."""

from __future__ import annotations

import os

from arriero.shards.errors import GroupFailed


def device_of(rank: int) -> str:
    """The GPU of a rank on this machine, among the GPUs visible to this process.

    Raises:
        GroupFailed: this process sees too few GPUs.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return str(rank)
    devices = [name.strip() for name in visible.split(",") if name.strip()]
    if rank >= len(devices):
        raise GroupFailed(
            f"slice {rank} has no GPU: CUDA_VISIBLE_DEVICES={visible!r} names {len(devices)}; "
            "name one for each slice, or use fewer slices"
        )
    return devices[rank]
