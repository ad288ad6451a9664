"""Small values that outlive actors, in Ray's own key-value store.

The store lives as long as the head of the cluster, or as the head's Redis where Ray has one. Knows
bytes by name.
"""

from __future__ import annotations

import json
from typing import TypeVar

from arriero.cluster.hosts import ray_private
from arriero.shards.protocol import wire

_NAMESPACE = b"arriero"
T = TypeVar("T")


def put(name: str, value: object) -> None:
    """Store a value as JSON, in place of the value before."""
    packed = json.dumps(wire.to_builtins(value)).encode()
    ray_private.store_value(_NAMESPACE, name.encode(), packed)


def get(name: str, kind: type[T]) -> T | None:
    """The stored value, or None.

    Args:
        name: name of the value.
        kind: type of the value.

    Raises:
        WireError: the stored value is of another type.
    """
    packed = ray_private.stored_value(_NAMESPACE, name.encode())
    return None if packed is None else wire.from_builtins(json.loads(packed), kind)


def clear(name: str) -> None:
    """Remove a value; does nothing when there is none."""
    ray_private.remove_value(_NAMESPACE, name.encode())
