"""The gRPC side of a call: metadata in, messages and statuses out.

Knows gRPC contexts, metadata and statuses; knows nothing of servers or of the work of a call.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import Message

from arriero.router.calls.error_statuses import retry_after, status_of
from arriero.router.calls.request_notes import RequestNotes
from arriero.router.inference import Stream
from arriero.router.observability.log_lines import set_request_id
from arriero.router.requests import read_request_id
from arriero.router.response import TextDelta
from arriero.router.tenants.admission_controller import AdmissionController, Caller, is_set
from arriero.router.text.constraints import described
from arriero.shards.errors import ArrieroError, InvalidRequest, Overloaded

log = logging.getLogger(__name__)

MAX_DETAILS = 2000
"""Most characters of an error text; gRPC sends the text in a header, and clients limit headers."""

Context = grpc.aio.ServicerContext[bytes, bytes]


class GrpcCall:
    """A gRPC call: context, metadata, tenant, and request id for the logs."""

    __slots__ = ("context", "metadata", "request_id", "tenant")

    def __init__(self, context: Context, admission: AdmissionController) -> None:
        self.context = context
        self.request_id = ""
        self.metadata = dict(context.invocation_metadata() or ())
        self.tenant = admission.tenant(str(self.metadata.get("authorization", "")))

    def caller(self) -> Caller:
        """The sender of the call."""
        remaining_s = self.context.time_remaining()
        return Caller(
            request_id=self.request_id,
            tenant=self.tenant,
            deadline_s=None if remaining_s is None else time.monotonic() + remaining_s,
            traceparent=str(self.metadata.get("traceparent", "")),
            strict_schema=is_set(str(self.metadata.get("x-strict-schema", ""))),
            cache_key=str(self.metadata.get("x-prompt-cache-key", "")),
            background=is_set(str(self.metadata.get("x-background", ""))),
        )

    async def name(self, request_id: str) -> None:
        """Set the request id, "" for a new id, and send it to the client."""
        self.request_id = read_request_id(request_id)
        set_request_id(self.request_id)
        await self.context.send_initial_metadata((("x-request-id", self.request_id),))

    def add_notes(self, notes: RequestNotes) -> None:
        """Send the schema keywords that are not enforced to the client."""
        if notes.not_enforced:
            entry = ("x-schema-not-enforced", described(notes.not_enforced))
            self.context.set_trailing_metadata((entry,))

    async def write(self, stream: Stream) -> None:
        """Run a stream and send its messages."""
        async with aclosing(stream) as messages:
            async for message in messages:
                sent = message.to_wire() if isinstance(message, TextDelta) else message
                await self.context.write(sent.SerializeToString())


Method = Callable[[GrpcCall, bytes], Awaitable[Any]]


def unary(method: Callable[[bytes], Awaitable[Message]]) -> Method:
    """A method of a call, from a function of its request."""

    async def answer(call: GrpcCall, raw: bytes) -> bytes:
        await call.name("")
        return (await method(raw)).SerializeToString()

    return answer


def guard(
    admission: AdmissionController, method: Method
) -> Callable[[bytes, Context], Awaitable[Any]]:
    """Map errors to statuses: our errors with their text, other errors with the request id."""

    async def run(raw: bytes, context: Context) -> Any:  # noqa: ANN401
        try:
            return await answer(raw, context)
        except grpc.aio.InternalError:  # sending failed: the client is gone
            raise asyncio.CancelledError from None

    async def answer(raw: bytes, context: Context) -> Any:  # noqa: ANN401
        request_id = ""
        try:
            call = GrpcCall(context, admission)
            try:
                return await method(call, raw)
            finally:
                request_id = call.request_id
        except ArrieroError as error:
            code, details, trailing = _status(error)
        except grpc.aio.InternalError:
            raise
        except Exception:
            request_id = request_id or read_request_id("")
            log.exception("request %s failed", request_id)
            code = grpc.StatusCode.INTERNAL
            details = f"internal error; look for request {request_id} in the gateway's log"
            trailing = ()
        await context.abort(code, details[:MAX_DETAILS], trailing)

    return run


def _status(
    error: ArrieroError,
) -> tuple[grpc.StatusCode, str, tuple[tuple[str, str], ...]]:
    """Status code, details, and trailing metadata of an error."""
    trailing: tuple[tuple[str, str], ...] = ()
    if isinstance(error, InvalidRequest):
        trailing = (("arriero-field", error.field), ("arriero-code", error.code))
    elif isinstance(error, Overloaded):
        trailing = (("retry-after", retry_after(error)),)
    return status_of(error).grpc, str(error), trailing
