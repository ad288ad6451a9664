"""Name of this machine since its last boot."""

from __future__ import annotations

import platform


def host_name() -> str:
    """Name of this node and id of its boot: equal only where processes can share memory."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as stream:
        return f"{platform.node()}/{stream.read().strip()}"
