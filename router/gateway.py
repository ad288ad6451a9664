"""The gateway: a gRPC server and an HTTP server for clients.

An early end of a call (by the client, a deadline, a stop string or an error) closes the call's
iterator, and thereby cancels the request in the engine. Knows servers and their life; knows nothing
of the work of a call, which is in `Inference`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Container, Iterable, Mapping
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

from arriero.router.calls.request_notes import RequestNotes
from arriero.router.grpc_calls import GrpcCall, guard, unary
from arriero.router.grpc_options import SERVER_OPTIONS
from arriero.router.http.app import create_app
from arriero.router.http.responses_api.store import Archive, ResponseStore
from arriero.router.http.server import HttpServer
from arriero.router.inference import LOST_S, Inference
from arriero.router.observability.metrics import Metrics
from arriero.router.observability.model_groups import ModelGroups
from arriero.router.observability.observer import RequestObserver
from arriero.router.observability.request_log import RequestLog, RequestLogConfig
from arriero.router.observability.tracing import Tracing, TracingConfig
from arriero.router.proto.arriero.v1 import inference_pb2 as pb
from arriero.router.requests import parse
from arriero.router.routing.choose import room
from arriero.router.routing.linked_groups import GroupAddress, LinkedGroups
from arriero.router.tenants.admission_controller import AdmissionController
from arriero.router.tenants.keys import KeyFile
from arriero.router.tenants.tenant import QueueLimits, Tenant
from arriero.router.tls import TlsFiles

__all__ = ["Gateway", "GatewayConfig", "GroupAddress"]

SERVICE: str = pb.DESCRIPTOR.services_by_name["Inference"].full_name


@dataclass(frozen=True, kw_only=True, slots=True)
class GatewayConfig:
    """Settings of one gateway.

    Attributes:
        address: host and port of gRPC; port 0 picks a free port.
        http_address: host and port of HTTP; None for no HTTP.
        cors: origins of web pages that may call HTTP from a browser; "*" for any.
        max_message_bytes: most bytes of a request.
        max_calls: most calls at once; further calls are refused with RESOURCE_EXHAUSTED.
        tls: of both listeners; with a `ca`, clients must show a certificate. None for no TLS.
        link_tls: of the links to leaders; both ends show a certificate for `tls.LINK_NAME`. None
            for no TLS.
        keys: file of the callers' API keys; None for no keys.
        tenants: tenants with limits.
        limits: of each model's queue.
        num_gateways: gateways of the deployment; each enforces its share of every limit.
        tracing: destination of spans; None for no spans.
        request_log: destination of a line for each request; None for no lines.
        models: ids of the deployment's models. A request for a listed model without a group fails
            as unavailable, for another model as not found.
        lost_s: seconds that a request waits for another group after the loss of its group.
        wake_s: models that have no group while idle, with the seconds that a request waits for
            the first group.
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
    """A gateway: `start`, `set_groups` after each change of the groups, `stop`.

    Args:
        config: settings.
        on_lost: called on the event loop when a group is lost, with the group's id and the cause.
        on_change: called on the event loop when `linked` may have changed.
        tracing: makes the spans; None for a tracing of `config`.
        archive: keeps the responses of `/v1/responses` for all gateways; None keeps each gateway's
            in its own memory.

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
        archive: Archive | None = None,
    ) -> None:
        self._config = config
        self._responses = ResponseStore(archive)
        self._on_change = on_change
        link_tls = None if config.link_tls is None else config.link_tls.link_client("link_tls")
        self._groups = LinkedGroups(self._groups_changed, config.models, link_tls, on_lost=on_lost)
        self._credentials = None if config.tls is None else config.tls.server("tls")
        admission = self._admission = AdmissionController(
            config.limits,
            {tenant.name: tenant.share(config.num_gateways) for tenant in config.tenants},
            None if config.keys is None else KeyFile(config.keys),
            self._room,
        )
        self._model_groups: Mapping[str, ModelGroups] = {}
        metrics = Metrics(
            self._groups.groups, admission.waiting, self._groups.models, lambda: self._model_groups
        )
        self._tracing = tracing or Tracing.from_config("arriero-gateway", config.tracing)
        self._log = None if config.request_log is None else RequestLog(config.request_log)
        observer = RequestObserver(metrics, self._tracing, self._log)
        self.inference = Inference(
            self._groups, observer, admission, lost_s=config.lost_s, wake_s=config.wake_s
        )
        self._server: grpc.aio.Server | None = None
        self._http: HttpServer | None = None
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]  # not in the stubs
        self._health_task: asyncio.Task[None] | None = None
        self._stopping = False

    async def start(self) -> int:
        """Listen; returns the port of gRPC.

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
        await self._update_health()
        await server.start()
        if self._http is not None:
            await self._http.start()
        self._admission.start()
        return port

    @property
    def http_port(self) -> int | None:
        """The port of HTTP; None while HTTP does not listen."""
        return None if self._http is None else self._http.port

    def app(self) -> FastAPI:
        """The HTTP application of this gateway, for another server, such as Ray Serve, to mount."""
        return create_app(
            self.inference,
            self._responses,
            max_body_bytes=self._config.max_message_bytes,
            cors=self._config.cors,
        )

    async def stop(self, grace_s: float) -> None:
        """Refuse new calls, let running calls finish for `grace_s` seconds, then close."""
        self._stopping = True
        await self._update_health()
        await asyncio.gather(
            *([] if self._server is None else [self._server.stop(grace_s)]),
            *([] if self._http is None else [self._http.stop(grace_s)]),
        )
        await self._responses.close()
        await self.inference.close()
        await self._groups.close()
        self._admission.stop()
        if self._tracing is not None:
            await asyncio.to_thread(self._tracing.close)
        if self._log is not None:
            self._log.close()
        if self._health_task is not None:
            self._health_task.cancel()

    @property
    def ready(self) -> bool:
        """Whether a request can be served: a group is linked, or a model may sleep."""
        return bool(self._groups.groups() or self._config.wake_s)

    async def set_groups(
        self, groups: Iterable[GroupAddress], *, fenced: Container[str] | None = None
    ) -> None:
        """Serve exactly `groups` from now on; see `LinkedGroups.set_groups`."""
        await self._groups.set_groups(groups, fenced=fenced)

    def set_model_groups(self, counts: Mapping[str, ModelGroups]) -> None:
        """Export these numbers of groups, by model, from now on."""
        self._model_groups = counts

    def linked(self) -> tuple[str, ...]:
        """Ids of the groups that can take requests now."""
        return tuple(view.group_id for view in self._groups.groups())

    def faults(self) -> dict[str, str]:
        """By group, why this gateway cannot serve the group's model."""
        return self._groups.faults()

    def reload(
        self,
        *,
        tenants: Iterable[Tenant],
        limits: QueueLimits,
        lost_s: float,
        wake_s: Mapping[str, float],
    ) -> None:
        """Use other settings for later requests; see `GatewayConfig`."""
        shares = {tenant.name: tenant.share(self._config.num_gateways) for tenant in tenants}
        self._admission.reload(limits, shares)
        self._config = replace(self._config, wake_s=wake_s)
        self.inference.reload(lost_s=lost_s, wake_s=wake_s)

    def demand(self) -> dict[str, tuple[int, float]]:
        """By model, number of waiting requests and the seconds until a new request starts."""
        waiting = self._admission.demand()
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
            self._health_task = asyncio.create_task(self._update_health())

    async def _update_health(self) -> None:
        ready = self.ready and not self._stopping
        status = (
            health_pb2.HealthCheckResponse.SERVING
            if ready
            else (health_pb2.HealthCheckResponse.NOT_SERVING)
        )
        await self._health.set("", status)
        await self._health.set(SERVICE, status)

    # The handlers parse the bytes of a request, so a malformed request gets an error text.
    def _handlers(self) -> dict[str, grpc.RpcMethodHandler[Any, Any]]:
        streams = {"Generate": self._generate, "Chat": self._chat, "Resume": self._resume}
        unaries = {
            "Tokenize": self._tokenize,
            "Detokenize": self._detokenize,
            "ListModels": self._list_models,
            "GetModel": self._get_model,
        }
        guarded = partial(guard, self._admission)
        return {
            name: grpc.unary_stream_rpc_method_handler(guarded(method))
            for name, method in streams.items()
        } | {
            name: grpc.unary_unary_rpc_method_handler(guarded(unary(method)))
            for name, method in unaries.items()
        }

    async def _generate(self, call: GrpcCall, raw: bytes) -> None:
        request = parse(pb.GenerateRequest, raw)
        await call.name(request.request_id)
        notes = RequestNotes()
        stream = await self.inference.generate(request, call.caller(), notes)
        call.add_notes(notes)
        await call.write(stream)

    async def _chat(self, call: GrpcCall, raw: bytes) -> None:
        request = parse(pb.ChatRequest, raw)
        await call.name(request.request_id)
        notes = RequestNotes()
        stream = await self.inference.chat(request, call.caller(), notes)
        call.add_notes(notes)
        await call.write(stream)

    async def _resume(self, call: GrpcCall, raw: bytes) -> None:
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
