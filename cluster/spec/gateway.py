"""The sections of the gateways in `arriero.yaml`, and the settings of each gateway.

Knows listeners, tenants, logs and traces; knows nothing of models.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator, Field, field_validator, model_validator

from arriero.cluster.spec.fields import (
    Bytes,
    Count,
    EverywherePath,
    Name,
    Port,
    Seconds,
    SpecSection,
    is_loopback,
    refuse_twice,
)
from arriero.cluster.spec.safety import PromptGuardSpec, SafetySpec
from arriero.router.batches.config import DAY_S, BatchesConfig
from arriero.router.gateway_config import MAX_RESUMABLE_S, RESUMABLE_S, GatewayConfig
from arriero.router.http.hosted_tools import HostedTools
from arriero.router.observability.otlp_metrics import OtlpMetricsConfig
from arriero.router.observability.request_log import RequestLogConfig
from arriero.router.observability.tracing import TracingConfig
from arriero.router.tenants.tenant import ANYONE, QueueLimits, Tenant
from arriero.router.tls import TlsFiles

if TYPE_CHECKING:
    from arriero.router.kv_events.zmq_publisher import KvEventsConfig

_ZMQ = re.compile(r"tcp://(\*|[^/\s:*]+|\[[0-9a-fA-F:.]+\]):\d{1,5}|ipc://\S+")
_ORIGIN = re.compile(r"\*|null|[a-z][a-z0-9+.-]*://[^/\s?#]+", re.IGNORECASE)
DEFAULT_PORT = 50051
DEFAULT_HTTP_PORT = 8000


def _zmq_address(value: str) -> str:
    if not _ZMQ.fullmatch(value):
        raise ValueError(
            f"{value!r} is no address to listen on; write tcp://HOST:PORT, such as "
            "tcp://127.0.0.1:5557, or ipc://PATH"
        )
    return value


ZmqAddress = Annotated[str, AfterValidator(_zmq_address)]


class HttpSpec(SpecSection):
    """The HTTP listener of a gateway.

    Attributes:
        host: address to bind to.
        port: port to bind to; 0 for any free port; None for 8000, or any free port when gRPC's
            port is 0.
        cors: origins of web pages that may call the gateway from a browser, such as
            http://localhost:5173; "*" for all. Empty by default: browsers then refuse the calls.
        hosted_tools: "ignore" leaves tools that a server would run (web search, MCP) out of the
            prompt; "refuse" refuses requests that offer such tools.
        console: serve the page `/console`; null serves the page where `host` is a loopback
            address, and nowhere else.
    """

    host: str = "127.0.0.1"
    port: Port | None = None
    cors: tuple[str, ...] = ()
    hosted_tools: HostedTools = "ignore"
    console: bool | None = None

    @property
    def serves_console(self) -> bool:
        """Whether the listener serves the page `/console`."""
        return is_loopback(self.host) if self.console is None else self.console

    @field_validator("cors", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:  # noqa: ANN401
        if isinstance(value, str):
            return tuple(origin.strip() for origin in value.split(",") if origin.strip())
        return value

    @field_validator("cors")
    @classmethod
    def _origins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        origins = tuple(origin.rstrip("/") for origin in value)
        for origin in origins:
            if not _ORIGIN.fullmatch(origin):
                raise ValueError(
                    f"{origin!r} is no origin; write scheme, host and port of the page, such as "
                    'http://localhost:5173, or "*" for all pages'
                )
        return origins


class TlsSpec(SpecSection):
    """PEM files, on every node with a gateway or a leader.

    Attributes:
        certificate: certificate chain, the server's certificate first.
        key: private key.
        ca: certificates of the authority that signs the other end's certificate. With `ca`, clients
            of a gateway must send a certificate (mutual TLS). Links always need `ca`.
    """

    certificate: Path
    key: Path
    ca: Path | None = None

    def files(self) -> TlsFiles:
        """Files for the router."""
        return TlsFiles(certificate=self.certificate, key=self.key, ca=self.ca)


class TracingSpec(SpecSection):
    """Export of spans of requests; needs `arriero[trace]`. For the fields see `TracingConfig`."""

    endpoint: str
    sample: Annotated[float, Field(ge=0, le=1)] = 1.0

    def config(self) -> TracingConfig:
        """Config for the router."""
        return TracingConfig(endpoint=self.endpoint, sample=self.sample)


class OtlpMetricsSpec(SpecSection):
    """Export of metrics; needs `arriero[trace]`. For the fields see `OtlpMetricsConfig`."""

    endpoint: str
    period_s: Seconds = 15


class RequestLogSpec(SpecSection):
    """A line of JSON for each request; for the fields see `RequestLogConfig`."""

    path: Path | None = None
    prompts: bool = False


class TenantSpec(SpecSection):
    """Limits of a tenant, over all gateways; for the fields see `Tenant`."""

    name: Name
    weight: Annotated[float, Field(gt=0, le=1000, allow_inf_nan=False)] = 1.0
    priority: Annotated[int, Field(ge=-1000, le=1000)] = 0
    requests_per_minute: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    tokens_per_minute: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    max_running: Count | None = None
    max_queued: Count | None = None
    tokens_per_day: Count | None = None
    tokens_per_day_by_model: dict[Name, Count] = Field(default_factory=dict)
    metrics: bool = False
    private_cache: bool = False
    safety: SafetySpec | None = None

    def tenant(self) -> Tenant:
        """Tenant for the router."""
        policy = None if self.safety is None else self.safety.policy()
        return Tenant(**dict(self) | {"safety": policy})


class QueueSpec(SpecSection):
    """Limits of a gateway's queue for each model; for the fields see `QueueLimits`."""

    max_queued: Count = 4096
    max_wait_s: Seconds = 60


class KvEventsSpec(SpecSection):
    """Sockets for the KV events of a gateway's groups; for the fields see `KvEventsConfig`.

    The events hold the token ids of prompts, and the sockets ask for no key.
    """

    publish: ZmqAddress = "tcp://127.0.0.1:5557"
    replay: ZmqAddress | None = None
    topic: Annotated[str, Field(max_length=256)] | None = None

    @model_validator(mode="after")
    def _differ(self) -> KvEventsSpec:
        if self.publish == self.replay and not self.publish.endswith(":0"):
            raise ValueError(f"`publish` and `replay` are both {self.replay}; give two addresses")
        return self

    def config(self) -> KvEventsConfig:
        """Config for the router."""
        from arriero.router.kv_events.zmq_publisher import KvEventsConfig

        return KvEventsConfig(
            publish=self.publish, replay=self.replay or "", topic=self.topic or ""
        )


class BatchesSpec(SpecSection):
    """Files and batches; for the fields see `BatchesConfig`.

    Attributes:
        path: folder that all gateways reach, for several gateways; else a folder of the node.
        max_bytes, max_file_bytes: see `BatchesConfig`; null for its default.
        keep_days: days for which files and ended batches are kept.
    """

    path: EverywherePath
    max_bytes: Bytes | None = None
    max_file_bytes: Bytes | None = None
    max_files: Count = 1000
    max_batches: Count = 100
    max_lines: Count = 50_000
    in_flight: Count = 32
    keep_days: Annotated[float, Field(gt=0, le=3650)] = 30

    def config(self) -> BatchesConfig:
        """Config for the router."""
        fields = self.model_dump(exclude={"keep_days"}, exclude_none=True)
        return BatchesConfig(**fields, keep_s=self.keep_days * DAY_S)


class GatewaySpec(SpecSection):
    """The gateways.

    Attributes:
        host: address to bind to.
        port: port of gRPC; 0 for any free port.
        http: HTTP listener; null for none.
        count: number of gateways; with a fixed port each gateway needs a node of its own.
        drain_s: seconds for which the streams of a stopping gateway may continue.
        tls: files for both listeners; null for listeners without TLS.
        keys: file of API keys (`arriero keys`), on every node; null requires no key.
        tenants: tenants with limits.
        queue: limits of the queue.
        request_log: a line for each request; null for no log.
        otlp_metrics: collector of metrics; null for no export.
        lost_s: seconds for which a stream whose group was lost waits for another group.
        vllm_engine: serve `vllm.grpc.engine.VllmEngine` on the gRPC listener too; the name of a
            model where the deployment has several. Needs `arriero[smg]`.
        kv_events: sockets for KV events in vLLM's form; null for none.
        resumable_s: seconds for which a resumable stream over HTTP is kept without its client; 0
            keeps none.
        batches: files and batches; null for none.
        guard: guard model of `/v1/moderations` for requests that name none; null for none.
        prompt_guard: classifier of injections for the tenants' policies; null for none.
    """

    host: str = "127.0.0.1"
    port: Port = DEFAULT_PORT
    http: HttpSpec | None = HttpSpec()
    count: Count = 1
    drain_s: Seconds = 10
    tls: TlsSpec | None = None
    keys: Path | None = None
    tenants: tuple[TenantSpec, ...] = ()
    queue: QueueSpec = QueueSpec()
    request_log: RequestLogSpec | None = None
    otlp_metrics: OtlpMetricsSpec | None = None
    lost_s: Seconds = 120
    vllm_engine: bool | Name = False
    kv_events: KvEventsSpec | None = None
    resumable_s: Annotated[float, Field(ge=0, le=MAX_RESUMABLE_S)] = RESUMABLE_S
    batches: BatchesSpec | None = None
    guard: Name | None = None
    prompt_guard: PromptGuardSpec | None = None

    @model_validator(mode="after")
    def _tenants_have_keys(self) -> GatewaySpec:
        names = [tenant.name for tenant in self.tenants]
        refuse_twice(names, "tenant", "keep one")
        if self.keys is None and any(name != ANYONE for name in names):
            raise ValueError(
                f"`tenants` without `keys` cannot be told apart; give a key file, or limit all "
                f"callers together as the tenant `{ANYONE}`"
            )
        return self

    @model_validator(mode="after")
    def _policies_have_prompt_guard(self) -> GatewaySpec:
        if self.prompt_guard is not None:
            return self
        for tenant in self.tenants:
            if tenant.safety is not None and tenant.safety.prompt_guard is not None:
                raise ValueError(
                    f"tenant `{tenant.name}`: `safety.prompt_guard` without "
                    "`gateway.prompt_guard`; give the folder of the classifier: "
                    "`prompt_guard: {path: FOLDER}` under `gateway`"
                )
        return self

    @property
    def guards(self) -> tuple[str, ...]:
        """Names of the guard models that tenants and moderations need."""
        names = [self.guard] if self.guard is not None else []
        policies = [tenant.safety for tenant in self.tenants if tenant.safety is not None]
        names += [policy.guard for policy in policies if policy.guard is not None]
        return tuple(dict.fromkeys(names))

    @property
    def http_port(self) -> int:
        """Port of HTTP; 0 for any free port, or for no HTTP."""
        if self.http is None:
            return 0
        if self.http.port is not None:
            return self.http.port
        return DEFAULT_HTTP_PORT if self.port else 0

    def console_url(self, http: str) -> str:
        """URL of the console at a gateway's HTTP address; "" where the gateway serves none."""
        if not http or self.http is None or not self.http.serves_console:
            return ""
        return f"{'http' if self.tls is None else 'https'}://{http}/console"

    def shares(self) -> tuple[Tenant, ...]:
        """Tenants for the router."""
        return tuple(tenant.tenant() for tenant in self.tenants)

    def config(
        self,
        models: tuple[str, ...],
        link_tls: TlsSpec | None = None,
        tracing: TracingSpec | None = None,
        wake_s: Mapping[str, float] | None = None,
    ) -> GatewayConfig:
        """Settings of each gateway; for the arguments see `GatewayConfig`."""
        log = None if self.request_log is None else RequestLogConfig(**dict(self.request_log))
        otlp = None if self.otlp_metrics is None else OtlpMetricsConfig(**dict(self.otlp_metrics))
        return GatewayConfig(
            address=f"{self.host}:{self.port}",
            http_address=None if self.http is None else f"{self.http.host}:{self.http_port}",
            cors=() if self.http is None else self.http.cors,
            console=self.http is not None and self.http.serves_console,
            hosted_tools="ignore" if self.http is None else self.http.hosted_tools,
            models=models,
            tls=None if self.tls is None else self.tls.files(),
            link_tls=None if link_tls is None else link_tls.files(),
            keys=self.keys,
            tenants=self.shares(),
            limits=QueueLimits(**dict(self.queue)),
            num_gateways=self.count,
            tracing=None if tracing is None else tracing.config(),
            request_log=log,
            otlp_metrics=otlp,
            lost_s=self.lost_s,
            resumable_s=self.resumable_s,
            batches=None if self.batches is None else self.batches.config(),
            guard=self.guard or "",
            wake_s=wake_s or {},
            vllm_engine=self._engine_model,
            kv_events=None if self.kv_events is None else self.kv_events.config(),
        )

    @property
    def _engine_model(self) -> str | None:
        """The model that the worker service serves; "" for the only model, None for no service."""
        if isinstance(self.vllm_engine, str):
            return self.vllm_engine
        return "" if self.vllm_engine else None
