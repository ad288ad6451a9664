"""A small typed client, in both colours.

`AsyncClient` for programs on asyncio, `Client` for all others; they ask and answer alike. Errors
come back as the exceptions that the gateway raised (`InvalidRequest`, `NotFound`, `Overloaded`,
`Unavailable`), others as grpcio's own. Knows the wire; knows nothing of groups or tokens.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self, TypeVar

import grpc
import grpc.aio

from arriero.router.proto.arriero.v1 import inference_pb2 as pb
from arriero.router.proto.arriero.v1.inference_pb2_grpc import InferenceStub
from arriero.shards.errors import ArrieroError, InvalidRequest, NotFound, Overloaded, Unavailable

if TYPE_CHECKING:
    from arriero.router.proto.arriero.v1.inference_pb2_grpc import InferenceAsyncStub

R = TypeVar("R")
Messages = Sequence[Mapping[str, Any]]
Prompt = str | Sequence[int]

_CHANNEL_OPTIONS = [("grpc.max_receive_message_length", -1)]


def generate_request(
    prompt: Prompt,
    *,
    model: str = "",
    request_id: str = "",
    **fields: Any,  # noqa: ANN401
) -> pb.GenerateRequest:
    """A GenerateRequest.

    Args:
        prompt: text, or token ids.
        model: its id; may stay empty when only one is served.
        request_id: a name for the logs; empty has the gateway make one.
        fields: fields of GenerateRequest, SamplingParams and Options by their own names.
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
    """A ChatRequest from mappings with `role` and `content`; the rest as `generate_request`."""
    request = pb.ChatRequest(model=model, request_id=request_id)
    request.messages.extend(pb.Message(**message) for message in messages)
    _fill(request, fields)
    return request


class AsyncClient:
    """A client for asyncio.

    Args:
        address: host and port of a gateway.
        credentials: of TLS; None speaks in the clear.
        timeout_s: deadline of each call; None for none.
    """

    def __init__(
        self,
        address: str,
        *,
        credentials: grpc.ChannelCredentials | None = None,
        timeout_s: float | None = None,
    ) -> None:
        if credentials is None:
            self._channel = grpc.aio.insecure_channel(address, options=_CHANNEL_OPTIONS)
        else:
            self._channel = grpc.aio.secure_channel(address, credentials, options=_CHANNEL_OPTIONS)
        self._stub: InferenceAsyncStub = InferenceStub(self._channel)
        self._timeout_s = timeout_s

    async def generate(self, prompt: Prompt, **fields: Any) -> AsyncIterator[pb.GenerateResponse]:  # noqa: ANN401
        """Continue `prompt`; see `generate_request`. Leaving the iterator cancels the call."""
        call = self._stub.Generate(generate_request(prompt, **fields), timeout=self._timeout_s)
        try:
            async for response in call:
                yield response
        except grpc.aio.AioRpcError as error:
            raise _translated(error) from None
        finally:
            call.cancel()

    async def chat(self, messages: Messages, **fields: Any) -> AsyncIterator[pb.GenerateResponse]:  # noqa: ANN401
        """Answer `messages`; see `chat_request`. Leaving the iterator cancels the call."""
        call = self._stub.Chat(chat_request(messages, **fields), timeout=self._timeout_s)
        try:
            async for response in call:
                yield response
        except grpc.aio.AioRpcError as error:
            raise _translated(error) from None
        finally:
            call.cancel()

    async def tokenize(self, request: pb.TokenizeRequest) -> pb.TokenizeResponse:
        """Token ids of a text or a conversation."""
        return await self._unary(self._stub.Tokenize, request)

    async def detokenize(self, request: pb.DetokenizeRequest) -> pb.DetokenizeResponse:
        """Text of token ids."""
        return await self._unary(self._stub.Detokenize, request)

    async def models(self) -> list[pb.Model]:
        """The models served now."""
        response = await self._unary(self._stub.ListModels, pb.ListModelsRequest())
        return list(response.models)

    async def model(self, model: str = "") -> pb.Model:
        """One model; "" for the only one."""
        return await self._unary(self._stub.GetModel, pb.GetModelRequest(model=model))

    async def _unary(self, method: Callable[..., Awaitable[R]], request: object) -> R:
        try:
            return await method(request, timeout=self._timeout_s)
        except grpc.aio.AioRpcError as error:
            raise _translated(error) from None

    async def close(self) -> None:
        """Drop the connection."""
        await self._channel.close(None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


class Client:
    """A client for programs without asyncio; as `AsyncClient`."""

    def __init__(
        self,
        address: str,
        *,
        credentials: grpc.ChannelCredentials | None = None,
        timeout_s: float | None = None,
    ) -> None:
        if credentials is None:
            self._channel = grpc.insecure_channel(address, options=_CHANNEL_OPTIONS)
        else:
            self._channel = grpc.secure_channel(address, credentials, options=_CHANNEL_OPTIONS)
        self._stub = InferenceStub(self._channel)
        self._timeout_s = timeout_s

    def generate(self, prompt: Prompt, **fields: Any) -> Iterator[pb.GenerateResponse]:  # noqa: ANN401
        """Continue `prompt`; see `generate_request`. Leaving the iterator cancels the call."""
        call = self._stub.Generate(generate_request(prompt, **fields), timeout=self._timeout_s)
        yield from _stream(call)

    def chat(self, messages: Messages, **fields: Any) -> Iterator[pb.GenerateResponse]:  # noqa: ANN401
        """Answer `messages`; see `chat_request`. Leaving the iterator cancels the call."""
        call = self._stub.Chat(chat_request(messages, **fields), timeout=self._timeout_s)
        yield from _stream(call)

    def tokenize(self, request: pb.TokenizeRequest) -> pb.TokenizeResponse:
        """Token ids of a text or a conversation."""
        return self._unary(self._stub.Tokenize, request)

    def detokenize(self, request: pb.DetokenizeRequest) -> pb.DetokenizeResponse:
        """Text of token ids."""
        return self._unary(self._stub.Detokenize, request)

    def models(self) -> list[pb.Model]:
        """The models served now."""
        return list(self._unary(self._stub.ListModels, pb.ListModelsRequest()).models)

    def model(self, model: str = "") -> pb.Model:
        """One model; "" for the only one."""
        return self._unary(self._stub.GetModel, pb.GetModelRequest(model=model))

    def _unary(self, method: Callable[..., R], request: object) -> R:
        try:
            return method(request, timeout=self._timeout_s)
        except grpc.RpcError as error:
            raise _translated(error) from None

    def close(self) -> None:
        """Drop the connection."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _stream(call: Any) -> Iterator[pb.GenerateResponse]:  # noqa: ANN401
    try:
        yield from call
    except grpc.RpcError as error:
        raise _translated(error) from None
    finally:
        call.cancel()


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
            raise InvalidRequest(name, f"`{name}` is no field of {request.DESCRIPTOR.name}")
        if value is None:
            continue
        if name == "allowed_token_ids":
            target.allowed_token_ids.ids.extend(value)
            target.allowed_token_ids.SetInParent()
        elif isinstance(value, pb.Grammar):
            target.grammar.CopyFrom(value)
        elif isinstance(value, Mapping):
            getattr(target, name).update(value)
        elif isinstance(value, Sequence) and not isinstance(value, str):
            getattr(target, name).extend(value)
        else:
            setattr(target, name, value)


def _translated(error: Any) -> Exception:  # noqa: ANN401
    """The gateway's own exception again, where the status tells it."""
    code, details = error.code(), error.details() or ""
    trailing = dict(error.trailing_metadata() or ())
    found: ArrieroError
    if code is grpc.StatusCode.INVALID_ARGUMENT:
        found = InvalidRequest(trailing.get("arriero-field", ""), details)
    elif code is grpc.StatusCode.NOT_FOUND:
        found = NotFound(details)
    elif code is grpc.StatusCode.RESOURCE_EXHAUSTED and "retry-after" in trailing:
        found = Overloaded(details, float(trailing["retry-after"]))
    elif code is grpc.StatusCode.UNAVAILABLE:
        found = Unavailable(details)
    else:
        return error  # type: ignore[no-any-return]
    return found
