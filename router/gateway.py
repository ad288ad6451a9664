"""The gateway: the gRPC server that clients talk to.

A call's life: parse, check, tokenize, choose a group, run it there, write one message a step.
Whatever ends a call early (the client, its deadline, a stop string, an error) closes the run's
iterator, and that cancels it in the engine. Knows the order of these steps; each is elsewhere.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, cast

import grpc
import grpc.aio
from google.protobuf.message import Message
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from arriero.router.answer import Answer
from arriero.router.backend import GroupView
from arriero.router.card import ModelCard
from arriero.router.choose import order
from arriero.router.conversation import TextModel
from arriero.router.groups import GroupAddress, LinkedGroups
from arriero.router.proto.arriero.v1 import inference_pb2 as pb
from arriero.router.requests import (
    OutputOptions,
    check_room,
    check_tokens,
    defaults_to_wire,
    engine_request,
    parse,
    read_messages,
    read_options,
    read_request_id,
    read_sampling,
)
from arriero.shards.errors import (
    ArrieroError,
    InvalidRequest,
    NotFound,
    Overloaded,
    Unavailable,
)
from arriero.shards.sampling import SamplingParams

__all__ = ["Gateway", "GatewayConfig", "GroupAddress"]

log = logging.getLogger(__name__)

SERVICE: str = pb.DESCRIPTOR.services_by_name["Inference"].full_name
MAX_DETAILS = 2000
"""Longest error text sent; gRPC carries it in a header, and clients bound those."""

Context = grpc.aio.ServicerContext[bytes, bytes]


@dataclass(frozen=True, kw_only=True, slots=True)
class GatewayConfig:
    """Settings of one gateway.

    Attributes:
        address: host and port to listen on; port 0 picks a free one.
        max_message_bytes: the largest request taken.
        max_calls: most calls at once; one more is refused with RESOURCE_EXHAUSTED.
        credentials: of TLS; None listens in the clear.
    """

    address: str = "127.0.0.1:0"
    max_message_bytes: int = 32 * 1024 * 1024
    max_calls: int = 10_000
    credentials: grpc.ServerCredentials | None = None


class Gateway:
    """One gateway; `start` it, tell it the groups with `set_groups`, and `stop` it."""

    def __init__(self, config: GatewayConfig) -> None:
        self._config = config
        self._groups = LinkedGroups(self._groups_changed)
        self._server: grpc.aio.Server | None = None
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]  # not in the stubs
        self._health_task: asyncio.Task[None] | None = None
        self._stopping = False

    async def start(self) -> int:
        """Listen; gives the port.

        Raises:
            OSError: the address cannot be bound.
        """
        config = self._config
        server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", config.max_message_bytes),
                ("grpc.max_send_message_length", -1),
                ("grpc.so_reuseport", 0),
                # A client whose machine is gone sends no reset; these find out within 40 s.
                ("grpc.keepalive_time_ms", 20_000),
                ("grpc.keepalive_timeout_ms", 20_000),
            ],
            maximum_concurrent_rpcs=config.max_calls,
        )
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(SERVICE, self._handlers()),)
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        names = (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, server)
        try:
            if config.credentials is None:
                port = server.add_insecure_port(config.address)
            else:
                port = server.add_secure_port(config.address, config.credentials)
        except RuntimeError as error:
            raise OSError(f"cannot listen on {config.address}: {error}") from error
        self._server = server
        await self._tell_health()
        await server.start()
        return port

    async def stop(self, grace_s: float) -> None:
        """Take no more calls, let running ones finish for `grace_s` seconds, then close."""
        self._stopping = True
        await self._tell_health()
        if self._server is not None:
            await self._server.stop(grace_s)
        await self._groups.close()
        if self._health_task is not None:
            self._health_task.cancel()

    @property
    def ready(self) -> bool:
        """Whether some group can be asked now."""
        return bool(self._groups.groups())

    async def set_groups(self, groups: Iterable[GroupAddress]) -> None:
        """Serve these groups and no others, from now on; calls on those that stay go on."""
        await self._groups.set_groups(groups)

    def _groups_changed(self) -> None:
        if self._server is not None and not self._stopping:
            self._health_task = asyncio.create_task(self._tell_health())

    async def _tell_health(self) -> None:
        ready = bool(self._groups.groups()) and not self._stopping
        status = (
            health_pb2.HealthCheckResponse.SERVING
            if ready
            else (health_pb2.HealthCheckResponse.NOT_SERVING)
        )
        await self._health.set("", status)
        await self._health.set(SERVICE, status)

    # Requests are taken as bytes and parsed here, so that malformed ones get an answer in words.
    def _handlers(self) -> dict[str, grpc.RpcMethodHandler[Any, Any]]:
        streams = {"Generate": self._generate, "Chat": self._chat}
        unaries = {
            "Tokenize": self._tokenize,
            "Detokenize": self._detokenize,
            "ListModels": self._list_models,
            "GetModel": self._get_model,
        }
        return {
            name: grpc.unary_stream_rpc_method_handler(_guarded(method))
            for name, method in streams.items()
        } | {
            name: grpc.unary_unary_rpc_method_handler(_guarded(_unary(method)))
            for name, method in unaries.items()
        }

    async def _generate(self, call: _Call, raw: bytes) -> None:
        request = parse(pb.GenerateRequest, raw)
        await call.name(request.request_id)
        text, views = self._groups.find(request.model)
        options = read_options(request.options)
        params = read_sampling(request.sampling, views[0].card)
        if request.WhichOneof("prompt") == "text":
            prompt = await _encode(text, request)
        else:
            prompt = list(request.token_ids.ids)
        await self._run(call, text, views, prompt, params, options, request.options.priority)

    async def _chat(self, call: _Call, raw: bytes) -> None:
        request = parse(pb.ChatRequest, raw)
        await call.name(request.request_id)
        text, views = self._groups.find(request.model)
        options = read_options(request.options)
        params = read_sampling(request.sampling, views[0].card)
        prompt = await _layout(text, request)
        await self._run(call, text, views, prompt, params, options, request.options.priority)

    async def _run(
        self,
        call: _Call,
        text: TextModel,
        views: Sequence[GroupView],
        prompt: list[int],
        params: SamplingParams,
        options: OutputOptions,
        priority: int,
    ) -> None:
        """Run a checked request on the best group, or on the next one while it has no output."""
        widest = max(views, key=lambda view: view.card.max_model_len)
        check_room(len(prompt), params.max_tokens, widest.card.max_model_len)
        check_tokens("prompt", prompt, widest.card)
        start = pb.Start(
            request_id=call.request_id, model=widest.model, seed=cast(int, params.seed)
        )
        if options.include_prompt_token_ids:
            start.prompt_token_ids.extend(prompt)
        answer = Answer(start, len(prompt), params.n, options, text)
        ordered = order(views, num_tokens=len(prompt) + (params.max_tokens or 1))
        for attempt, view in enumerate(ordered, 1):
            room = check_room(len(prompt), params.max_tokens, view.card.max_model_len)
            request = engine_request(
                request_id=call.request_id,
                prompt=prompt,
                params=params,
                priority=priority,
                room=room,
            )
            try:
                async with aclosing(self._groups.generate(view.group_id, request)) as steps:
                    async for outputs in steps:
                        message = answer.add(outputs)
                        if message is not None:
                            await call.context.write(message.SerializeToString())
                        if answer.finished:
                            return
                raise Unavailable("the group ended the stream before the last token")
            except (Unavailable, Overloaded) as error:
                if answer.started or attempt == len(ordered):
                    raise
                log.info("%s: group %s: %s; trying the next", call.request_id, view.group_id, error)

    async def _tokenize(self, raw: bytes) -> Message:
        request = parse(pb.TokenizeRequest, raw)
        text, views = self._groups.find(request.model)
        if request.WhichOneof("input") == "conversation":
            tokens = await _layout(text, request.conversation)
        else:
            tokens = await _encode(text, request)
        return pb.TokenizeResponse(
            token_ids=tokens, max_model_len=max(view.card.max_model_len for view in views)
        )

    async def _detokenize(self, raw: bytes) -> Message:
        request = parse(pb.DetokenizeRequest, raw)
        text, views = self._groups.find(request.model)
        check_tokens("token_ids", request.token_ids, views[0].card)
        joined = text.tokenizer.decode(request.token_ids, skip_special=request.skip_special_tokens)
        return pb.DetokenizeResponse(text=joined)

    async def _list_models(self, raw: bytes) -> Message:
        parse(pb.ListModelsRequest, raw)
        by_model: dict[str, list[GroupView]] = {}
        for view in self._groups.groups():
            by_model.setdefault(view.model, []).append(view)
        return pb.ListModelsResponse(
            models=[_model(name, views) for name, views in sorted(by_model.items())]
        )

    async def _get_model(self, raw: bytes) -> Message:
        request = parse(pb.GetModelRequest, raw)
        _, views = self._groups.find(request.model)
        return _model(views[0].model, views)


class _Call:
    """One call: its context, and the name under which it is logged."""

    __slots__ = ("context", "request_id")

    def __init__(self, context: Context) -> None:
        self.context = context
        self.request_id = ""

    async def name(self, given: str) -> None:
        """Name the call, and tell the client the name."""
        self.request_id = read_request_id(given)
        await self.context.send_initial_metadata((("x-request-id", self.request_id),))


Method = Callable[[_Call, bytes], Awaitable[Any]]


def _unary(method: Callable[[bytes], Awaitable[Message]]) -> Method:
    async def answer(call: _Call, raw: bytes) -> bytes:
        await call.name("")
        return (await method(raw)).SerializeToString()

    return answer


def _guarded(method: Method) -> Callable[[bytes, Context], Awaitable[Any]]:
    """Map errors to statuses: in words when they are ours, and else without a traceback."""

    async def run(raw: bytes, context: Context) -> Any:  # noqa: ANN401
        call = _Call(context)
        try:
            return await method(call, raw)
        except ArrieroError as error:
            code, details, trailing = _status(error)
        except Exception:
            if not call.request_id:
                call.request_id = read_request_id("")
            log.exception("request %s failed", call.request_id)
            code = grpc.StatusCode.INTERNAL
            details = f"internal error; the gateway's log has it under request {call.request_id}"
            trailing = ()
        await context.abort(code, details[:MAX_DETAILS], trailing)

    return run


def _status(
    error: ArrieroError,
) -> tuple[grpc.StatusCode, str, tuple[tuple[str, str], ...]]:
    details = str(error)
    if isinstance(error, InvalidRequest):
        return grpc.StatusCode.INVALID_ARGUMENT, details, (("arriero-field", error.field),)
    if isinstance(error, NotFound):
        return grpc.StatusCode.NOT_FOUND, details, ()
    if isinstance(error, Overloaded):
        wait = str(max(1, math.ceil(error.retry_after_s)))
        return grpc.StatusCode.RESOURCE_EXHAUSTED, details, (("retry-after", wait),)
    return grpc.StatusCode.UNAVAILABLE, details, ()


async def _encode(text: TextModel, request: pb.GenerateRequest | pb.TokenizeRequest) -> list[int]:
    if not request.text:
        raise InvalidRequest("prompt", "the prompt is empty; give `text` or `token_ids`")
    add = request.add_special_tokens if request.HasField("add_special_tokens") else True
    return await text.encode(request.text, add_special_tokens=add, trusted=request.parse_special)


async def _layout(text: TextModel, request: pb.ChatRequest | pb.Conversation) -> list[int]:
    go_on = request.continue_final_message
    given = request.HasField("add_generation_prompt")
    return await text.encode_chat(
        read_messages(request.messages),
        add_generation_prompt=request.add_generation_prompt if given else not go_on,
        continue_final_message=go_on,
    )


def _model(name: str, views: Sequence[GroupView]) -> pb.Model:
    card: ModelCard = views[0].card
    return pb.Model(
        id=name,
        digest=card.digest,
        max_model_len=max(view.card.max_model_len for view in views),
        vocab_size=card.vocab_size,
        eos_token_ids=card.eos_token_ids,
        has_chat_template=card.chat_template is not None,
        created=card.created,
        groups=[
            pb.Group(
                id=view.group_id,
                layout=view.card.layout,
                running=view.load.num_running,
                waiting=view.load.num_waiting,
            )
            for view in views
        ],
        generation_defaults=defaults_to_wire(card.generation_defaults),
    )
