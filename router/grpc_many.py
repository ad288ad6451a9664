"""Many calls on one gRPC stream: `GenerateMany`.

Each call runs in a task of its own, through the same methods as a call of `Generate` or `Chat`.
The answers of all calls gather in an outbox, and the stream sends the outbox as one message
whenever the message before has left. So the answers of a step, which become ready in one turn of
the event loop, share a message, and no answer waits for another. A slow client holds back at most
one answer of each call; the call then waits, as a call with a stream of its own does. Knows calls,
answers and statuses; knows nothing of the work of a call.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError
from google.protobuf.unknown_fields import UnknownFieldSet

from arriero.router.calls.error_statuses import NUMBERS
from arriero.router.grpc_calls import (
    ClientCall,
    Context,
    Entries,
    GrpcCall,
    Status,
    deadline_of,
    error_status,
)
from arriero.router.grpc_options import MAX_STREAM_CALLS, MAX_TIMEOUT_S
from arriero.router.inference import Stream
from arriero.router.proto.arriero.v1 import inference_pb2 as pb
from arriero.router.requests import parse
from arriero.router.response import TextDelta
from arriero.router.tenants.admission_controller import AdmissionController
from arriero.shards.errors import InvalidRequest, Overloaded, Unavailable

OK: Status = (grpc.StatusCode.OK, "", ())
CANCELLED: Status = (grpc.StatusCode.CANCELLED, "the client cancelled the call", ())
DEADLINE_EXCEEDED: Status = (grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded", ())
STOPPING = "the gateway is stopping; send the request to another gateway"


class ManyCalls:
    """The streams of a gateway that carry many calls.

    Args:
        methods: by field of `ManyRequest`, the method of a call.
        admission: finds the tenant of each call.
        max_calls: most calls at once on all streams together.
    """

    def __init__(
        self,
        methods: Mapping[str, Callable[[ClientCall, Any], Awaitable[None]]],
        admission: AdmissionController,
        max_calls: int,
    ) -> None:
        self.methods, self.admission, self.max_calls = methods, admission, max_calls
        self.num_calls = 0
        self.draining = False
        self._streams: set[_ManyStream] = set()

    async def serve(self, call: GrpcCall, requests: AsyncIterator[bytes]) -> None:
        """Serve a stream until its end.

        Raises:
            Unavailable: the gateway stops, and the calls of the stream have ended.
        """
        await call.name("")
        stream = _ManyStream(self, call.context, call.metadata)
        self._streams.add(stream)
        try:
            await stream.run(requests)
        finally:
            self._streams.discard(stream)

    def drain(self) -> None:
        """Refuse new calls, and end each stream when its calls have ended."""
        self.draining = True
        for stream in self._streams:
            stream.outbox.wake()


class Outbox:
    """Answers that wait for the next message of a stream.

    Attributes:
        reply: the next message.
    """

    def __init__(self) -> None:
        self.reply = pb.ManyReply()
        self._filled = asyncio.Event()
        self._sent = asyncio.Event()

    def add(self, call_id: int) -> pb.ManyAnswer:
        """A new answer in the next message, for the caller to fill."""
        self._filled.set()
        return self.reply.answers.add(id=call_id)

    def wake(self) -> None:
        """End the wait of `take`."""
        self._filled.set()

    async def take(self) -> pb.ManyReply:
        """Wait for answers or `wake`; returns the next message, which may be empty."""
        await self._filled.wait()
        self._filled.clear()
        reply, self.reply = self.reply, pb.ManyReply()
        self._sent.set()
        self._sent = asyncio.Event()
        return reply

    async def taken(self) -> None:
        """Wait until the next message is taken."""
        await self._sent.wait()


class ManyCall(ClientCall):
    """A call on a shared stream.

    Args:
        call_id: of the client.
        outbox: of the stream.
        metadata: of the call and of the stream.
        deadline_s: monotonic time at which the client gives up; None for never.
        admission: finds the tenant.

    Raises:
        Unauthenticated: a key is needed and the metadata hold no valid key.
    """

    __slots__ = ("_answer", "_id", "_outbox", "_reply", "_trailing")

    def __init__(
        self,
        call_id: int,
        outbox: Outbox,
        metadata: Mapping[str, Any],
        deadline_s: float | None,
        admission: AdmissionController,
    ) -> None:
        super().__init__(metadata, deadline_s, admission)
        self._id, self._outbox = call_id, outbox
        self._reply: pb.ManyReply | None = None  # message with the call's last answer
        self._answer: pb.ManyAnswer | None = None
        self._trailing: Entries = ()

    def set_trailing(self, entries: Entries) -> None:
        """Send metadata at the end of the call."""
        self._trailing = entries

    async def write(self, stream: Stream) -> None:
        """Run a stream and send its messages."""
        outbox = self._outbox
        async with aclosing(stream) as messages:
            async for message in messages:
                while self._reply is outbox.reply:  # the client reads slowly
                    await outbox.taken()
                self._reply, self._answer = outbox.reply, (answer := outbox.add(self._id))
                if isinstance(message, TextDelta):
                    message.add_to(answer.response)
                else:
                    answer.response.CopyFrom(message)

    def finish(self, status: Status) -> None:
        """Send the status of the call."""
        answer = self._answer if self._reply is self._outbox.reply else None
        if answer is None:
            answer = self._outbox.add(self._id)
        code, details, trailing = status
        entries = (*self._trailing, *trailing)
        if self.request_id:
            entries = (*entries, ("x-request-id", self.request_id))
        _fill(answer.status, (code, details, entries))


class _ManyStream:
    """A stream of calls."""

    def __init__(self, calls: ManyCalls, context: Context, metadata: Mapping[str, Any]) -> None:
        self.outbox = Outbox()
        self._calls, self._context, self._metadata = calls, context, metadata
        self._deadline_s = deadline_of(context)
        self._running: dict[int, asyncio.Task[None]] = {}
        self._ends: dict[int, Status] = {}  # of running calls that are being cancelled

    async def run(self, requests: AsyncIterator[bytes]) -> None:
        """Answer requests until the client has sent the last and all calls have ended."""
        reader = asyncio.create_task(self._read(requests))
        reader.add_done_callback(lambda _: self.outbox.wake())
        try:
            while True:
                reply = await self.outbox.take()
                if reply.answers:
                    await self._context.write(reply.SerializeToString())
                elif not self._running and (reader.done() or self._calls.draining):
                    break
        finally:
            complete = reader.done()
            tasks = [reader, *self._running.values()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        if not complete:
            raise Unavailable(STOPPING)
        reader.result()

    async def _read(self, requests: AsyncIterator[bytes]) -> None:
        """Start and cancel calls as the client asks."""
        async for raw in requests:
            while len(self.outbox.reply.answers) >= MAX_STREAM_CALLS:
                await self.outbox.taken()  # answers of a client that sends and does not read
            try:
                request = parse(pb.ManyRequest, raw)
                if request.WhichOneof("kind") == "cancel":
                    self._end(request.id, CANCELLED)
                else:
                    self._start(request)
            except (InvalidRequest, Overloaded, Unavailable) as error:
                call_id, status = _read_id(raw), error_status(error, "")
                if not self._end(call_id, status):
                    _fill(self.outbox.add(call_id).status, status)

    def _start(self, request: pb.ManyRequest) -> None:
        """Start a call.

        Raises:
            InvalidRequest: the id, the kind or the timeout is not valid.
            Overloaded: too many calls run.
            Unavailable: the gateway is stopping.
        """
        call_id, calls = request.id, self._calls
        _check(request)
        if call_id in self._running:
            raise InvalidRequest(
                "id",
                f"`id`={call_id} is the id of a call that has not ended; both calls are refused; "
                "give each call an id of its own",
            )
        if len(self._running) >= MAX_STREAM_CALLS:
            raise Overloaded(
                f"`id`={call_id} is one call more than the {MAX_STREAM_CALLS} that a stream "
                "carries at once; wait until a call ends, or open another stream",
                1.0,
            )
        if calls.num_calls >= calls.max_calls:
            raise Overloaded(
                f"`id`={call_id}: the gateway runs {calls.max_calls} calls of shared streams, the "
                "limit; retry later, or send the request to another gateway",
                1.0,
            )
        if calls.draining:
            raise Unavailable(STOPPING)
        task = asyncio.create_task(self._serve(request))
        self._running[call_id] = task
        calls.num_calls += 1
        task.add_done_callback(lambda _: self._ended(call_id))

    async def _serve(self, request: pb.ManyRequest) -> None:
        """Run a call to its end."""
        calls, deadline_s, timeout_s = self._calls, self._deadline_s, None
        if request.HasField("timeout_s"):
            timeout_s = request.timeout_s
            ends_s = time.monotonic() + timeout_s
            deadline_s = ends_s if deadline_s is None else min(deadline_s, ends_s)
        metadata = {**self._metadata, **request.metadata}
        scope, call = asyncio.timeout(timeout_s), None
        try:
            async with scope:
                call = ManyCall(request.id, self.outbox, metadata, deadline_s, calls.admission)
                kind = request.WhichOneof("kind") or ""
                await calls.methods[kind](call, getattr(request, kind))
            status = OK
        except Exception as error:
            request_id = "" if call is None else call.request_id
            status = DEADLINE_EXCEEDED if scope.expired() else error_status(error, request_id)
        if call is None:
            _fill(self.outbox.add(request.id).status, status)
        else:
            call.finish(status)

    def _end(self, call_id: int, status: Status) -> bool:
        """Cancel a call, with a status for the client; false when no call of this id runs."""
        task = self._running.get(call_id)
        if task is None or not task.cancel():
            return False
        self._ends.setdefault(call_id, status)
        return True

    def _ended(self, call_id: int) -> None:
        task, status = self._running.pop(call_id), self._ends.pop(call_id, None)
        self._calls.num_calls -= 1
        if status is not None and task.cancelled():
            _fill(self.outbox.add(call_id).status, status)
        self.outbox.wake()


def _check(request: pb.ManyRequest) -> None:
    """Raise `InvalidRequest` unless the request has an id, a kind and a valid timeout."""
    if request.id < 1:
        raise InvalidRequest("id", f"`id`={request.id} must be at least 1")
    if request.WhichOneof("kind") is None:
        raise InvalidRequest("kind", "set one of `generate`, `chat` and `cancel`")
    if request.HasField("timeout_s") and not 0 < request.timeout_s <= MAX_TIMEOUT_S:
        raise InvalidRequest(
            "timeout_s",
            f"`timeout_s`={request.timeout_s:g} must be above 0 and at most {MAX_TIMEOUT_S:.0f}; "
            "leave out `timeout_s` for no deadline",
        )


def _read_id(raw: bytes) -> int:
    """The id in the bytes of a `ManyRequest` that may be malformed elsewhere; 0 for no id."""
    number = pb.ManyRequest.ID_FIELD_NUMBER
    try:
        fields = UnknownFieldSet(pb.CancelCall.FromString(raw))
    except DecodeError:
        return 0
    ids = [
        field.data
        for field in (fields[position] for position in range(len(fields)))
        if field.field_number == number and field.wire_type == 0
    ]
    return ids[-1] if ids else 0


def _fill(message: pb.CallStatus, status: Status) -> None:
    code, details, entries = status
    message.code, message.message = NUMBERS[code], _utf8(details)
    for name, value in entries:
        message.metadata[name] = _utf8(value)
    message.SetInParent()


def _utf8(text: str) -> str:
    """A text without lone surrogates, which a JSON Schema in a request may hold."""
    return text.encode("utf-8", "replace").decode()
