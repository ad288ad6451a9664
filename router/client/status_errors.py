"""The gateway's exceptions, from the gRPC statuses that carry them.

Knows statuses and trailing metadata; knows nothing of calls.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import grpc

from arriero.shards.errors import (
    ArrieroError,
    ContextTooLong,
    InvalidRequest,
    NotFound,
    Overloaded,
    PermissionDenied,
    Unauthenticated,
    Unavailable,
)


def from_status(error: Any) -> Exception:  # noqa: ANN401
    """The gateway's exception for a status; the given error for other statuses."""
    code, details = error.code(), error.details() or ""
    trailing = dict(error.trailing_metadata() or ())
    translated: ArrieroError
    if code is grpc.StatusCode.INVALID_ARGUMENT:
        translated = _invalid(trailing, details)
    elif code is grpc.StatusCode.NOT_FOUND:
        translated = NotFound(details)
    elif code is grpc.StatusCode.RESOURCE_EXHAUSTED and "retry-after" in trailing:
        translated = Overloaded(details, float(trailing["retry-after"]))
    elif code is grpc.StatusCode.UNAUTHENTICATED:
        translated = Unauthenticated(details)
    elif code is grpc.StatusCode.PERMISSION_DENIED:
        translated = PermissionDenied(details)
    elif code is grpc.StatusCode.UNAVAILABLE:
        translated = Unavailable(details)
    else:
        return error  # type: ignore[no-any-return]
    return translated


def connection_lost(error: Any) -> bool:  # noqa: ANN401
    """Whether a call ended because the gateway or the connection failed."""
    return error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)


def _invalid(trailing: Mapping[str, str], details: str) -> InvalidRequest:
    field, code = trailing.get("arriero-field", ""), trailing.get("arriero-code", "invalid_value")
    if code == ContextTooLong.CODE:
        return ContextTooLong(field, details)
    return InvalidRequest(field, details, code)
