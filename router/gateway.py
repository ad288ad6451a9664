"""The gateway: a gRPC server and an HTTP server for clients.

Knows servers and their life; knows nothing of the methods of gRPC, which are in `InferenceService`,
or of the work of a call, which is in `Inference`.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import replace

import grpc
import grpc.aio
from fastapi import FastAPI
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from arriero.router import vllm_engine
from arriero.router.batches.spool import Spool
from arriero.router.batches.worker import BatchWorker
from arriero.router.gateway_config import GatewayConfig
from arriero.router.grpc_options import SERVER_OPTIONS
from arriero.router.grpc_service import SERVICE, InferenceService
from arriero.router.guards.guards import Guards
from arriero.router.guards.injections import ScoreTexts
from arriero.router.http.app import create_app, create_local_app
from arriero.router.http.batches_api.local_calls import LocalCalls
from arriero.router.http.console.routes import ReadCluster
from arriero.router.http.development import Develop
from arriero.router.http.lora_adapters import ChangeAdapter
from arriero.router.http.responses_api.store import Archive, ResponseStore
from arriero.router.http.resumable_answers import ResumableAnswers
from arriero.router.http.server import HttpServer
from arriero.router.inference import Inference
from arriero.router.kv_events.stream import KvEventStream
from arriero.router.kv_events.zmq_publisher import ZmqPublisher
from arriero.router.observability.metrics import Metrics
from arriero.router.observability.model_groups import ModelGroups
from arriero.router.observability.observer import RequestObserver
from arriero.router.observability.otlp_metrics import OtlpMetrics
from arriero.router.observability.request_log import RequestLog
from arriero.router.observability.tracing import Tracing
from arriero.router.routing.choose import room
from arriero.router.routing.linked_groups import GroupAddress, LinkedGroups
from arriero.router.tenants.admission_controller import AdmissionController
from arriero.router.tenants.day_budgets import DayBudgets
from arriero.router.tenants.keys import KeyFile
from arriero.router.tenants.tenant import QueueLimits, Tenant

__all__ = ["Gateway", "GatewayConfig", "GroupAddress"]


class Gateway:
    """A gateway: `start`, `set_groups` after each change of the groups, `stop`.

    Args:
        config: settings.
        on_lost: called on the event loop when a group is lost, with the group's id and the cause.
        on_change: called on the event loop when `linked` may have changed.
        tracing: makes the spans; None for a tracing of `config`.
        archive: keeps the responses of `/v1/responses` and what resumable streams need, for all
            gateways; None keeps each gateway's in its own memory.
        change_adapter: changes the adapters of the deployment; None refuses changes.
        develop: changes pauses and weights of the deployment; None refuses changes.
        read_cluster: reads the state of the cluster for the console; None refuses reads.
        score_texts: Prompt Guard of the deployment; None for none.

    Raises:
        SpecError: a file of keys or certificates cannot be used, or the package for
            `vllm_engine` is missing.
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
        change_adapter: ChangeAdapter | None = None,
        develop: Develop | None = None,
        read_cluster: ReadCluster | None = None,
        score_texts: ScoreTexts | None = None,
    ) -> None:
        self._config, self._change_adapter, self._develop = config, change_adapter, develop
        self._read_cluster = read_cluster
        self._responses = ResponseStore(archive)
        self._on_change = on_change
        link_tls = None if config.link_tls is None else config.link_tls.link_client("link_tls")
        engine = None if config.vllm_engine is None else vllm_engine.service_class()
        tells = engine is not None or config.kv_events is not None
        kv_events = self._kv_events = KvEventStream() if tells else None
        self._groups = LinkedGroups(
            self._groups_changed, config.models, link_tls, on_lost=on_lost, kv_events=kv_events
        )
        self._credentials = None if config.tls is None else config.tls.server("tls")
        admission = self._admission = AdmissionController(
            config.limits,
            {tenant.name: tenant.share(config.num_gateways) for tenant in config.tenants},
            None if config.keys is None else KeyFile(config.keys),
            self._room,
            self._num_groups,
        )
        self._model_groups: Mapping[str, ModelGroups] = {}
        metrics = Metrics(
            self._groups.groups, admission.waiting, self._groups.models, lambda: self._model_groups
        )
        self._tracing = tracing or Tracing.from_config("arriero-gateway", config.tracing)
        self._log = None if config.request_log is None else RequestLog(config.request_log)
        instance = secrets.token_hex(8)
        self._otlp = OtlpMetrics.from_config(config.otlp_metrics, metrics.collect, instance)
        observer = RequestObserver(metrics, self._tracing, self._log)
        self.inference = Inference(
            self._groups, observer, admission, lost_s=config.lost_s, wake_s=config.wake_s
        )
        self._guards = self.inference.protection = Guards(self.inference, config.guard, score_texts)
        self._service = InferenceService(self.inference, self._guards, config.max_calls)
        self._services = {SERVICE: self._service.handlers()}
        self._kv_publisher: ZmqPublisher | None = None
        if kv_events is not None and engine is not None:
            worker = engine(self.inference, kv_events, config.vllm_engine or "")
            self._services[vllm_engine.SERVICE] = worker.handlers()
        if kv_events is not None and config.kv_events is not None:
            self._kv_publisher = ZmqPublisher(config.kv_events, kv_events)
        self._resumable = ResumableAnswers(self.inference, archive, config.resumable_s)
        self._spool = None if config.batches is None else Spool(config.batches)
        self._batch_worker = None if self._spool is None else self._make_batch_worker(self._spool)
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
            self._http = HttpServer(
                self.app(), config.http_address, max_calls=config.max_calls, tls=config.tls
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
        for name, handlers in self._services.items():
            handler = grpc.method_handlers_generic_handler(name, handlers)
            server.add_generic_rpc_handlers((handler,))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        names = (*self._services, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, server)
        try:
            if self._kv_publisher is not None:
                self._kv_publisher.start()
            if self._credentials is None:
                port = server.add_insecure_port(config.address)
            else:
                port = server.add_secure_port(config.address, self._credentials)
        except (RuntimeError, OSError) as error:
            if self._http is not None:
                await self._http.stop(0)
            if self._kv_publisher is not None:
                await self._kv_publisher.stop()
            if isinstance(error, OSError):
                raise
            raise OSError(f"cannot listen on {config.address}: {error}") from error
        self._server = server
        await self._update_health()
        await server.start()
        if self._http is not None:
            await self._http.start()
        self._admission.start()
        if self._otlp is not None:
            self._otlp.start()
        if self._batch_worker is not None:
            self._batch_worker.start()
        return port

    @property
    def http_port(self) -> int | None:
        """The port of HTTP; None while HTTP does not listen."""
        return None if self._http is None else self._http.port

    @property
    def kv_addresses(self) -> tuple[str, str]:
        """Addresses of the sockets for KV events and for their replay; "" for a missing socket."""
        publisher = self._kv_publisher
        return ("", "") if publisher is None else (publisher.publish, publisher.replay)

    def app(self) -> FastAPI:
        """The HTTP application of this gateway, for another server, such as Ray Serve, to mount."""
        return create_app(
            self.inference,
            self._responses,
            self._resumable,
            max_body_bytes=self._config.max_message_bytes,
            cors=self._config.cors,
            hosted_tools=self._config.hosted_tools,
            spool=self._spool,
            change_adapter=self._change_adapter,
            develop=self._develop,
            guards=self._guards,
            console=self._config.console,
            read_cluster=self._read_cluster,
        )

    def _make_batch_worker(self, spool: Spool) -> BatchWorker:
        app = create_local_app(
            self.inference, self._responses, self._resumable, self._config.hosted_tools
        )
        calls = LocalCalls(app, self._admission)
        return BatchWorker(spool, calls, max_line_bytes=self._config.max_message_bytes)

    async def stop(self, grace_s: float) -> None:
        """Refuse new calls, let running calls finish for `grace_s` seconds, then close."""
        self._stopping = True
        await self._update_health()
        if self._batch_worker is not None:
            await self._batch_worker.stop()  # another gateway goes on with the batches at once
        if self._kv_events is not None:
            self._kv_events.close()  # subscribers would stay for all of the grace
        self._service.drain()  # so would streams that carry many calls
        await asyncio.gather(
            *([] if self._server is None else [self._server.stop(grace_s)]),
            *([] if self._http is None else [self._http.stop(grace_s)]),
        )
        if self._otlp is not None:
            await self._otlp.close()
        await self._responses.close()
        await self._resumable.close()
        await self.inference.close()
        await self._groups.close()
        if self._kv_publisher is not None:
            await self._kv_publisher.stop()
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
        models: tuple[str, ...] = (),
    ) -> None:
        """Use other settings for later requests; see `GatewayConfig`. Empty `models` stay."""
        if models:
            self._groups.set_models(models)
        shares = {tenant.name: tenant.share(self._config.num_gateways) for tenant in tenants}
        self._admission.reload(limits, shares)
        self._config = replace(self._config, wake_s=wake_s)
        self.inference.reload(lost_s=lost_s, wake_s=wake_s)

    @property
    def budgets(self) -> DayBudgets:
        """The tokens that tenants have used today."""
        return self._admission.budgets

    @property
    def has_day_budgets(self) -> bool:
        """Whether the tokens of a tenant are limited for a day."""
        return self._admission.has_day_budgets

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

    def _num_groups(self, model: str) -> int:
        return sum(view.model == model for view in self._groups.groups())

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
        for name in ("", *self._services):
            await self._health.set(name, status)
