"""The methods of `arriero.v1.Inference` over gRPC.

An early end of a call (by the client, a deadline, a stop string or an error) closes the call's
iterator, and thereby cancels the request in the engine. Knows methods and messages; knows nothing
of servers or of the work of a call, which is in `Inference`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar

import grpc
from google.protobuf.message import Message

from arriero.router.calls.request_notes import RequestNotes
from arriero.router.grpc_calls import ClientCall, GrpcCall, Method, guard, unary
from arriero.router.grpc_many import ManyCalls
from arriero.router.guards.guards import Guards
from arriero.router.inference import Inference
from arriero.router.proto.arriero.v1 import inference_pb2 as pb
from arriero.router.requests import parse

SERVICE: str = pb.DESCRIPTOR.services_by_name["Inference"].full_name
M = TypeVar("M", bound=Message)


class InferenceService:
    """The service of a gateway.

    Args:
        inference: does the work of the calls.
        guards: judge texts.
        max_calls: most calls at once on all streams of `GenerateMany` together.
    """

    def __init__(self, inference: Inference, guards: Guards, max_calls: int) -> None:
        self._inference, self._guards = inference, guards
        methods: Mapping[str, Callable[[ClientCall, Any], Awaitable[None]]] = {
            "generate": self._generate,
            "chat": self._chat,
        }
        self._many = ManyCalls(methods, inference.admission, max_calls)

    def handlers(self) -> dict[str, grpc.RpcMethodHandler[Any, Any]]:
        """The handlers of a gRPC server, by method."""
        admission = self._inference.admission
        streams = {
            "Generate": _parsed(pb.GenerateRequest, self._generate),
            "Chat": _parsed(pb.ChatRequest, self._chat),
            "Resume": _parsed(pb.ResumeRequest, self._resume),
        }
        unaries = {
            "Tokenize": unary(self._tokenize),
            "Detokenize": unary(self._detokenize),
            "ListModels": unary(self._list_models),
            "GetModel": unary(self._get_model),
            "Moderate": _parsed(pb.ModerateRequest, self._moderate),
        }
        handlers = {
            name: grpc.unary_stream_rpc_method_handler(guard(admission, method))
            for name, method in streams.items()
        } | {
            name: grpc.unary_unary_rpc_method_handler(guard(admission, method))
            for name, method in unaries.items()
        }
        many = grpc.stream_stream_rpc_method_handler(guard(admission, self._many.serve))
        return handlers | {"GenerateMany": many}

    def drain(self) -> None:
        """Refuse new calls on streams that carry many calls; such streams end with their calls."""
        self._many.drain()

    async def _generate(self, call: ClientCall, request: pb.GenerateRequest) -> None:
        await call.name(request.request_id)
        notes = RequestNotes()
        stream = await self._inference.generate(request, call.caller(), notes)
        call.add_notes(notes)
        await call.write(stream)

    async def _chat(self, call: ClientCall, request: pb.ChatRequest) -> None:
        await call.name(request.request_id)
        notes = RequestNotes()
        stream = await self._inference.chat(request, call.caller(), notes)
        call.add_notes(notes)
        await call.write(stream)

    async def _resume(self, call: ClientCall, request: pb.ResumeRequest) -> None:
        await call.name(request.request_id)
        await call.write(self._inference.resume(request, call.caller()))

    async def _moderate(self, call: ClientCall, request: pb.ModerateRequest) -> bytes:
        await call.name(request.request_id)
        return (await self._guards.moderate(request, call.caller())).SerializeToString()

    async def _tokenize(self, raw: bytes) -> Message:
        return await self._inference.tokenize(parse(pb.TokenizeRequest, raw))

    async def _detokenize(self, raw: bytes) -> Message:
        return await self._inference.detokenize(parse(pb.DetokenizeRequest, raw))

    async def _list_models(self, raw: bytes) -> Message:
        parse(pb.ListModelsRequest, raw)
        return pb.ListModelsResponse(models=self._inference.models())

    async def _get_model(self, raw: bytes) -> Message:
        return self._inference.model(parse(pb.GetModelRequest, raw).model)


def _parsed(kind: type[M], method: Callable[[ClientCall, M], Awaitable[Any]]) -> Method[bytes]:
    """A method of the bytes of a request, so that a malformed request gets an error text."""

    async def answer(call: GrpcCall, raw: bytes) -> Any:  # noqa: ANN401
        return await method(call, parse(kind, raw))

    return answer
