"""Errors as JSON, with the statuses of the OpenAI API.

Two shapes: OpenAI's, and for paths below `/v1/messages` Anthropic's. Knows the errors of the
product and the fields of JSON bodies; knows nothing of calls.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from arriero.router.calls.error_statuses import STATUSES, retry_after, status_of
from arriero.shards.errors import (
    ArrieroError,
    InvalidRequest,
    NotFound,
    Overloaded,
    Unauthenticated,
    Unavailable,
)

log = logging.getLogger(__name__)

UNAVAILABLE_RETRY_S = 1
_TYPES = frozenset(
    {"str", "int", "bool", "nullable", "NamedTool", "AllowedTools", "Tool", "HostedTool"}
)
"""Names of union members in pydantic's error paths; list types have brackets."""
_ROUTING = {404: "unknown_url", 405: "method_not_allowed"}
_OF_TYPE = re.compile(r".*_(type|parsing|from_float)|finite_number")
"""pydantic's error types for a value of a wrong type."""
_PART = re.compile(r"(messages\[\d+\])\.parts(\[\d+\])(\.image)?")

_NAMES = (
    (re.compile(r"\btemplate_variables\b"), "chat_template_kwargs"),
    (re.compile(r"(\btools\[\d+\])\.(name|parameters)\b"), r"\1.function.\2"),
    (re.compile(r"(\btool_calls\[\d+\])\.(name|arguments)\b"), r"\1.function.\2"),
)
"""Fields of the gRPC messages with other names in JSON."""


Json = dict[str, Any]
Naming = Callable[[str], str]
"""Replaces the names of fields in an error's text by those of the client's body."""
NAMING = "naming"
"""Key in `scope["state"]` of a request's `Naming`; `chat_names` without."""

_MESSAGES_PATH = "/v1/messages"
_MESSAGES_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
"""Types of Anthropic's errors by HTTP status; `api_error` for the others."""


def install(app: FastAPI) -> None:
    """Answer every error of `app` in this form."""

    @app.exception_handler(ArrieroError)
    async def arriero_error(request: Request, error: ArrieroError) -> Response:
        naming = request.scope.get("state", {}).get(NAMING, chat_names)
        return respond(error, request.scope, naming)

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> Response:
        return respond(first(error.errors()), request.scope, str)

    @app.exception_handler(HTTPException)
    async def routing(request: Request, error: HTTPException) -> Response:
        text = f"{request.method} {request.url.path}: {error.detail}"
        content = body(text, "invalid_request_error", code=_ROUTING.get(error.status_code))
        content = shaped(content, error.status_code, request.scope)
        return JSONResponse(content, error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def internal_error(request: Request, error: Exception) -> Response:
        return JSONResponse(shaped(internal(_request_id(request.scope)), 500, request.scope), 500)


def shaped(content: Json, status: int, scope: Mapping[str, Any]) -> Json:
    """An error in the shape of the API that a request speaks.

    Args:
        content: the error in OpenAI's shape.
        status: HTTP status.
        scope: ASGI scope of the request.
    """
    path = scope["path"].removeprefix(scope.get("root_path", ""))
    if not path.startswith(_MESSAGES_PATH):
        return content
    error = {
        "type": _MESSAGES_TYPES.get(status, "api_error"),
        "message": content["error"]["message"],
    }
    return {"type": "error", "error": error, "request_id": _request_id(scope)}


def _request_id(scope: Mapping[str, Any]) -> str:
    return str(scope.get("state", {}).get("request_id", ""))


def internal(request_id: str) -> Json:
    """The JSON of an internal error."""
    return body(
        f"internal error; look for request {request_id} in the gateway's log",
        "server_error",
        code="internal_error",
    )


def chat_names(text: str) -> str:
    """An error's text with the names of a chat body instead of the gRPC messages' names."""
    for pattern, replacement in _NAMES:
        text = pattern.sub(replacement, text)
    return _PART.sub(
        lambda part: f"{part[1]}.content{part[2]}{part[3] or ''}{'_url' if part[3] else ''}", text
    )


def respond(
    error: ArrieroError, scope: Mapping[str, Any], naming: Naming = chat_names
) -> JSONResponse:
    """The HTTP response for `error`.

    Args:
        error: the error.
        scope: ASGI scope of the request; its path names the API.
        naming: gives the fields the names of the request's body.
    """
    status, headers = status_of(error).http, {}
    if isinstance(error, Overloaded):
        headers = {"retry-after": retry_after(error)}
    elif isinstance(error, Unauthenticated):
        headers = {"www-authenticate": "Bearer"}
    elif status == STATUSES[Unavailable].http:
        headers = {"retry-after": str(UNAVAILABLE_RETRY_S)}
    return JSONResponse(shaped(describe(error, naming), status, scope), status, headers)


def describe(error: ArrieroError, naming: Naming = chat_names) -> Json:
    """The JSON of `error` in OpenAI's shape."""
    text, status = str(error), status_of(error)
    if isinstance(error, InvalidRequest):
        text, field = naming(text), naming(error.field)
        return body(text, status.kind, param=field or None, code=error.code)
    if isinstance(error, NotFound):
        return body(text, status.kind, param=error.field, code=error.code)
    return body(text, status.kind, code=status.code)


def body(message: str, kind: str, *, param: str | None = None, code: str | None = None) -> Json:
    """The JSON of an error in the OpenAI API."""
    # JSON can hold half of a surrogate pair, which UTF-8 cannot encode.
    message = message.encode("utf-8", "replace").decode()
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def first(errors: Sequence[Mapping[str, Any]]) -> InvalidRequest:
    """The error for the first field that broke the schema."""
    error = _deepest(errors)
    kind, context = error["type"], error.get("ctx", {})
    if kind == "json_invalid":
        reason = context.get("error", error["msg"])
        return InvalidRequest("", f"the body is not JSON: {reason}", "invalid_json")
    value = error.get("input")
    if isinstance(value, bytes):
        return InvalidRequest(
            "",
            "the body is not JSON or has another type; send content-type: application/json",
            "invalid_json",
        )
    field = _name([*_path(error), *([context["param"]] if context.get("param") else [])])
    if kind == "field":  # from our own validators of several fields
        inside = field.removesuffix(context["param"])
        words = str(context["words"])
        # the text names the field within its object; the client needs the path from the body
        words = words.replace(f"`{context['param']}`", f"`{field}`", 1) if inside else words
        return InvalidRequest(field, words, context["code"])
    if kind == "extra_forbidden":
        return InvalidRequest(
            field, f"`{field}` is not supported; leave it out", "unsupported_parameter"
        )
    if kind == "missing":
        message = f"`{field}` is needed" if field else "the body is needed: a JSON object"
        return InvalidRequest(field, message, "missing_required_parameter")
    shown = f"={json.dumps(value)[:64]}" if isinstance(value, str | int | float | bool) else ""
    reason = error["msg"].removeprefix("Value error, ")
    code = "invalid_type" if _OF_TYPE.fullmatch(kind) else "invalid_value"
    return InvalidRequest(field, f"`{field or 'body'}`{shown}: {reason}", code)


def _name(path: Sequence[str | int]) -> str:
    """The path of a field in error texts, such as `messages[0].content`."""
    field = ""
    for part in path:
        if isinstance(part, int):
            field += f"[{part}]"
        else:
            field += f".{part}" if field else part
    return field[:256].encode("utf-8", "replace").decode()


def _deepest(errors: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The first error; for a field of several types, the error of the type that fits best."""
    first = _path(errors[0])
    same = [error for error in errors if _path(error)[: len(first)] == first]
    return max(same, key=lambda error: len(_path(error)))


def _path(error: Mapping[str, Any]) -> list[str | int]:
    """Fields and positions of an error, without the names of union members."""
    return [
        part
        for part in error["loc"][1:]
        if isinstance(part, int) or (part not in _TYPES and "[" not in part and "(" not in part)
    ]
