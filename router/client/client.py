"""A small typed client, with and without asyncio.

`AsyncClient` for programs on asyncio, `Client` for other programs; both have the same methods, and
the same arguments but for `multiplexed` of `AsyncClient`. Both take every decision about retries
and resumption from `StreamAttempts` and `Retry`. Errors are the exceptions of the gateway
(`InvalidRequest`, `NotFound`, `Overloaded`, `Unavailable`) or else grpcio's own. Knows connections
and calls; knows nothing of groups or tokens.
"""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Generator,
    Iterator,
    Sequence,
)
from contextlib import aclosing
from functools import cached_property
from typing import TYPE_CHECKING, Any, Generic, Self, TypedDict, TypeVar, Unpack

import grpc
import grpc.aio

from arriero.router.client.multiplexer import MultiplexedCall, Multiplexer
from arriero.router.client.request_messages import (
    Messages,
    Prompt,
    chat_request,
    generate_request,
)
from arriero.router.client.retry import Retry
from arriero.router.client.status_errors import from_status
from arriero.router.client.stream_attempts import StreamAttempts
from arriero.router.grpc_options import CLIENT_OPTIONS
from arriero.router.proto.arriero.v1 import inference_pb2 as pb
from arriero.router.proto.arriero.v1.inference_pb2_grpc import InferenceStub
from arriero.shards.errors import Unavailable

if TYPE_CHECKING:
    from arriero.router.proto.arriero.v1.inference_pb2_grpc import InferenceAsyncStub

R = TypeVar("R")
C = TypeVar("C", grpc.Channel, grpc.aio.Channel)
StreamRequest = pb.GenerateRequest | pb.ChatRequest


class Settings(TypedDict, total=False):
    """Keyword arguments of `GatewayClient`."""

    credentials: grpc.ChannelCredentials | None
    timeout_s: float | None
    api_key: str | None
    resume_s: float
    retries: int
    background: bool


class GatewayClient(ABC, Generic[C]):
    """The part that `AsyncClient` and `Client` share: settings, first connection, attempts.

    Args:
        address: HOST:PORT of a gateway, or of several; or a function that returns these, called
            again when a stream needs another gateway. No address at first raises Unavailable.
        credentials: TLS credentials; None for no TLS.
        api_key: sent with each call; None for a gateway without keys.
        timeout_s: deadline of each call in seconds, retries included; None for no deadline.
        retries: most further attempts of a call that was refused before its start, because the
            gateway was overloaded or no group could serve; 0 for no retries.
        resume_s: seconds for which a broken stream is resumed, at each gateway in turn; 0 for no
            resumption. Needs token ids, which are sent by default.
        background: let calls wait for what interactive requests leave free.
    """

    def __init__(
        self,
        address: str | Sequence[str] | Callable[[], Sequence[str]],
        *,
        credentials: grpc.ChannelCredentials | None = None,
        timeout_s: float | None = None,
        api_key: str | None = None,
        resume_s: float = 0.0,
        retries: int = 0,
        background: bool = False,
    ) -> None:
        metadata = {
            "authorization": None if api_key is None else f"Bearer {api_key}",
            "x-background": "1" if background else None,
        }
        self._metadata = tuple(
            (name, value) for name, value in metadata.items() if value is not None
        )
        self._discover = _discovery(address)
        self._credentials = credentials
        addresses = self._discover()
        if not addresses:
            raise Unavailable("`address` names no gateway; give HOST:PORT of a gateway")
        self._address = addresses[0]
        self._timeout_s, self._retries = timeout_s, retries
        self._resume_s = resume_s
        self._channel: C = self._open(self._address)

    @abstractmethod
    def _open(self, address: str) -> C:
        """A channel to a gateway."""

    def _retry(self) -> Retry:
        """The attempts of a call with one answer."""
        return Retry(self._retries, self._timeout_s)

    def _attempts(self, request: StreamRequest) -> StreamAttempts:
        """The attempts of a stream."""
        return StreamAttempts(
            request,
            address=self._address,
            discover=self._discover,
            retry=self._retry(),
            resume_s=self._resume_s,
        )


class AsyncClient(GatewayClient[grpc.aio.Channel]):
    """A client for asyncio.

    Args:
        address: as of `GatewayClient`.
        multiplexed: let the calls of `generate` and `chat` share a stream, in which a message holds
            the answers of all calls in a step. Costs the client and the gateway less CPU time for
            each token once there are several calls at a time. Answers that the program does not
            read wait in its memory.
        settings: as of `GatewayClient`.
    """

    def __init__(
        self,
        address: str | Sequence[str] | Callable[[], Sequence[str]],
        *,
        multiplexed: bool = False,
        **settings: Unpack[Settings],
    ) -> None:
        super().__init__(address, **settings)
        self._multiplexer = Multiplexer(self._open, self._metadata) if multiplexed else None

    def _open(self, address: str) -> grpc.aio.Channel:
        if self._credentials is None:
            return grpc.aio.insecure_channel(address, options=CLIENT_OPTIONS)
        return grpc.aio.secure_channel(address, self._credentials, options=CLIENT_OPTIONS)

    @cached_property
    def _stub(self) -> InferenceAsyncStub:
        stub: InferenceAsyncStub = InferenceStub(self._channel)
        return stub

    async def generate(self, prompt: Prompt, **fields: Any) -> AsyncIterator[pb.GenerateResponse]:  # noqa: ANN401
        """Continue `prompt`; see `generate_request`. Leaving the iterator cancels the call."""
        async with aclosing(
            self._stream("Generate", generate_request(prompt, **fields))
        ) as responses:
            async for response in responses:
                yield response

    async def chat(self, messages: Messages, **fields: Any) -> AsyncIterator[pb.GenerateResponse]:  # noqa: ANN401
        """Answer `messages`; see `chat_request`. Leaving the iterator cancels the call."""
        async with aclosing(self._stream("Chat", chat_request(messages, **fields))) as responses:
            async for response in responses:
                yield response

    async def tokenize(self, request: pb.TokenizeRequest) -> pb.TokenizeResponse:
        """Token ids of a text or a conversation."""
        return await self._unary(self._stub.Tokenize, request)

    async def detokenize(self, request: pb.DetokenizeRequest) -> pb.DetokenizeResponse:
        """Text of token ids."""
        return await self._unary(self._stub.Detokenize, request)

    async def moderate(self, request: pb.ModerateRequest) -> pb.ModerateResponse:
        """Verdicts of a guard model."""
        return await self._unary(self._stub.Moderate, request)

    async def models(self) -> list[pb.Model]:
        """The served models."""
        response = await self._unary(self._stub.ListModels, pb.ListModelsRequest())
        return list(response.models)

    async def model(self, model: str = "") -> pb.Model:
        """Facts about a model; "" for the single served model."""
        return await self._unary(self._stub.GetModel, pb.GetModelRequest(model=model))

    async def close(self) -> None:
        """Close the connections."""
        if self._multiplexer is not None:
            await self._multiplexer.close()
        await self._channel.close(None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _stream(
        self, method: str, request: StreamRequest
    ) -> AsyncGenerator[pb.GenerateResponse]:
        """Run a call; after a break, resume the call at another gateway."""
        attempts = self._attempts(request)
        address, channel = self._address, self._channel
        call: MultiplexedCall | grpc.aio.UnaryStreamCall[Any, pb.GenerateResponse]
        try:
            while True:
                new_address = attempts.new_address()
                address = new_address or address
                if self._multiplexer is not None:
                    call = self._multiplexer.start(address, request, attempts.timeout_s)
                else:
                    if new_address is not None:
                        if channel is not self._channel:
                            await channel.close(None)
                        channel = self._open(address)
                    call = getattr(InferenceStub(channel), method)(
                        request, timeout=attempts.timeout_s, metadata=self._metadata
                    )
                try:
                    async for response in call:
                        yield attempts.add(response)
                    return
                except grpc.aio.AioRpcError as error:
                    if self._multiplexer is not None and self._multiplexer.closed:
                        raise
                    wait_s = attempts.wait_s(error)
                finally:
                    call.cancel()
                if wait_s is None:
                    return
                await asyncio.sleep(wait_s)
        finally:
            if channel is not self._channel:
                await channel.close(None)

    async def _unary(self, method: Callable[..., Awaitable[R]], request: object) -> R:
        retry = self._retry()
        while True:
            try:
                return await method(request, timeout=retry.timeout_s, metadata=self._metadata)
            except grpc.aio.AioRpcError as error:
                cause = from_status(error)
            wait_s = retry.wait_s(cause)
            if wait_s is None:
                raise cause
            await asyncio.sleep(wait_s)


class Client(GatewayClient[grpc.Channel]):
    """A client for programs without asyncio; arguments as of `GatewayClient`."""

    _closed = False

    def _open(self, address: str) -> grpc.Channel:
        if self._credentials is None:
            return grpc.insecure_channel(address, options=CLIENT_OPTIONS)
        return grpc.secure_channel(address, self._credentials, options=CLIENT_OPTIONS)

    @cached_property
    def _stub(self) -> InferenceStub:
        stub: InferenceStub = InferenceStub(self._channel)
        return stub

    def generate(self, prompt: Prompt, **fields: Any) -> Iterator[pb.GenerateResponse]:  # noqa: ANN401
        """Continue `prompt`; see `generate_request`. Leaving the iterator cancels the call."""
        yield from self._stream("Generate", generate_request(prompt, **fields))

    def chat(self, messages: Messages, **fields: Any) -> Iterator[pb.GenerateResponse]:  # noqa: ANN401
        """Answer `messages`; see `chat_request`. Leaving the iterator cancels the call."""
        yield from self._stream("Chat", chat_request(messages, **fields))

    def tokenize(self, request: pb.TokenizeRequest) -> pb.TokenizeResponse:
        """Token ids of a text or a conversation."""
        return self._unary(self._stub.Tokenize, request)

    def detokenize(self, request: pb.DetokenizeRequest) -> pb.DetokenizeResponse:
        """Text of token ids."""
        return self._unary(self._stub.Detokenize, request)

    def moderate(self, request: pb.ModerateRequest) -> pb.ModerateResponse:
        """Verdicts of a guard model."""
        return self._unary(self._stub.Moderate, request)

    def models(self) -> list[pb.Model]:
        """The served models."""
        return list(self._unary(self._stub.ListModels, pb.ListModelsRequest()).models)

    def model(self, model: str = "") -> pb.Model:
        """Facts about a model; "" for the single served model."""
        return self._unary(self._stub.GetModel, pb.GetModelRequest(model=model))

    def close(self) -> None:
        """Close the connection; ends streams that other threads read."""
        self._closed = True
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _stream(
        self, method: str, request: StreamRequest
    ) -> Generator[pb.GenerateResponse, None, None]:
        """Run a call; after a break, resume the call at another gateway."""
        attempts = self._attempts(request)
        channel = self._channel
        try:
            while True:
                if (address := attempts.new_address()) is not None:
                    if channel is not self._channel:
                        channel.close()
                    channel = self._open(address)
                call = getattr(InferenceStub(channel), method)(
                    request, timeout=attempts.timeout_s, metadata=self._metadata
                )
                try:
                    for response in call:
                        yield attempts.add(response)
                    return
                except grpc.RpcError as error:
                    if self._closed:
                        raise
                    wait_s = attempts.wait_s(error)
                finally:
                    call.cancel()
                if wait_s is None:
                    return
                time.sleep(wait_s)
        finally:
            if channel is not self._channel:
                channel.close()

    def _unary(self, method: Callable[..., R], request: object) -> R:
        retry = self._retry()
        while True:
            try:
                return method(request, timeout=retry.timeout_s, metadata=self._metadata)
            except grpc.RpcError as error:
                cause = from_status(error)
            wait_s = retry.wait_s(cause)
            if wait_s is None:
                raise cause
            time.sleep(wait_s)


def _discovery(
    address: str | Sequence[str] | Callable[[], Sequence[str]],
) -> Callable[[], Sequence[str]]:
    """A function that returns the addresses of the gateways."""
    if callable(address):
        return address
    fixed = [address] if isinstance(address, str) else list(address)
    return lambda: fixed
