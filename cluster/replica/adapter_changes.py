"""A gateway's changes of adapters, pauses and weights, passed on to the operator.

The operator checks the admin token. Knows the operator's methods; knows nothing of tokens and of
roles.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ray

from arriero.cluster.registry.registry import NAMESPACE
from arriero.shards.errors import (
    ArrieroError,
    CheckpointError,
    InvalidRequest,
    NotFound,
    PermissionDenied,
    Unauthenticated,
    Unavailable,
)

OPERATOR = "operator"
"""Name of the operator's actor."""
_ERRORS: dict[str, type[ArrieroError]] = {
    kind.__name__: kind
    for kind in (NotFound, PermissionDenied, Unauthenticated, CheckpointError, Unavailable)
}


async def change_adapter(
    authorization: str, action: str, name: str, path: str, replace: bool
) -> str:
    """Add or remove an adapter; see `router.http.lora_adapters.ChangeAdapter`.

    Raises:
        Unauthenticated, PermissionDenied: no admin token, or one of a role that is too low.
        InvalidRequest, NotFound: as in `AdapterAdmin`.
        Unavailable: the operator does not answer.
    """
    try:
        operator = ray.get_actor(OPERATOR, NAMESPACE)
        kind, text = await operator.change_adapter.remote(
            authorization, action, name, path, replace
        )
    except (ray.exceptions.RayError, ValueError):
        raise Unavailable("the operator does not answer; try again") from None
    if not kind:
        return str(text)
    if kind in _ERRORS:
        raise _ERRORS[kind](text)
    raise InvalidRequest("lora_name" if action == "remove" else "lora_path", text)


async def develop(
    authorization: str, action: str, fields: Mapping[str, str | int]
) -> dict[str, Any]:
    """Change or read pauses and weights; see `router.http.development.Develop`.

    Raises:
        Unauthenticated, PermissionDenied: no admin token, or one of a role that is too low.
        InvalidRequest, NotFound: as in `WeightAdmin`.
        Unavailable: the operator does not answer.
    """
    try:
        operator = ray.get_actor(OPERATOR, NAMESPACE)
        kind, answer = await operator.develop.remote(authorization, action, dict(fields))
    except (ray.exceptions.RayError, ValueError):
        raise Unavailable("the operator does not answer; try again") from None
    if not kind:
        return dict(answer)
    if kind in _ERRORS:
        raise _ERRORS[kind](answer)
    field = {"push": "path", "join": "init_info", "announce": "update_info"}.get(action, "model")
    raise InvalidRequest(field, answer)
