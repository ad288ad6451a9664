"""The adapters of a group: names and paths, and the room for adapters. Knows no contents."""

from __future__ import annotations

from dataclasses import dataclass

HOST_PER_SLOT = 4
"""Adapters in host memory for each slot of the device, by default."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterFile:
    """A LoRA adapter in PEFT's layout.

    Attributes:
        name: model id for clients.
        path: folder with adapter_config.json and adapter_model.safetensors, on every node.
    """

    name: str
    path: str


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterSlots:
    """Room for adapters that come and go while the group serves.

    Attributes:
        device: adapters on the device at once.
        max_rank: largest rank of an adapter.
        host: adapters in the host memory of each slice; more than `device`, since an adapter in use
            stays in host memory too.
        root: folder of all adapters; "" for no limit.
    """

    device: int
    max_rank: int = 64
    host: int
    root: str = ""
