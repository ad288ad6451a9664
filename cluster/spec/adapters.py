"""The LoRA adapters of a model in the spec: the list, and the room for others."""

from __future__ import annotations

from pathlib import Path

from arriero.cluster.spec.fields import Name, SpecSection
from arriero.shards.config.adapters import HOST_PER_SLOT, AdapterSlots


class AdapterSpec(SpecSection):
    """A LoRA adapter of a model, in PEFT's layout.

    Attributes:
        name: model id for clients.
        path: folder with adapter_config.json and adapter_model.safetensors, on every node.
    """

    name: Name
    path: Path


def check_room(slots: int | None, host: int | None, root: Path | None) -> None:
    """Refuse room for adapters that cannot be.

    Args:
        slots: `adapter_slots` of a model.
        host: `host_adapters`.
        root: `adapter_root`.

    Raises:
        ValueError: names the field and the remedy.
    """
    if slots is None and (host is not None or root is not None):
        name = "adapter_root" if host is None else "host_adapters"
        raise ValueError(f"`{name}` means nothing without `adapter_slots`; set it too")
    if slots is not None and host is not None and host <= slots:
        raise ValueError(
            f"`host_adapters`={host} must be more than `adapter_slots`={slots}: an adapter on the "
            f"device stays in host memory too; give {slots + 1} or more"
        )


def slots_of(
    slots: int | None, max_rank: int, host: int | None, root: Path | None
) -> AdapterSlots | None:
    """The settings of a group; None for the listed adapters alone. See `check_room`."""
    if slots is None:
        return None
    return AdapterSlots(
        device=slots,
        max_rank=max_rank,
        host=host or HOST_PER_SLOT * slots,
        root="" if root is None else str(root),
    )
