"""Small values that outlive actors, in Ray's own key-value store.

The store lives as long as the head of the cluster, or as the head's Redis where Ray has one. Knows
bytes by name.
"""

from __future__ import annotations

import json
from typing import Any

from ray.experimental import internal_kv

_NAMESPACE = b"arriero"


def put(name: str, value: Any) -> None:  # noqa: ANN401
    """Store a value that JSON can carry, in place of the value before."""
    packed = json.dumps(value).encode()
    internal_kv._internal_kv_put(name.encode(), packed, overwrite=True, namespace=_NAMESPACE)


def get(name: str) -> Any:  # noqa: ANN401
    """The stored value, or None."""
    packed = internal_kv._internal_kv_get(name.encode(), namespace=_NAMESPACE)
    return None if packed is None else json.loads(packed)


def clear(name: str) -> None:
    """Remove a value; does nothing when there is none."""
    internal_kv._internal_kv_del(name.encode(), namespace=_NAMESPACE)
