"""Middleware for every HTTP request: request id, caller, path, body and internal errors.

Knows ASGI; knows nothing of the meaning of requests.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import re
import time
from collections.abc import Mapping
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from arriero.router.http import development, errors, lora_adapters, request_body
from arriero.router.http.console import routes as console
from arriero.router.http.request_body import TooLarge, Unreadable, as_json, gather, rewritten
from arriero.router.http.stream import OUTERMOST, ClientGone
from arriero.router.observability.log_lines import set_request_id
from arriero.router.requests import read_request_id
from arriero.router.tenants.admission_controller import AdmissionController, Caller, is_set
from arriero.shards.errors import ArrieroError, InvalidRequest, Unauthenticated, Unavailable

log = logging.getLogger(__name__)

_WITH_ADMIN_TOKEN = lora_adapters.PATHS | development.PATHS
_WITHOUT_KEY = frozenset({"/health", "/openapi.json"})
"""Paths that need no key; `/health` tells callers without a key only whether all is well."""
_WITH_ADMIN_TOKEN = lora_adapters.PATHS | development.PATHS | {console.CLUSTER}
"""Paths for the holders of admin tokens."""
_SLASHES = re.compile("/{2,}")


class RequestMiddleware:
    """Sets a request's id and caller, reads the body, and answers errors.

    Trailing and double slashes in a path are ignored, a body may be compressed, HEAD is GET without
    the answer's body, and OPTIONS lists the methods.

    Args:
        app: the application.
        max_body_bytes: most bytes of a body.
        admission: finds the tenant of a caller.
        max_upload_bytes: most bytes of a form with a file, which the application reads as it
            comes; 0 where no path takes files.
        open_paths: further paths that need no key.
    """

    def __init__(
        self,
        app: ASGIApp,
        max_body_bytes: int,
        admission: AdmissionController,
        max_upload_bytes: int = 0,
        open_paths: frozenset[str] = frozenset(),
    ) -> None:
        self._app = app
        self._max, self._max_upload = max_body_bytes, max_upload_bytes
        self._admission = admission
        self._without_key = _WITHOUT_KEY | open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        is_head = scope["method"] == "HEAD"
        path = _SLASHES.sub("/", scope["path"]).rstrip("/") or "/"
        scope = {**scope, "path": path, "method": "GET" if is_head else scope["method"]}
        value = headers.get(b"x-request-id", b"").decode("latin-1")
        try:
            request_id = read_request_id(value)
        except InvalidRequest:  # often set by a proxy, and only for logs: no reason to refuse
            request_id = read_request_id("")
        set_request_id(request_id)
        scope.setdefault("state", {}).update({"request_id": request_id, OUTERMOST: send})
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message["headers"] = [
                    *message.get("headers", ()),
                    (b"x-request-id", request_id.encode()),
                    (b"request-id", request_id.encode()),  # where Anthropic's client looks
                ]
            elif is_head:
                message = {**message, "body": b""}
            await send(message)

        length = headers.get(b"content-length", b"")
        is_upload = bool(self._max_upload) and request_body.is_form(headers)
        most = self._max_upload + request_body.MAX_FORM_BYTES if is_upload else self._max
        try:
            if scope["method"] == "OPTIONS":
                await _answer(send_with_id, 204, None, (b"allow", b"GET, HEAD, POST, OPTIONS"))
                return
            scope["state"]["caller"] = self._caller(scope, headers, request_id)
            if length.isdigit() and int(length) > most:
                raise TooLarge
            if scope["method"] == "POST":
                receive = await self._read(scope, receive, headers, is_upload)
            await self._app(scope, receive, send_with_id)
        except ClientGone:
            log.debug("request %s: the client went away", request_id)
        except ArrieroError as error:  # from `_caller`; the app answers errors of its handlers
            await errors.respond(error, scope)(scope, receive, send_with_id)
        except Unreadable as error:
            if is_upload:  # the only refusal before the body is read
                await _discard(receive, 2 * self._max)
            content = errors.body(str(error), "invalid_request_error", param=error.field or None)
            await _refuse(send_with_id, error.status, content, scope)
        except TooLarge as error:
            if not error.whole:
                await _discard(receive, 2 * self._max)
            text = f"the body has more than {most} bytes, the limit; send less"
            content = errors.body(text, "invalid_request_error", code="request_too_large")
            await _refuse(send_with_id, 413, content, scope)
        except asyncio.CancelledError:  # the gateway stops, and the time of its requests is over
            if started:
                raise
            stopping = Unavailable("the gateway is stopping; send the request to another gateway")
            await errors.respond(stopping, scope)(scope, receive, send_with_id)
        except Exception:
            log.exception("request %s failed", request_id)
            if started:
                raise
            await _refuse(send_with_id, 500, errors.internal(request_id), scope)

    async def _read(
        self, scope: Scope, receive: Receive, headers: Mapping[bytes, bytes], is_upload: bool
    ) -> Receive:
        """Read the body and set the headers in `scope`; returns a `receive` for the application.

        A form with a file is checked, and left to the application to read.

        Raises:
            TooLarge, Unreadable: as in `request_body`.
            ClientGone: the client disconnected before the end of the body.
        """
        if is_upload:
            request_body.check_form(scope["path"], headers)
            return request_body.bounded(receive, self._max_upload + request_body.MAX_FORM_BYTES)
        sent = await gather(receive, self._max)
        if sent is None:
            raise ClientGone
        body: bytes | None = await as_json(sent, headers, self._max)
        scope["headers"] = rewritten(scope["headers"], len(body or b""))

        async def give() -> Message:
            nonlocal body
            if body is None:
                return await receive()
            message = {"type": "http.request", "body": body, "more_body": False}
            body = None
            return message

        return give

    def _caller(self, scope: Scope, headers: dict[bytes, bytes], request_id: str) -> Caller | None:
        """The sender of a request; None for a path without callers.

        Raises:
            Unauthenticated, PermissionDenied: as in `AdmissionController`.
            InvalidRequest: the header `x-request-timeout` is no valid time.
        """
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if path in self._without_key:
            return None
        given = authorization(scope)
        if path in _WITH_ADMIN_TOKEN:  # the operator checks the token
            if not given:
                raise Unauthenticated("this path needs an admin token: `Bearer TOKEN`")
            return None
        if path == "/metrics":
            self._admission.check_metrics(given)
            return None
        return Caller(
            request_id=request_id,
            tenant=self._admission.tenant(given),
            deadline_s=_deadline_s(headers.get(b"x-request-timeout")),
            traceparent=headers.get(b"traceparent", b"").decode("latin-1"),
            strict_schema=is_set(headers.get(b"x-strict-schema", b"").decode("latin-1")),
            cache_key=headers.get(b"x-prompt-cache-key", b"").decode("latin-1"),
            background=is_set(headers.get(b"x-background", b"").decode("latin-1")),
        )


def authorization(scope: Scope) -> str:
    """The header `authorization` of a request, or the key of Anthropic's header; "" for none."""
    headers: dict[bytes, bytes] = dict(scope["headers"])
    given = headers.get(b"authorization", b"").decode("latin-1")
    if not given and (key := headers.get(b"x-api-key", b"")):
        return f"Bearer {key.decode('latin-1')}"
    return given


def _deadline_s(value: bytes | None) -> float | None:
    if value is None:
        return None
    try:
        timeout_s = float(value)
    except ValueError:
        timeout_s = math.nan
    if not 0 < timeout_s < math.inf:
        shown = value.decode("latin-1")[:64]
        raise InvalidRequest(
            "x-request-timeout", f"the header `x-request-timeout`={shown!r} must be seconds above 0"
        )
    return time.monotonic() + timeout_s


async def _refuse(send: Send, status: int, content: dict[str, Any], scope: Scope) -> None:
    await _answer(send, status, errors.shaped(content, status, scope))


async def _discard(receive: Receive, most: int) -> None:
    """Read up to `most` bytes; a client may read the answer only after sending the body."""
    while most > 0:
        message = await receive()
        most -= len(message.get("body", b""))
        if not message.get("more_body", False):
            return


async def _answer(
    send: Send, status: int, content: dict[str, object] | None, *headers: tuple[bytes, bytes]
) -> None:
    """Answer without the application and close the connection, as the body may be unread."""
    body = b"" if content is None else json.dumps(content).encode()
    if content is not None:
        length = (b"content-length", str(len(body)).encode())
        kind = (b"content-type", b"application/json")
        headers = (*headers, kind, length, (b"connection", b"close"))
    await send({"type": "http.response.start", "status": status, "headers": list(headers)})
    await send({"type": "http.response.body", "body": body})
