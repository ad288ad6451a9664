"""Requests of batches, run in this process by the same handlers as requests over HTTP.

Knows ASGI; knows nothing of sockets, keys or batches' states.
"""

from __future__ import annotations

import asyncio
import json
import logging

from starlette.types import ASGIApp, Message

from arriero.router.batches.lines import BatchLine
from arriero.router.batches.record import BatchRecord
from arriero.router.batches.runner import LineAnswer
from arriero.router.http import errors
from arriero.router.requests import read_request_id
from arriero.router.tenants import model_scope
from arriero.router.tenants.admission_controller import AdmissionController, Caller

log = logging.getLogger(__name__)


class LocalCalls:
    """Runs the requests of batches.

    Args:
        app: an application with the paths of requests and without middleware.
        admission: knows the tenants.
    """

    def __init__(self, app: ASGIApp, admission: AdmissionController) -> None:
        self._app, self._admission = app, admission

    async def __call__(self, record: BatchRecord, line: BatchLine) -> LineAnswer:
        """The answer to a request, as a background request of the batch's tenant."""
        request_id = read_request_id("")
        tenant = self._admission.named(record.tenant)
        caller = Caller(request_id=request_id, tenant=tenant, background=True)
        model_scope.enter(record.models)
        body = json.dumps(line.body).encode()
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": line.url,
            "raw_path": line.url.encode(),
            "root_path": "",
            "query_string": b"",
            "headers": [
                (b"content-type", b"application/json"),
                (b"content-length", str(len(body)).encode()),
            ],
            "client": None,
            "server": None,
            "state": {"request_id": request_id, "caller": caller},
        }
        messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
        sent: list[Message] = []

        async def receive() -> Message:
            if messages:
                return messages.pop()
            await asyncio.Event().wait()  # the caller never disconnects
            raise AssertionError("an event that nobody sets was set")

        async def send(message: Message) -> None:
            sent.append(message)

        try:
            await self._app(scope, receive, send)
        except Exception:
            log.exception("request %s failed", request_id)
            return LineAnswer(500, request_id, errors.internal(request_id))
        data = b"".join(message.get("body", b"") for message in sent)
        return LineAnswer(sent[0]["status"], request_id, json.loads(data))
