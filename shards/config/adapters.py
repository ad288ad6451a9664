"""The adapters of a group. Knows names and paths; knows nothing of their contents."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterFile:
    """A LoRA adapter in PEFT's layout.

    Attributes:
        name: model id for clients.
        path: folder with adapter_config.json and adapter_model.safetensors, on every node.
    """

    name: str
    path: str
