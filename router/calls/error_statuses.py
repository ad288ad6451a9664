"""The statuses of arriero's errors, in gRPC and in HTTP: one table for servers and client.

Knows error classes and statuses; knows nothing of calls and of the texts of errors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import grpc

from arriero.shards.errors import (
    ArrieroError,
    InvalidRequest,
    NotFound,
    Overloaded,
    PermissionDenied,
    Unauthenticated,
    Unavailable,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ErrorStatus:
    """How an error shows to a client.

    Attributes:
        grpc: status code of gRPC.
        http: status code of HTTP.
        kind: `type` in the JSON of the OpenAI API.
        code: `code` in this JSON; "" where each error has a code of its own.
    """

    grpc: grpc.StatusCode
    http: int
    kind: str
    code: str


STATUSES: dict[type[ArrieroError], ErrorStatus] = {
    InvalidRequest: ErrorStatus(
        grpc=grpc.StatusCode.INVALID_ARGUMENT, http=400, kind="invalid_request_error", code=""
    ),
    NotFound: ErrorStatus(
        grpc=grpc.StatusCode.NOT_FOUND,
        http=404,
        kind="invalid_request_error",
        code="model_not_found",
    ),
    Unauthenticated: ErrorStatus(
        grpc=grpc.StatusCode.UNAUTHENTICATED,
        http=401,
        kind="authentication_error",
        code="invalid_api_key",
    ),
    PermissionDenied: ErrorStatus(
        grpc=grpc.StatusCode.PERMISSION_DENIED,
        http=403,
        kind="permission_error",
        code="permission_denied",
    ),
    Overloaded: ErrorStatus(
        grpc=grpc.StatusCode.RESOURCE_EXHAUSTED,
        http=429,
        kind="rate_limit_error",
        code="rate_limit_exceeded",
    ),
    Unavailable: ErrorStatus(
        grpc=grpc.StatusCode.UNAVAILABLE,
        http=503,
        kind="service_unavailable_error",
        code="unavailable",
    ),
}
"""By class; an error of no class here shows as `Unavailable`."""
CLASSES = {status.grpc: kind for kind, status in STATUSES.items()}
"""The error class of each gRPC status code."""
NUMBERS: Mapping[grpc.StatusCode, int] = {
    code: cast(tuple[int, str], code.value)[0] for code in grpc.StatusCode
}
"""The number of each gRPC status code."""


def status_of(error: ArrieroError) -> ErrorStatus:
    """The status of an error."""
    return next(
        (status for kind, status in STATUSES.items() if isinstance(error, kind)),
        STATUSES[Unavailable],
    )


def retry_after(error: Overloaded) -> str:
    """Whole seconds until another try, at least 1, for the header of that name."""
    return str(max(1, math.ceil(error.retry_after_s)))
