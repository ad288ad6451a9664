"""The gRPC side of a call: metadata in, messages and statuses out.

Knows gRPC contexts, metadata and statuses; knows nothing of servers or of the work of a call.
"""

from __future__ import annotations

import asyncio
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping
from contextlib import aclosing
from typing import Any, TypeVar

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
Entries = tuple[tuple[str, str], ...]
Status = tuple[grpc.StatusCode, str, Entries]
"""Status code, details, and trailing metadata of a call that has ended."""
R = TypeVar("R")


class ClientCall(ABC):
    """A call of a client, whatever carries the call: metadata, tenant, and request id for the logs.

    Args:
        metadata: of the call.
        deadline_s: monotonic time at which the client gives up; None for never.
        admission: finds the tenant.

    Raises:
        Unauthenticated: a key is needed and the metadata hold no valid key.
    """

    __slots__ = ("_deadline_s", "metadata", "request_id", "tenant")

    def __init__(
        self, metadata: Mapping[str, Any], deadline_s: float | None, admission: AdmissionController
    ) -> None:
        self.request_id = ""
        self.metadata = metadata
        self._deadline_s = deadline_s
        self.tenant = admission.tenant(str(metadata.get("authorization", "")))

    def caller(self) -> Caller:
        """The sender of the call."""
        return Caller(
            request_id=self.request_id,
            tenant=self.tenant,
            deadline_s=self._deadline_s,
            traceparent=str(self.metadata.get("traceparent", "")),
            strict_schema=is_set(str(self.metadata.get("x-strict-schema", ""))),
            cache_key=str(self.metadata.get("x-prompt-cache-key", "")),
            background=is_set(str(self.metadata.get("x-background", ""))),
        )

    async def name(self, request_id: str) -> None:
        """Set the request id, "" for a new id, and send it to the client."""
        self.request_id = read_request_id(request_id)
        set_request_id(self.request_id)

    def add_notes(self, notes: RequestNotes) -> None:
        """Send the schema keywords that are not enforced to the client."""
        if notes.not_enforced:
            self.set_trailing((("x-schema-not-enforced", described(notes.not_enforced)),))

    @abstractmethod
    def set_trailing(self, entries: Entries) -> None:
        """Send metadata at the end of the call."""

    @abstractmethod
    async def write(self, stream: Stream) -> None:
        """Run a stream and send its messages."""


class GrpcCall(ClientCall):
    """A call that has a gRPC call of its own."""

    __slots__ = ("context",)

    def __init__(self, context: Context, admission: AdmissionController) -> None:
        self.context = context
        metadata = dict(context.invocation_metadata() or ())
        super().__init__(metadata, deadline_of(context), admission)

    async def name(self, request_id: str) -> None:
        """Set the request id, "" for a new id, and send it to the client."""
        await super().name(request_id)
        await self.context.send_initial_metadata((("x-request-id", self.request_id),))

    def set_trailing(self, entries: Entries) -> None:
        """Send metadata at the end of the call."""
        self.context.set_trailing_metadata(entries)

    async def write(self, stream: Stream) -> None:
        """Run a stream and send its messages."""
        async with aclosing(stream) as messages:
            async for message in messages:
                sent = message.to_wire() if isinstance(message, TextDelta) else message
                await self.context.write(sent.SerializeToString())


Method = Callable[[GrpcCall, R], Awaitable[Any]]


def deadline_of(context: Context) -> float | None:
    """Monotonic time at which the client of a gRPC call gives up; None for never."""
    remaining_s = context.time_remaining()
    return None if remaining_s is None else time.monotonic() + remaining_s


def unary(method: Callable[[bytes], Awaitable[Message]]) -> Method[bytes]:
    """A method of a call, from a function of its request."""

    async def answer(call: GrpcCall, raw: bytes) -> bytes:
        await call.name("")
        return (await method(raw)).SerializeToString()

    return answer


def guard(
    admission: AdmissionController, method: Method[R]
) -> Callable[[R, Context], Awaitable[Any]]:
    """Map errors to statuses: our errors with their text, other errors with the request id."""

    async def run(request: R, context: Context) -> Any:  # noqa: ANN401
        try:
            return await answer(request, context)
        except grpc.aio.InternalError:  # sending failed: the client is gone
            raise asyncio.CancelledError from None

    async def answer(request: R, context: Context) -> Any:  # noqa: ANN401
        request_id = ""
        try:
            call = GrpcCall(context, admission)
            try:
                return await method(call, request)
            finally:
                request_id = call.request_id
        except grpc.aio.InternalError:
            raise
        except Exception as error:
            status = error_status(error, request_id)
        await context.abort(*status)

    return run


def error_status(error: Exception, request_id: str) -> Status:
    """The status of a call that ended in an error.

    Args:
        error: our error, or an unexpected error, which is logged.
        request_id: of the call; "" for a call that has none yet.
    """
    if isinstance(error, ArrieroError):
        code, details, trailing = _status(error)
        return code, details[:MAX_DETAILS], trailing
    request_id = request_id or read_request_id("")
    log.error("request %s failed", request_id, exc_info=error)
    details = f"internal error; look for request {request_id} in the gateway's log"
    return grpc.StatusCode.INTERNAL, details, ()


def _status(error: ArrieroError) -> Status:
    """Status code, details, and trailing metadata of an error."""
    trailing: Entries = ()
    if isinstance(error, InvalidRequest):
        trailing = (("arriero-field", error.field), ("arriero-code", error.code))
    elif isinstance(error, Overloaded):
        trailing = (("retry-after", retry_after(error)),)
    return status_of(error).grpc, str(error), trailing
