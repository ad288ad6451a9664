"""A few small values that outlive the actors which keep them: Ray's own key-value store.

Lives as long as the cluster's head (or its Redis, where Ray is given one). Knows bytes by name.
"""

from __future__ import annotations

import json
from typing import Any

from ray.experimental import internal_kv

_NAMESPACE = b"arriero"


def put(name: str, value: Any) -> None:  # noqa: ANN401
    """Keep a value that JSON can carry, in place of the one before."""
    packed = json.dumps(value).encode()
    internal_kv._internal_kv_put(name.encode(), packed, overwrite=True, namespace=_NAMESPACE)


def get(name: str) -> Any:  # noqa: ANN401
    """The value kept, or None."""
    found = internal_kv._internal_kv_get(name.encode(), namespace=_NAMESPACE)
    return None if found is None else json.loads(found)


def clear(name: str) -> None:
    """Forget a value; safe when there is none."""
    internal_kv._internal_kv_del(name.encode(), namespace=_NAMESPACE)
