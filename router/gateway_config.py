"""The settings of a gateway, and the limits that the spec shares with it.

Needs little else, so that the command line starts fast. Knows fields; knows nothing of servers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from arriero.router.tenants.tenant import QueueLimits, Tenant

if TYPE_CHECKING:
    from arriero.router.batches.config import BatchesConfig
    from arriero.router.http.hosted_tools import HostedTools
    from arriero.router.kv_events.zmq_publisher import KvEventsConfig
    from arriero.router.observability.otlp_metrics import OtlpMetricsConfig
    from arriero.router.observability.request_log import RequestLogConfig
    from arriero.router.observability.tracing import TracingConfig
    from arriero.router.tls import TlsFiles

LOST_S = 120.0
"""Seconds that a request waits for another group after the loss of its group."""
MAX_RESUMABLE_S = 600
"""Longest time in seconds for which a stream can be resumed."""
RESUMABLE_S = 60.0
"""Seconds for which a resumable stream over HTTP is kept without its client."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GatewayConfig:
    """Settings of one gateway.

    Attributes:
        address: host and port of gRPC; port 0 picks a free port.
        http_address: host and port of HTTP; None for no HTTP.
        cors: origins of web pages that may call HTTP from a browser; "*" for any.
        console: serve the page `/console` over HTTP.
        hosted_tools: what happens to HTTP requests with tools that a server would run.
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
        otlp_metrics: collector of metrics; None for no export.
        models: ids of the deployment's models. A request for a listed model without a group fails
            as unavailable, for another model as not found.
        lost_s: seconds that a request waits for another group after the loss of its group.
        wake_s: models that have no group while idle, with the seconds that a request waits for
            the first group.
        vllm_engine: model that the gRPC listener serves as `vllm.grpc.engine.VllmEngine` too; ""
            for the only model; None to leave the service out.
        kv_events: sockets for the KV events of the groups; None for none.
        resumable_s: seconds for which a resumable stream over HTTP is kept without its client; 0
            keeps none.
        batches: folder and limits of `/v1/files` and `/v1/batches`; None leaves both out.
        guard: id of the guard model of `/v1/moderations` for requests that name none; "" for none.
    """

    address: str = "127.0.0.1:0"
    http_address: str | None = None
    cors: tuple[str, ...] = ()
    console: bool = False
    hosted_tools: HostedTools = "ignore"
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
    otlp_metrics: OtlpMetricsConfig | None = None
    models: tuple[str, ...] = ()
    lost_s: float = LOST_S
    wake_s: Mapping[str, float] = field(default_factory=dict)
    vllm_engine: str | None = None
    kv_events: KvEventsConfig | None = None
    resumable_s: float = RESUMABLE_S
    batches: BatchesConfig | None = None
    guard: str = ""
