"""The gateway: the servers that clients talk to, gRPC here and HTTP beside it.

Whatever ends a call early (the client, its deadline, a stop string, an error) closes the run's
iterator, and that cancels it in the engine. Knows connections and statuses; what a call does is
`Inference`'s.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, Container, Iterable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from fastapi import FastAPI
from google.protobuf.message import Message
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from arriero.router.grpc_options import SERVER_OPTIONS
from arriero.router.http.app import create_app
from arriero.router.http.server import HttpServer
from arriero.router.inference import LOST_S, Aside, Inference, Stream
from arriero.router.observability.metrics import Metrics
from arriero.router.observability.observer import RequestObserver
from arriero.router.observability.request_log import RequestLog, RequestLogConfig
from arriero.router.observability.tracing import Tracing, TracingConfig
from arriero.router.proto.arriero.v1 import inference_pb2 as pb
from arriero.router.requests import parse, read_request_id
from arriero.router.response import TextDelta
from arriero.router.routing.choose import room
from arriero.router.routing.linked_groups import GroupAddress, LinkedGroups
from arriero.router.tenants.admission_controller import AdmissionController, Caller, is_set
from arriero.router.tenants.keys import KeyFile
from arriero.router.tenants.tenant import QueueLimits, Tenant
from arriero.router.text.constraints import described
from arriero.router.tls import TlsFiles
from arriero.shards.errors import (
    ArrieroError,
    InvalidRequest,
    NotFound,
    Overloaded,
    PermissionDenied,
    Unauthenticated,
)

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
        address: host and port of gRPC to listen on; port 0 picks a free one.
        http_address: the same for HTTP; None for no HTTP.
        cors: origins of the web pages that may call HTTP from a browser; "*" for any.
        max_message_bytes: the largest request taken.
        max_calls: most calls at once; one more is refused with RESOURCE_EXHAUSTED.
        tls: of both listeners; with its `ca`, clients must show a certificate. None listens in
            the clear.
        link_tls: of the links to leaders, both ends of which show a certificate for
            `tls.LINK_NAME`; None for links in the clear.
        keys: file of the callers' API keys; None asks for none.
        tenants: those with limits.
        limits: of each model's queue.
        num_gateways: gateways of the deployment; each enforces its part of every limit.
        tracing: where spans go; None makes none.
        request_log: where each request's line goes; None writes none.
        models: ids of the deployment's models. One of them without a group is unavailable; any
            other is not found.
        lost_s: how long a request whose group was lost waits for another.
        wake_s: models that have no group while nobody asks for them; the first request waits so
            many seconds for one.
    """

    address: str = "127.0.0.1:0"
    http_address: str | None = None
    cors: tuple[str, ...] = ()
    max_message_bytes: int = 32 * 1024 * 1024
    max_calls: int = 10_000
    tls: TlsFiles | None = None
    link_tls: TlsFiles | None = None
    keys: Path | None = None
    tenants: tuple[Tenant, ...] = ()
    limits: QueueLimits = field(default_factory=QueueLimits)
    num_gateways: int = 1
    tracing: TracingConfig | None = None
    request_log: RequestLogConfig | None = None
    models: tuple[str, ...] = ()
    lost_s: float = LOST_S
    wake_s: Mapping[str, float] = field(default_factory=dict)


class Gateway:
    """One gateway; `start` it, tell it the groups with `set_groups`, and `stop` it.

    Args:
        config: its settings.
        on_lost: called on the event loop when a group is lost: its id, and the cause.
        on_change: called on the event loop when `linked` may have changed.
        tracing: makes its spans; None leaves that to `config`.

    Raises:
        SpecError: a file of keys or certificates cannot be used.
        OSError: the log cannot be written.
    """

    def __init__(
        self,
        config: GatewayConfig,
        on_lost: Callable[[str, str], None] = lambda group_id, cause: None,
        *,
        on_change: Callable[[], None] = lambda: None,
        tracing: Tracing | None = None,
    ) -> None:
        self._config = config
        self._on_change = on_change
        link_tls = None if config.link_tls is None else config.link_tls.link_client("link_tls")
        self._groups = LinkedGroups(self._groups_changed, config.models, link_tls, on_lost=on_lost)
        self._credentials = None if config.tls is None else config.tls.server("tls")
        door = self._door = AdmissionController(
            config.limits,
            {one.name: one.share(config.num_gateways) for one in config.tenants},
            None if config.keys is None else KeyFile(config.keys),
            self._room,
        )
        metrics = Metrics(self._groups.groups, door.waiting)
        self._tracing = tracing or Tracing.from_config("arriero-gateway", config.tracing)
        self._log = None if config.request_log is None else RequestLog(config.request_log)
        sight = RequestObserver(metrics, self._tracing, self._log)
        self.inference = Inference(
            self._groups, sight, door, lost_s=config.lost_s, wake_s=config.wake_s
        )
        self._server: grpc.aio.Server | None = None
        self._http: HttpServer | None = None
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]  # not in the stubs
        self._health_task: asyncio.Task[None] | None = None
        self._stopping = False

    async def start(self) -> int:
        """Listen; gives the port of gRPC.

        Raises:
            OSError: an address cannot be bound.
        """
        config = self._config
        if config.http_address is not None:
            app = self.app()
            self._http = HttpServer(
                app, config.http_address, max_calls=config.max_calls, tls=config.tls
            )
            self._http.bind()
        server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", config.max_message_bytes),
                ("grpc.max_send_message_length", -1),
                *SERVER_OPTIONS,
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
            if self._credentials is None:
                port = server.add_insecure_port(config.address)
            else:
                port = server.add_secure_port(config.address, self._credentials)
        except RuntimeError as error:
            if self._http is not None:
                await self._http.stop(0)
            raise OSError(f"cannot listen on {config.address}: {error}") from error
        self._server = server
        await self._tell_health()
        await server.start()
        if self._http is not None:
            await self._http.start()
        self._door.start()
        return port

    @property
    def http_port(self) -> int | None:
        """The port of HTTP, once it listens."""
        return None if self._http is None else self._http.port

    def app(self) -> FastAPI:
        """The HTTP application over this gateway, for other servers (Ray Serve's) to mount."""
        return create_app(
            self.inference,
            max_body_bytes=self._config.max_message_bytes,
            cors=self._config.cors,
        )

    async def stop(self, grace_s: float) -> None:
        """Take no more calls, let running ones finish for `grace_s` seconds, then close."""
        self._stopping = True
        await self._tell_health()
        await asyncio.gather(
            *([] if self._server is None else [self._server.stop(grace_s)]),
            *([] if self._http is None else [self._http.stop(grace_s)]),
        )
        await self.inference.close()
        await self._groups.close()
        self._door.stop()
        if self._tracing is not None:
            await asyncio.to_thread(self._tracing.close)
        if self._log is not None:
            self._log.close()
        if self._health_task is not None:
            self._health_task.cancel()

    @property
    def ready(self) -> bool:
        """Whether some group can be asked now."""
        return bool(self._groups.groups() or self._config.wake_s)

    async def set_groups(
        self, groups: Iterable[GroupAddress], *, fenced: Container[str] | None = None
    ) -> None:
        """Serve these groups from now on; see `LinkedGroups.set_groups`."""
        await self._groups.set_groups(groups, fenced=fenced)

    def linked(self) -> tuple[str, ...]:
        """Ids of the groups that requests can be passed to now."""
        return tuple(view.group_id for view in self._groups.groups())

    def faults(self) -> dict[str, str]:
        """By group, why this gateway cannot speak for its model."""
        return self._groups.faults()

    def reload(
        self,
        *,
        tenants: Iterable[Tenant],
        limits: QueueLimits,
        lost_s: float,
        wake_s: Mapping[str, float],
    ) -> None:
        """Take other settings, from the next request on; see `GatewayConfig`."""
        shares = {one.name: one.share(self._config.num_gateways) for one in tenants}
        self._door.reload(limits, shares)
        self._config = replace(self._config, wake_s=wake_s)
        self.inference.reload(lost_s=lost_s, wake_s=wake_s)

    def demand(self) -> dict[str, tuple[int, float]]:
        """Requests that wait, by model, and how long one that came now would; where any do."""
        waiting = self._door.demand()
        for model, count in self.inference.asleep().items():
            before = waiting.get(model, (0, 0.0))
            waiting[model] = (before[0] + count, before[1])
        return waiting

    def _room(self, model: str) -> int:
        views = (view for view in self._groups.groups() if view.model == model)
        return room(views, num_gateways=self._config.num_gateways)

    def _groups_changed(self) -> None:
        self._on_change()
        if self._server is not None and not self._stopping:
            self._health_task = asyncio.create_task(self._tell_health())

    async def _tell_health(self) -> None:
        ready = self.ready and not self._stopping
        status = (
            health_pb2.HealthCheckResponse.SERVING
            if ready
            else (health_pb2.HealthCheckResponse.NOT_SERVING)
        )
        await self._health.set("", status)
        await self._health.set(SERVICE, status)

    # Requests are taken as bytes and parsed here, so that malformed ones get an answer in words.
    def _handlers(self) -> dict[str, grpc.RpcMethodHandler[Any, Any]]:
        streams = {"Generate": self._generate, "Chat": self._chat, "Resume": self._resume}
        unaries = {
            "Tokenize": self._tokenize,
            "Detokenize": self._detokenize,
            "ListModels": self._list_models,
            "GetModel": self._get_model,
        }
        guarded = partial(_guarded, self._door)
        return {
            name: grpc.unary_stream_rpc_method_handler(guarded(method))
            for name, method in streams.items()
        } | {
            name: grpc.unary_unary_rpc_method_handler(guarded(_unary(method)))
            for name, method in unaries.items()
        }

    async def _generate(self, call: _Call, raw: bytes) -> None:
        request = parse(pb.GenerateRequest, raw)
        await call.name(request.request_id)
        aside = Aside()
        stream = await self.inference.generate(request, call.caller(), aside)
        call.note(aside)
        await call.write(stream)

    async def _chat(self, call: _Call, raw: bytes) -> None:
        request = parse(pb.ChatRequest, raw)
        await call.name(request.request_id)
        aside = Aside()
        stream = await self.inference.chat(request, call.caller(), aside)
        call.note(aside)
        await call.write(stream)

    async def _resume(self, call: _Call, raw: bytes) -> None:
        request = parse(pb.ResumeRequest, raw)
        await call.name(request.request_id)
        await call.write(self.inference.resume(request, call.caller()))

    async def _tokenize(self, raw: bytes) -> Message:
        return await self.inference.tokenize(parse(pb.TokenizeRequest, raw))

    async def _detokenize(self, raw: bytes) -> Message:
        return await self.inference.detokenize(parse(pb.DetokenizeRequest, raw))

    async def _list_models(self, raw: bytes) -> Message:
        parse(pb.ListModelsRequest, raw)
        return pb.ListModelsResponse(models=self.inference.models())

    async def _get_model(self, raw: bytes) -> Message:
        return self.inference.model(parse(pb.GetModelRequest, raw).model)


class _Call:
    """One call: its context, whose it is, and the name under which it is logged."""

    __slots__ = ("context", "metadata", "request_id", "tenant")

    def __init__(self, context: Context, door: AdmissionController) -> None:
        self.context = context
        self.request_id = ""
        self.metadata = dict(context.invocation_metadata() or ())
        self.tenant = door.tenant(str(self.metadata.get("authorization", "")))

    def caller(self) -> Caller:
        """Who makes it."""
        left_s = self.context.time_remaining()
        return Caller(
            request_id=self.request_id,
            tenant=self.tenant,
            deadline_s=None if left_s is None else time.monotonic() + left_s,
            traceparent=str(self.metadata.get("traceparent", "")),
            strict_schema=is_set(str(self.metadata.get("x-strict-schema", ""))),
        )

    async def name(self, given: str) -> None:
        """Name the call, and tell the client the name."""
        self.request_id = read_request_id(given)
        await self.context.send_initial_metadata((("x-request-id", self.request_id),))

    def note(self, aside: Aside) -> None:
        """Tell the client what of its schema is not enforced."""
        if aside.not_enforced:
            entry = ("x-schema-not-enforced", described(aside.not_enforced))
            self.context.set_trailing_metadata((entry,))

    async def write(self, stream: Stream) -> None:
        """Run a stream and send what it gives."""
        async with aclosing(stream) as messages:
            async for message in messages:
                wired = message.to_wire() if isinstance(message, TextDelta) else message
                await self.context.write(wired.SerializeToString())


Method = Callable[[_Call, bytes], Awaitable[Any]]


def _unary(method: Callable[[bytes], Awaitable[Message]]) -> Method:
    async def answer(call: _Call, raw: bytes) -> bytes:
        await call.name("")
        return (await method(raw)).SerializeToString()

    return answer


def _guarded(
    door: AdmissionController, method: Method
) -> Callable[[bytes, Context], Awaitable[Any]]:
    """Map errors to statuses: in words when they are ours, and else without a traceback."""

    async def run(raw: bytes, context: Context) -> Any:  # noqa: ANN401
        try:
            return await answer(raw, context)
        except grpc.aio.InternalError:  # of whatever was being sent: the client is gone
            raise asyncio.CancelledError from None

    async def answer(raw: bytes, context: Context) -> Any:  # noqa: ANN401
        request_id = ""
        try:
            call = _Call(context, door)
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
            details = f"internal error; the gateway's log has it under request {request_id}"
            trailing = ()
        await context.abort(code, details[:MAX_DETAILS], trailing)

    return run


def _status(
    error: ArrieroError,
) -> tuple[grpc.StatusCode, str, tuple[tuple[str, str], ...]]:
    details = str(error)
    if isinstance(error, InvalidRequest):
        trailing = (("arriero-field", error.field), ("arriero-code", error.code))
        return grpc.StatusCode.INVALID_ARGUMENT, details, trailing
    if isinstance(error, NotFound):
        return grpc.StatusCode.NOT_FOUND, details, ()
    if isinstance(error, Unauthenticated):
        return grpc.StatusCode.UNAUTHENTICATED, details, ()
    if isinstance(error, PermissionDenied):
        return grpc.StatusCode.PERMISSION_DENIED, details, ()
    if isinstance(error, Overloaded):
        wait = str(max(1, math.ceil(error.retry_after_s)))
        return grpc.StatusCode.RESOURCE_EXHAUSTED, details, (("retry-after", wait),)
    return grpc.StatusCode.UNAVAILABLE, details, ()
