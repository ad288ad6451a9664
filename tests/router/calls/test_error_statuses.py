"""Each error has one status in gRPC and in HTTP, and the client gets the same error back."""

from __future__ import annotations

import json
from dataclasses import dataclass

import grpc
import pytest

from arriero.router import grpc_calls
from arriero.router.client.status_errors import from_status
from arriero.router.http.errors import respond
from arriero.shards.errors import (
    ArrieroError,
    CollectiveFailed,
    ContextTooLong,
    InvalidRequest,
    NotFound,
    Overloaded,
    PermissionDenied,
    Unauthenticated,
    Unavailable,
)


@dataclass
class Reply:
    """The end of a call, as gRPC gives it to a client."""

    status: tuple[grpc.StatusCode, str, tuple[tuple[str, str], ...]]

    def code(self) -> grpc.StatusCode:
        return self.status[0]

    def details(self) -> str:
        return self.status[1]

    def trailing_metadata(self) -> tuple[tuple[str, str], ...]:
        return self.status[2]


@pytest.mark.parametrize(
    ("error", "code", "http", "kind"),
    [
        (InvalidRequest("n", "bad"), "INVALID_ARGUMENT", 400, "invalid_request_error"),
        (ContextTooLong("n", "long"), "INVALID_ARGUMENT", 400, "invalid_request_error"),
        (NotFound("no m"), "NOT_FOUND", 404, "invalid_request_error"),
        (Unauthenticated("key"), "UNAUTHENTICATED", 401, "authentication_error"),
        (PermissionDenied("no"), "PERMISSION_DENIED", 403, "permission_error"),
        (Overloaded("full", 1.2), "RESOURCE_EXHAUSTED", 429, "rate_limit_error"),
        (Unavailable("none"), "UNAVAILABLE", 503, "service_unavailable_error"),
        (CollectiveFailed("lost", "send", 1), "UNAVAILABLE", 503, "service_unavailable_error"),
    ],
)
def test_statuses(error: ArrieroError, code: str, http: int, kind: str) -> None:
    status = grpc_calls._status(error)
    assert status[0].name == code
    response = respond(error, {"path": "/v1/chat/completions"})
    assert (response.status_code, json.loads(response.body)["error"]["type"]) == (http, kind)
    back = from_status(Reply(status))
    assert str(back) == str(error)
    assert type(back) is (Unavailable if code == "UNAVAILABLE" else type(error))
    if isinstance(error, Overloaded):
        assert response.headers["retry-after"] == "2"
        assert isinstance(back, Overloaded) and back.retry_after_s == 2
