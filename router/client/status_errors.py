"""The gateway's exceptions, from the gRPC statuses that carry them.

Knows statuses and trailing metadata; knows nothing of calls.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import grpc

from arriero.router.calls.error_statuses import CLASSES
from arriero.shards.errors import ContextTooLong, InvalidRequest, Overloaded


def from_status(error: Any) -> Exception:  # noqa: ANN401
    """The gateway's exception for a status; the given error for other statuses."""
    details, trailing = error.details() or "", dict(error.trailing_metadata() or ())
    kind = CLASSES.get(error.code())
    if kind is InvalidRequest:
        return _invalid(trailing, details)
    if kind is Overloaded and "retry-after" in trailing:
        return Overloaded(details, float(trailing["retry-after"]))
    if kind is None or kind is Overloaded:
        return error  # type: ignore[no-any-return]
    return kind(details)


def connection_lost(error: Any) -> bool:  # noqa: ANN401
    """Whether a call ended because the gateway or the connection failed."""
    return error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)


def no_answer(error: Any) -> bool:  # noqa: ANN401
    """Whether a call ended without a word of a gateway, which names each call it takes."""
    return error.code() is grpc.StatusCode.UNAVAILABLE and not error.initial_metadata()


def _invalid(trailing: Mapping[str, str], details: str) -> InvalidRequest:
    field, code = trailing.get("arriero-field", ""), trailing.get("arriero-code", "invalid_value")
    if code == ContextTooLong.CODE:
        return ContextTooLong(field, details)
    return InvalidRequest(field, details, code)
