"""Small values that outlive actors, in Ray's own key-value store.

The store lives as long as the head of the cluster, or as the head's Redis where Ray has one. Knows
bytes by name.
"""

from __future__ import annotations

import json
from typing import Any

from arriero.cluster.hosts import ray_private

_NAMESPACE = b"arriero"


def put(name: str, value: Any) -> None:  # noqa: ANN401
    """Store a value that JSON can carry, in place of the value before."""
    packed = json.dumps(value).encode()
    ray_private.store_value(_NAMESPACE, name.encode(), packed)


def get(name: str) -> Any:  # noqa: ANN401
    """The stored value, or None."""
    packed = ray_private.stored_value(_NAMESPACE, name.encode())
    return None if packed is None else json.loads(packed)


def clear(name: str) -> None:
    """Remove a value; does nothing when there is none."""
    ray_private.remove_value(_NAMESPACE, name.encode())
