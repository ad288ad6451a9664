"""A small typed client, with and without asyncio.

`AsyncClient` for programs on asyncio, `Client` for other programs; both have the same methods.
Errors are the exceptions of the gateway (`InvalidRequest`, `NotFound`, `Overloaded`,
`Unavailable`) or else grpcio's own. Knows the messages; knows nothing of groups or tokens.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Self, TypeVar

import grpc
import grpc.aio
from google.protobuf.message import Message as ProtoMessage

from arriero.router.client.resume_state import ResumeState
from arriero.router.client.retry import Retry
from arriero.router.grpc_options import CLIENT_OPTIONS
from arriero.router.proto.arriero.v1 import inference_pb2 as pb
from arriero.router.proto.arriero.v1.inference_pb2_grpc import InferenceStub
from arriero.shards.errors import (
    ArrieroError,
    ContextTooLong,
    InvalidRequest,
    NotFound,
    Overloaded,
    PermissionDenied,
    Unauthenticated,
    Unavailable,
)

if TYPE_CHECKING:
    from arriero.router.proto.arriero.v1.inference_pb2_grpc import InferenceAsyncStub

R = TypeVar("R")
Messages = Sequence[Mapping[str, Any]]
Prompt = str | Sequence[int]

_PAUSE_S = 0.1


def generate_request(
    prompt: Prompt,
    *,
    model: str = "",
    request_id: str = "",
    **fields: Any,  # noqa: ANN401
) -> pb.GenerateRequest:
    """Make a GenerateRequest.

    Args:
        prompt: text, or token ids.
        model: id of the model; may be empty when a single model is served.
        request_id: name for the logs; empty for a name by the gateway.
        fields: fields of GenerateRequest, SamplingParams and Options, by name.
    """
    request = pb.GenerateRequest(model=model, request_id=request_id)
    if isinstance(prompt, str):
        request.text = prompt
    else:
        request.token_ids.ids.extend(prompt)
        request.token_ids.SetInParent()
    _fill(request, fields)
    return request


def chat_request(
    messages: Messages,
    *,
    model: str = "",
    request_id: str = "",
    **fields: Any,  # noqa: ANN401
) -> pb.ChatRequest:
    """Make a ChatRequest from mappings with `role` and `content`; else as `generate_request`."""
    request = pb.ChatRequest(model=model, request_id=request_id)
    request.messages.extend(pb.Message(**message) for message in messages)
    _fill(request, fields)
    return request


class AsyncClient:
    """A client for asyncio.

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
    ) -> None:
        self._metadata = _metadata(api_key)
        self._discover = _discovery(address)
        self._credentials = credentials
        addresses = self._discover()
        if not addresses:
            raise Unavailable("`address` names no gateway; give HOST:PORT of a gateway")
        self._address = addresses[0]
        self._channel = self._open(self._address)
        self._stub: InferenceAsyncStub = InferenceStub(self._channel)
        self._timeout_s, self._retries = timeout_s, retries
        self._resume_s = resume_s

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

    async def _stream(
        self, method: str, request: pb.GenerateRequest | pb.ChatRequest
    ) -> AsyncGenerator[pb.GenerateResponse]:
        """Run a call; after a break, resume the call at another gateway."""
        state = ResumeState()
        retry = Retry(self._retries, self._timeout_s)
        address, channel = self._address, self._channel
        deadline_s: float | None = None
        try:
            while True:
                call = getattr(InferenceStub(channel), method)(
                    request, timeout=retry.timeout_s, metadata=self._metadata
                )
                try:
                    async for response in call:
                        deadline_s = None
                        yield state.add(response)
                    return
                except grpc.aio.AioRpcError as error:
                    cause, connection_lost = _from_status(error), _connection_lost(error)
                finally:
                    call.cancel()
                if state.finished:
                    return  # only the status of the call is missing
                wait_s = None if state.started else retry.wait_s(cause)
                if wait_s is not None:
                    await asyncio.sleep(wait_s)
                    continue
                now_s = time.monotonic()
                deadline_s = deadline_s or now_s + self._resume_s
                if now_s >= deadline_s or not connection_lost:
                    raise cause
                state.fill(request)
                await asyncio.sleep(_PAUSE_S)
                addresses = self._discover() or [address]
                position = (
                    (addresses.index(address) + 1) % len(addresses) if address in addresses else 0
                )
                if channel is not self._channel:
                    await channel.close(None)
                address = addresses[position]
                channel = self._open(address)
        finally:
            if channel is not self._channel:
                await channel.close(None)

    def _open(self, address: str) -> grpc.aio.Channel:
        if self._credentials is None:
            return grpc.aio.insecure_channel(address, options=CLIENT_OPTIONS)
        return grpc.aio.secure_channel(address, self._credentials, options=CLIENT_OPTIONS)

    async def tokenize(self, request: pb.TokenizeRequest) -> pb.TokenizeResponse:
        """Token ids of a text or a conversation."""
        return await self._unary(self._stub.Tokenize, request)

    async def detokenize(self, request: pb.DetokenizeRequest) -> pb.DetokenizeResponse:
        """Text of token ids."""
        return await self._unary(self._stub.Detokenize, request)

    async def models(self) -> list[pb.Model]:
        """The served models."""
        response = await self._unary(self._stub.ListModels, pb.ListModelsRequest())
        return list(response.models)

    async def model(self, model: str = "") -> pb.Model:
        """Facts about a model; "" for the single served model."""
        return await self._unary(self._stub.GetModel, pb.GetModelRequest(model=model))

    async def _unary(self, method: Callable[..., Awaitable[R]], request: object) -> R:
        retry = Retry(self._retries, self._timeout_s)
        while True:
            try:
                return await method(request, timeout=retry.timeout_s, metadata=self._metadata)
            except grpc.aio.AioRpcError as error:
                cause = _from_status(error)
            wait_s = retry.wait_s(cause)
            if wait_s is None:
                raise cause
            await asyncio.sleep(wait_s)

    async def close(self) -> None:
        """Close the connection."""
        await self._channel.close(None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


class Client:
    """A client for programs without asyncio; arguments as of `AsyncClient`."""

    def __init__(
        self,
        address: str,
        *,
        credentials: grpc.ChannelCredentials | None = None,
        timeout_s: float | None = None,
        api_key: str | None = None,
        retries: int = 0,
    ) -> None:
        self._metadata = _metadata(api_key)
        if credentials is None:
            self._channel = grpc.insecure_channel(address, options=CLIENT_OPTIONS)
        else:
            self._channel = grpc.secure_channel(address, credentials, options=CLIENT_OPTIONS)
        self._stub = InferenceStub(self._channel)
        self._timeout_s, self._retries = timeout_s, retries

    def generate(self, prompt: Prompt, **fields: Any) -> Iterator[pb.GenerateResponse]:  # noqa: ANN401
        """Continue `prompt`; see `generate_request`. Leaving the iterator cancels the call."""
        yield from self._stream(self._stub.Generate, generate_request(prompt, **fields))

    def chat(self, messages: Messages, **fields: Any) -> Iterator[pb.GenerateResponse]:  # noqa: ANN401
        """Answer `messages`; see `chat_request`. Leaving the iterator cancels the call."""
        yield from self._stream(self._stub.Chat, chat_request(messages, **fields))

    def tokenize(self, request: pb.TokenizeRequest) -> pb.TokenizeResponse:
        """Token ids of a text or a conversation."""
        return self._unary(self._stub.Tokenize, request)

    def detokenize(self, request: pb.DetokenizeRequest) -> pb.DetokenizeResponse:
        """Text of token ids."""
        return self._unary(self._stub.Detokenize, request)

    def models(self) -> list[pb.Model]:
        """The served models."""
        return list(self._unary(self._stub.ListModels, pb.ListModelsRequest()).models)

    def model(self, model: str = "") -> pb.Model:
        """Facts about a model; "" for the single served model."""
        return self._unary(self._stub.GetModel, pb.GetModelRequest(model=model))

    def _unary(self, method: Callable[..., R], request: object) -> R:
        retry = Retry(self._retries, self._timeout_s)
        while True:
            try:
                return method(request, timeout=retry.timeout_s, metadata=self._metadata)
            except grpc.RpcError as error:
                cause = _from_status(error)
            wait_s = retry.wait_s(cause)
            if wait_s is None:
                raise cause
            time.sleep(wait_s)

    def _stream(
        self,
        method: Callable[..., Any],
        request: object,
    ) -> Iterator[pb.GenerateResponse]:
        retry = Retry(self._retries, self._timeout_s)
        while True:
            call = method(request, timeout=retry.timeout_s, metadata=self._metadata)
            started = False
            try:
                for response in call:
                    started = True
                    yield response
                return
            except grpc.RpcError as error:
                cause = _from_status(error)
            finally:
                call.cancel()
            wait_s = None if started else retry.wait_s(cause)
            if wait_s is None:
                raise cause
            time.sleep(wait_s)

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _discovery(
    address: str | Sequence[str] | Callable[[], Sequence[str]],
) -> Callable[[], Sequence[str]]:
    """A function that returns the addresses of the gateways."""
    if callable(address):
        return address
    fixed = [address] if isinstance(address, str) else list(address)
    return lambda: fixed


def _metadata(api_key: str | None) -> tuple[tuple[str, str], ...]:
    return () if api_key is None else (("authorization", f"Bearer {api_key}"),)


def _connection_lost(error: grpc.aio.AioRpcError) -> bool:
    """Whether a call ended because the gateway or the connection failed."""
    return error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)


def _fill(request: pb.GenerateRequest | pb.ChatRequest, fields: Mapping[str, Any]) -> None:
    for name, value in fields.items():
        target: Any
        if name in pb.SamplingParams.DESCRIPTOR.fields_by_name:
            target = request.sampling
        elif name in pb.Options.DESCRIPTOR.fields_by_name:
            target = request.options
        elif name in request.DESCRIPTOR.fields_by_name:
            target = request
        else:
            raise InvalidRequest(
                name,
                f"`{name}` is no field of {request.DESCRIPTOR.name}, SamplingParams or Options",
            )
        if value is None:
            continue
        if name == "allowed_token_ids":
            target.allowed_token_ids.ids.extend(value)
            target.allowed_token_ids.SetInParent()
        elif isinstance(value, ProtoMessage):
            getattr(target, name).CopyFrom(value)
        elif isinstance(value, Mapping):
            getattr(target, name).update(value)
        elif isinstance(value, Sequence) and not isinstance(value, str):
            getattr(target, name).extend(value)
        else:
            setattr(target, name, value)


def _invalid(trailing: Mapping[str, str], details: str) -> InvalidRequest:
    field, code = trailing.get("arriero-field", ""), trailing.get("arriero-code", "invalid_value")
    if code == ContextTooLong.CODE:
        return ContextTooLong(field, details)
    return InvalidRequest(field, details, code)


def _from_status(error: Any) -> Exception:  # noqa: ANN401
    """The gateway's exception for a status; the given error for other statuses."""
    code, details = error.code(), error.details() or ""
    trailing = dict(error.trailing_metadata() or ())
    translated: ArrieroError
    if code is grpc.StatusCode.INVALID_ARGUMENT:
        translated = _invalid(trailing, details)
    elif code is grpc.StatusCode.NOT_FOUND:
        translated = NotFound(details)
    elif code is grpc.StatusCode.RESOURCE_EXHAUSTED and "retry-after" in trailing:
        translated = Overloaded(details, float(trailing["retry-after"]))
    elif code is grpc.StatusCode.UNAUTHENTICATED:
        translated = Unauthenticated(details)
    elif code is grpc.StatusCode.PERMISSION_DENIED:
        translated = PermissionDenied(details)
    elif code is grpc.StatusCode.UNAVAILABLE:
        translated = Unavailable(details)
    else:
        return error  # type: ignore[no-any-return]
    return translated
