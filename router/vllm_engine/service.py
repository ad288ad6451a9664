"""The service VllmEngine of a gateway: each method over the same path as the gateway's own API.

A gateway is one worker to the caller, whatever number of groups it has: admission, tenants, the
choice of a group, migration and metrics are the gateway's. Knows calls and running requests; knows
nothing of the translation of messages, which is in the modules beside this one.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from importlib.metadata import version
from typing import Any, cast

import grpc
from google.protobuf.message import Message
from smg_grpc_proto import vllm_engine_pb2 as vllm
from smg_grpc_proto.generated import common_pb2 as common

from arriero.router.backend import GroupView
from arriero.router.calls.request_notes import RequestNotes
from arriero.router.grpc_calls import GrpcCall, guard, unary
from arriero.router.inference import Inference
from arriero.router.kv_events.stream import KvEventStream
from arriero.router.requests import parse
from arriero.router.text.text_model import TextModel
from arriero.router.vllm_engine.answers import EngineAnswer
from arriero.router.vllm_engine.facts import (
    LoadMeter,
    WorkerLoad,
    load_record,
    loads_message,
    model_info,
    server_info,
)
from arriero.router.vllm_engine.kv_batches import batch_message, load_message, snapshot_messages
from arriero.router.vllm_engine.requests import inference_request
from arriero.router.vllm_engine.tokenizer_files import chunks, tokenizer_zip
from arriero.shards.errors import ArrieroError, Unavailable

FIRST_GROUP_S = 60.0
"""Seconds that a question about the model waits for the first group. A caller that gets an error at
its start registers this worker without a model, and never asks again."""
_POLL_S = 0.1
HEARTBEAT_S = 1.0
"""Seconds after which a subscriber to KV events gets the load without events."""
_UNSUPPORTED = {
    "Embed": "arriero serves models that generate text; it has no embeddings",
    "FlushCache": "use `arriero kv flush`, with the deployment's admin token",
    "StartProfile": "profilers are started on the machines of the slices",
    "StopProfile": "profilers are stopped on the machines of the slices",
}


class VllmEngine:
    """The service.

    Args:
        inference: runs requests.
        kv_events: KV events of the groups.
        model: id of the model that the worker serves; "" for the only model.
    """

    def __init__(self, inference: Inference, kv_events: KvEventStream, model: str) -> None:
        self._inference = inference
        self._kv_events = kv_events
        self._model = model
        self._running: dict[tuple[str, str], list[asyncio.Timeout]] = {}  # by tenant and id
        self._meter = LoadMeter()
        self._started_s = time.time()
        self._last_request_s = 0.0
        self._known: tuple[TextModel, list[GroupView]] | None = None
        self._zips: dict[str, bytes] = {}  # by text key

    def handlers(self) -> dict[str, grpc.RpcMethodHandler[Any, Any]]:
        """The handler of each method."""
        streams = {
            "Generate": self._generate,
            "GetTokenizer": self._get_tokenizer,
            "SubscribeKvEvents": self._subscribe,
        }
        unaries: Mapping[str, Callable[[bytes], Awaitable[Message]]] = {
            "HealthCheck": self._health_check,
            "GetModelInfo": self._get_model_info,
            "GetServerInfo": self._get_server_info,
            "GetLoads": self._get_loads,
        }
        methods = {name: unary(method) for name, method in unaries.items()}
        methods["Abort"] = self._abort
        guarded = {
            name: guard(self._inference.admission, method)
            for name, method in (streams | methods).items()
        }
        return {
            name: grpc.unary_stream_rpc_method_handler(method)
            if name in streams
            else grpc.unary_unary_rpc_method_handler(method)
            for name, method in guarded.items()
        } | {
            name: grpc.unary_unary_rpc_method_handler(_refusal(name, words))
            for name, words in _UNSUPPORTED.items()
        }

    async def _generate(self, call: GrpcCall, raw: bytes) -> None:
        request = parse(vllm.GenerateRequest, raw)
        answer = EngineAnswer(request)
        self._last_request_s = time.time()
        scope = asyncio.timeout(None)
        try:
            async with scope:
                with self._abortable((call.tenant.name, request.request_id), scope):
                    await call.name(request.request_id)
                    await self._answer(call, request, answer)
        except TimeoutError:
            if not scope.expired():
                raise
            await _write(call, answer.abort())

    async def _answer(
        self, call: GrpcCall, request: vllm.GenerateRequest, answer: EngineAnswer
    ) -> None:
        """Run a request and send its messages."""
        notes = RequestNotes()
        with self._inference.metrics.failures():
            _, views = await self._inference.find(self._model)
            longest = max(view.card.max_model_len for view in views)
            ours = inference_request(request, self._model, longest)
        stream = await self._inference.generate(ours, call.caller(), notes, fit_output=True)
        call.add_notes(notes)
        async with aclosing(stream) as messages:
            async for message in messages:
                await _write(call, answer.add(message))

    @contextmanager
    def _abortable(self, key: tuple[str, str], scope: asyncio.Timeout) -> Iterator[None]:
        """Let `Abort` end the scope while the block runs; several requests may share an id."""
        scopes = self._running.setdefault(key, [])
        scopes.append(scope)
        try:
            yield
        finally:
            scopes.remove(scope)
            if not scopes:
                self._running.pop(key, None)

    async def _abort(self, call: GrpcCall, raw: bytes) -> bytes:
        request = parse(vllm.AbortRequest, raw)
        await call.name("")
        for request_id in dict.fromkeys(request.request_ids):
            for scope in self._running.get((call.tenant.name, request_id), ()):
                if scope.when() is None:  # not aborted before
                    scope.reschedule(0.0)
        answer: bytes = vllm.AbortResponse().SerializeToString()
        return answer

    async def _health_check(self, raw: bytes) -> Message:
        parse(vllm.HealthCheckRequest, raw)
        try:
            self._inference.groups.find(self._model)
        except ArrieroError as error:
            model = self._model or self._inference.groups.only
            asleep = model in self._inference.may_sleep
            text = "" if asleep else str(error)
            return cast(Message, vllm.HealthCheckResponse(healthy=asleep, message=text))
        return cast(Message, vllm.HealthCheckResponse(healthy=True))

    async def _get_model_info(self, raw: bytes) -> Message:
        parse(vllm.GetModelInfoRequest, raw)
        return cast(Message, model_info(*await self._facts()))

    async def _get_server_info(self, raw: bytes) -> Message:
        parse(vllm.GetServerInfoRequest, raw)
        _, views = await self._facts()
        active = sum(map(len, self._running.values()))
        info = server_info(views, active, self._started_s, self._last_request_s)
        return cast(Message, info)

    async def _get_loads(self, raw: bytes) -> Message:
        parse(vllm.GetLoadsRequest, raw)
        return cast(Message, loads_message(self._load(), version("arriero")))

    async def _get_tokenizer(self, call: GrpcCall, raw: bytes) -> None:
        parse(common.GetTokenizerRequest, raw)
        await call.name("")
        text, views = await self._facts()
        if text.key not in self._zips:
            newest = max(views, key=lambda view: view.card.created)
            self._zips = {text.key: await asyncio.to_thread(tokenizer_zip, newest.card)}
        await _write(call, chunks(self._zips[text.key]))

    async def _subscribe(self, call: GrpcCall, raw: bytes) -> None:
        """Send KV events until the subscriber leaves, or the gateway stops.

        The events hold token ids of every tenant's prompts, so the tenant must be one that may read
        the metrics, which show every tenant too.
        """
        request = parse(common.SubscribeKvEventsRequest, raw)
        self._inference.admission.check_metrics(str(call.metadata.get("authorization", "")))
        await call.name("")
        stream = self._kv_events
        following, sample = request.start_sequence_number, 0
        early = request.load_records_before_first_batch
        while not stream.closed:
            batches = stream.since(following) if following else None
            if batches is None:
                messages = snapshot_messages(stream)
            else:
                messages = [batch_message(batch) for batch in batches]
            following = stream.number + 1
            load_only = not messages
            if load_only and (early or stream.number):
                messages = [load_message(stream.number, common.EngineLoad())]
            for message in messages:
                sample += 1
                message.load.CopyFrom(load_record(self._load(), sample, load_only=load_only))
            await _write(call, messages)
            await stream.wait(following, HEARTBEAT_S)

    async def _facts(self) -> tuple[TextModel, list[GroupView]]:
        """The model, as its groups are now or were last; waits for the first group.

        Raises:
            Unavailable: no group came in time.
        """
        deadline_s = time.monotonic() + FIRST_GROUP_S
        while True:
            try:
                self._known = self._inference.groups.find(self._model)
                return self._known
            except Unavailable:
                if self._known is not None:
                    return self._known
                if (self._model or self._inference.groups.only) in self._inference.may_sleep:
                    self._known = await self._inference.find(self._model)  # wakes the model
                    return self._known
                if time.monotonic() > deadline_s:
                    raise
            await asyncio.sleep(_POLL_S)

    def _load(self) -> WorkerLoad:
        model = self._model or self._inference.groups.only
        views: Sequence[GroupView] = [
            view for view in self._inference.groups.groups() if view.model == model
        ]
        waiting, _ = self._inference.admission.demand().get(model, (0, 0.0))
        return self._meter.measure(views, waiting, time.monotonic())


async def _write(call: GrpcCall, messages: Iterable[Message]) -> None:
    for message in messages:
        await call.context.write(message.SerializeToString())


def _refusal(name: str, words: str) -> Callable[[bytes, Any], Awaitable[bytes]]:
    async def refuse(raw: bytes, context: Any) -> bytes:  # noqa: ANN401
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, f"{name} is not supported: {words}")
        return b""

    return refuse
