"""Errors in the shape and with the statuses that clients of the OpenAI API know."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from arriero.shards.errors import (
    ArrieroError,
    InvalidRequest,
    NotFound,
    Overloaded,
    PermissionDenied,
    Unauthenticated,
)

log = logging.getLogger(__name__)

UNAVAILABLE_RETRY_S = 1
_TYPES = frozenset({"str", "int", "bool", "nullable", "NamedTool", "AllowedTools"})
"""Types among which a field has one, as pydantic puts them into a path; lists have brackets."""
_ROUTING = {404: "unknown_url", 405: "method_not_allowed"}
_OF_TYPE = re.compile(r".*_(type|parsing|from_float)|finite_number")
"""pydantic's kinds of errors that say a value is of another type."""
_PART = re.compile(r"(messages\[\d+\])\.parts(\[\d+\])(\.image)?")

_NAMES = (
    (re.compile(r"\btemplate_variables\b"), "chat_template_kwargs"),
    (re.compile(r"(\btools\[\d+\])\.(name|parameters)\b"), r"\1.function.\2"),
    (re.compile(r"(\btool_calls\[\d+\])\.(name|arguments)\b"), r"\1.function.\2"),
)
"""Fields of the wire that have other names in JSON."""


def install(app: FastAPI) -> None:
    """Have every error of `app` answered in this shape."""

    @app.exception_handler(ArrieroError)
    async def ours(request: Request, error: ArrieroError) -> Response:
        return respond(error)

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> Response:
        return respond(_first(error.errors()))

    @app.exception_handler(HTTPException)
    async def routing(request: Request, error: HTTPException) -> Response:
        words = f"{request.method} {request.url.path}: {error.detail}"
        content = body(words, "invalid_request_error", code=_ROUTING.get(error.status_code))
        return JSONResponse(content, error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def fault(request: Request, error: Exception) -> Response:
        return JSONResponse(internal(_request_id(request)), 500)


def _request_id(request: Request) -> str:
    return str(request.scope.get("state", {}).get("request_id", ""))


def internal(request_id: str) -> dict[str, Any]:
    """What a client is told of a fault of ours."""
    return body(
        f"internal error; the gateway's log has it under request {request_id}",
        "server_error",
        code="internal_error",
    )


def respond(error: ArrieroError) -> JSONResponse:
    """The answer that `error` is."""
    status, headers = 503, {"retry-after": str(UNAVAILABLE_RETRY_S)}
    if isinstance(error, InvalidRequest):
        status, headers = 400, {}
    elif isinstance(error, NotFound):
        status, headers = 404, {}
    elif isinstance(error, Unauthenticated):
        status, headers = 401, {"www-authenticate": "Bearer"}
    elif isinstance(error, PermissionDenied):
        status, headers = 403, {}
    elif isinstance(error, Overloaded):
        status, headers = 429, {"retry-after": str(max(1, math.ceil(error.retry_after_s)))}
    return JSONResponse(describe(error), status, headers)


def describe(error: ArrieroError) -> dict[str, Any]:
    """The JSON that `error` is."""
    text = str(error)
    if isinstance(error, InvalidRequest):
        text, field = _as_sent(text), _as_sent(error.field)
        return body(text, "invalid_request_error", param=field or None, code=error.code)
    if isinstance(error, NotFound):
        return body(text, "invalid_request_error", param="model", code="model_not_found")
    if isinstance(error, Unauthenticated):
        return body(text, "authentication_error", code="invalid_api_key")
    if isinstance(error, PermissionDenied):
        return body(text, "permission_error", code="permission_denied")
    if isinstance(error, Overloaded):
        return body(text, "rate_limit_error", code="rate_limit_exceeded")
    return body(text, "service_unavailable_error", code="unavailable")


def _as_sent(text: str) -> str:
    """`text` with fields called as JSON calls them."""
    for pattern, words in _NAMES:
        text = pattern.sub(words, text)
    return _PART.sub(
        lambda part: f"{part[1]}.content{part[2]}{part[3] or ''}{'_url' if part[3] else ''}", text
    )


def body(
    message: str, kind: str, *, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """The API's own shape of an error."""
    # Half of a surrogate pair, which JSON can spell, would not be UTF-8.
    message = message.encode("utf-8", "replace").decode()
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _first(errors: Sequence[Mapping[str, Any]]) -> InvalidRequest:
    """What a client is told of the fields that broke the schema: the first, by name."""
    error = _deepest(errors)
    kind, context = error["type"], error.get("ctx", {})
    if kind == "json_invalid":
        reason = context.get("error", error["msg"])
        return InvalidRequest("", f"the body is not JSON: {reason}", "invalid_json")
    given = error.get("input")
    if isinstance(given, bytes):
        return InvalidRequest(
            "",
            "the body is not JSON, or not said to be; send content-type: application/json",
            "invalid_json",
        )
    field = _name([*_path(error), *([context["param"]] if context.get("param") else [])])
    if kind == "field":  # of our own validators, which look at several fields
        inside = field.removesuffix(context["param"])
        words = str(context["words"])
        # the words name the field as its object does; the client sees it from the body
        words = words.replace(f"`{context['param']}`", f"`{field}`", 1) if inside else words
        return InvalidRequest(field, words, context["code"])
    if kind == "extra_forbidden":
        return InvalidRequest(
            field, f"`{field}` is not supported; leave it out", "unsupported_parameter"
        )
    if kind == "missing":
        what = f"`{field}` is needed" if field else "the body is needed: a JSON object"
        return InvalidRequest(field, what, "missing_required_parameter")
    shown = f"={json.dumps(given)[:64]}" if isinstance(given, str | int | float | bool) else ""
    reason = error["msg"].removeprefix("Value error, ")
    code = "invalid_type" if _OF_TYPE.fullmatch(kind) else "invalid_value"
    return InvalidRequest(field, f"`{field or 'body'}`{shown}: {reason}", code)


def _name(path: Sequence[str | int]) -> str:
    """A field as the messages call it: `messages[0].content`."""
    field = ""
    for part in path:
        if isinstance(part, int):
            field += f"[{part}]"
        else:
            field += f".{part}" if field else part
    return field[:256].encode("utf-8", "replace").decode()


def _deepest(errors: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The first error; of a field that may have several types, the one that came closest to fit."""
    first = _path(errors[0])
    same = [error for error in errors if _path(error)[: len(first)] == first]
    return max(same, key=lambda error: len(_path(error)))


def _path(error: Mapping[str, Any]) -> list[str | int]:
    """Fields and positions; without the types that a field may have."""
    return [
        part
        for part in error["loc"][1:]
        if isinstance(part, int) or (part not in _TYPES and "[" not in part and "(" not in part)
    ]
