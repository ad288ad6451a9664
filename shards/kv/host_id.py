"""The name of this machine, as it is now up."""

from __future__ import annotations

import platform


def host_name() -> str:
    """This node's name and the id of its boot: equal only where memory can be shared."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as stream:
        return f"{platform.node()}/{stream.read().strip()}"
