"""Calls of a client that share a stream: `GenerateMany`, from the client's side.

A stream has a connection of its own and carries a limited number of calls; further calls open a
further stream. Answers wait in memory until the caller reads, since a call that is not read must
not hold the others back. Knows streams and calls; knows nothing of retries or resumption.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Self, cast

import grpc
import grpc.aio

from arriero.router.calls.error_statuses import NUMBERS
from arriero.router.grpc_options import MAX_STREAM_CALLS, MAX_TIMEOUT_S
from arriero.router.proto.arriero.v1 import inference_pb2 as pb
from arriero.router.proto.arriero.v1.inference_pb2_grpc import InferenceStub

if TYPE_CHECKING:
    from arriero.router.proto.arriero.v1.inference_pb2_grpc import InferenceAsyncStub

LEAST_TIMEOUT_S = 0.001
"""Seconds sent for a deadline that has passed; the client ends the call by itself."""
CODES = {number: code for code, number in NUMBERS.items()}
Metadata = tuple[tuple[str, str], ...]


class Multiplexer:
    """The shared streams of a client.

    Args:
        open_channel: opens a connection to an address.
        metadata: sent with each stream.

    Attributes:
        closed: `close` was called.
    """

    def __init__(self, open_channel: Callable[[str], grpc.aio.Channel], metadata: Metadata) -> None:
        self._open_channel, self._metadata = open_channel, metadata
        self._streams: dict[str, list[_SharedStream]] = {}
        self.closed = False

    def start(
        self,
        address: str,
        request: pb.GenerateRequest | pb.ChatRequest,
        timeout_s: float | None,
    ) -> MultiplexedCall:
        """Start a call of `Generate` or `Chat`.

        Args:
            address: of the gateway.
            request: of the call.
            timeout_s: seconds until the call's deadline; None for no deadline.
        """
        streams = [s for s in self._streams.get(address, ()) if not s.ended]
        self._streams[address] = streams
        stream = next((s for s in streams if len(s.calls) < MAX_STREAM_CALLS), None)
        if stream is None:
            stream = _SharedStream(self._open_channel(address), self._metadata)
            streams.append(stream)
        message = pb.ManyRequest()
        if isinstance(request, pb.GenerateRequest):
            message.generate.CopyFrom(request)
        else:
            message.chat.CopyFrom(request)
        if timeout_s is not None:
            message.timeout_s = min(max(timeout_s, LEAST_TIMEOUT_S), MAX_TIMEOUT_S)
        return stream.start(message, timeout_s)

    async def close(self) -> None:
        """End all calls and close the connections."""
        self.closed = True
        streams = [stream for group in self._streams.values() for stream in group]
        await asyncio.gather(*(stream.close() for stream in streams))


class MultiplexedCall:
    """A call on a shared stream; iteration gives the messages of its answer.

    Iteration raises `AioRpcError` when the call or the stream ends in an error.
    """

    def __init__(self, stream: _SharedStream, call_id: int, timeout_s: float | None) -> None:
        self._stream, self._id = stream, call_id
        self._responses: deque[pb.GenerateResponse] = deque()
        self._ended = False
        self._error: grpc.aio.AioRpcError | None = None
        loop = asyncio.get_running_loop()
        self._waiter: asyncio.Future[None] | None = None
        self._timer = None if timeout_s is None else loop.call_later(timeout_s, self._expire)

    def add(self, answer: pb.ManyAnswer) -> None:
        """Take the next part of the answer."""
        if answer.HasField("response"):
            self._responses.append(answer.response)
        if answer.HasField("status"):
            self.end(_status_error(answer.status) if answer.status.code else None)
        self._wake()

    def end(self, error: grpc.aio.AioRpcError | None) -> None:
        """End the call; None for the orderly end. Responses before the end are still read."""
        if not self._ended:
            self._ended, self._error = True, error
        if self._timer is not None:
            self._timer.cancel()
        self._wake()

    def cancel(self) -> None:
        """Leave the call; cancels a call that has not ended."""
        self._stream.leave(self._id, cancel=not self._ended)
        self.end(None)

    def __aiter__(self) -> Self:
        """The call itself."""
        return self

    async def __anext__(self) -> pb.GenerateResponse:
        """The next message."""
        while not self._responses:
            if self._error is not None:
                raise self._error
            if self._ended:
                raise StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        return self._responses.popleft()

    def _expire(self) -> None:
        self._stream.leave(self._id, cancel=True)
        self.end(_failure(grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded"))

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class _SharedStream:
    """A stream and its connection.

    Attributes:
        calls: that have not ended, by id.
        ended: the stream takes no further calls.
    """

    def __init__(self, channel: grpc.aio.Channel, metadata: Metadata) -> None:
        self.calls: dict[int, MultiplexedCall] = {}
        self.ended = False
        self._channel, self._metadata = channel, metadata
        self._ids = itertools.count(1)
        self._requests: asyncio.Queue[pb.ManyRequest | None] = asyncio.Queue()
        self._task = asyncio.create_task(self._run())

    def start(self, request: pb.ManyRequest, timeout_s: float | None) -> MultiplexedCall:
        """Send a request under a new id."""
        request.id = next(self._ids)
        call = self.calls[request.id] = MultiplexedCall(self, request.id, timeout_s)
        self._requests.put_nowait(request)
        return call

    def leave(self, call_id: int, *, cancel: bool) -> None:
        """Forget a call; `cancel` tells the gateway."""
        if self.calls.pop(call_id, None) is not None and cancel and not self.ended:
            self._requests.put_nowait(pb.ManyRequest(id=call_id, cancel=pb.CancelCall()))

    async def close(self) -> None:
        """End all calls and close the connection."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        """Read answers until the end of the stream, which ends all calls."""
        error: Exception = _failure(grpc.StatusCode.CANCELLED, "the client was closed")
        try:
            await self._read()
            error = _failure(grpc.StatusCode.UNAVAILABLE, "the gateway ended the stream")
        except Exception as caught:
            error = caught
        finally:
            self.ended = True
            self._requests.put_nowait(None)
            for call in self.calls.values():
                call.end(_copy(error))
            await self._channel.close(None)

    async def _read(self) -> None:
        stub: InferenceAsyncStub = InferenceStub(self._channel)
        stream = stub.GenerateMany(self._send(), metadata=self._metadata)
        try:
            async for reply in stream:
                for answer in reply.answers:
                    call = self.calls.get(answer.id)
                    if call is None:
                        continue  # the caller has left
                    if answer.HasField("status"):
                        del self.calls[answer.id]
                    call.add(answer)
        finally:
            stream.cancel()

    async def _send(self) -> AsyncIterator[pb.ManyRequest]:
        while (request := await self._requests.get()) is not None:
            yield request


def _status_error(status: pb.CallStatus) -> grpc.aio.AioRpcError:
    """The error that a call with a stream of its own would end in."""
    code = CODES.get(status.code, grpc.StatusCode.UNKNOWN)
    return _failure(code, status.message, grpc.aio.Metadata(*status.metadata.items()))


def _copy(error: Exception) -> grpc.aio.AioRpcError:
    """The error of a stream, for a call; tasks that raise the same exception mix their traces."""
    if isinstance(error, grpc.aio.AioRpcError):
        trailing = cast(grpc.aio.Metadata, error.trailing_metadata())
        return _failure(error.code(), error.details(), trailing)
    return _failure(grpc.StatusCode.INTERNAL, f"{type(error).__name__}: {error}")


def _failure(
    code: grpc.StatusCode, details: str | None, trailing: grpc.aio.Metadata | None = None
) -> grpc.aio.AioRpcError:
    trailing = grpc.aio.Metadata() if trailing is None else trailing
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), trailing, details, None)
