"""The sections of the front door in `arriero.yaml`, and what each gateway runs with.

Knows listeners, tenants and where things are written; knows nothing of models.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from arriero.cluster.spec.fields import Count, Name, Port, Seconds, SpecSection, refuse_twice
from arriero.router.gateway import GatewayConfig
from arriero.router.observability.request_log import RequestLogConfig
from arriero.router.observability.tracing import TracingConfig
from arriero.router.tenants.tenant import ANYONE, QueueLimits, Tenant
from arriero.router.tls import TlsFiles

_ORIGIN = re.compile(r"\*|null|[a-z][a-z0-9+.-]*://[^/\s?#]+", re.IGNORECASE)
DEFAULT_PORT = 50051
DEFAULT_HTTP_PORT = 8000


class HttpSpec(SpecSection):
    """The HTTP listener of a gateway.

    Attributes:
        host: address it listens on.
        port: 0 takes any free one; None takes 8000, or any free one where gRPC's is 0.
        cors: origins of the web pages that may call it from a browser, such as
            http://localhost:5173; "*" for any. None by default: browsers then refuse such calls.
    """

    host: str = "127.0.0.1"
    port: Port | None = None
    cors: tuple[str, ...] = ()

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
                    'http://localhost:5173, or "*" for any page'
                )
        return origins


class TlsSpec(SpecSection):
    """PEM files, on every node that uses them.

    Attributes:
        certificate: the chain, its own certificate first.
        key: the private key.
        ca: certificates that sign the other side's. Of a gateway: its clients must then show one
            (mutual TLS). Of the links: both sides must.
    """

    certificate: Path
    key: Path
    ca: Path | None = None

    def files(self) -> TlsFiles:
        """As the router takes them."""
        return TlsFiles(certificate=self.certificate, key=self.key, ca=self.ca)


class TracingSpec(SpecSection):
    """Where spans of requests go; wants `arriero[trace]`. The fields are `TracingConfig`'s."""

    endpoint: str
    sample: Annotated[float, Field(ge=0, le=1)] = 1.0

    def config(self) -> TracingConfig:
        """As the router takes it."""
        return TracingConfig(endpoint=self.endpoint, sample=self.sample)


class RequestLogSpec(SpecSection):
    """A line of JSON for each request; the fields are `RequestLogConfig`'s."""

    path: Path | None = None
    prompts: bool = False


class TenantSpec(SpecSection):
    """What one tenant may take, over all gateways; the fields are `Tenant`'s."""

    name: Name
    weight: Annotated[float, Field(gt=0, le=1000, allow_inf_nan=False)] = 1.0
    priority: Annotated[int, Field(ge=-1000, le=1000)] = 0
    requests_per_minute: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    tokens_per_minute: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    max_running: Count | None = None
    max_queued: Count | None = None
    metrics: bool = False
    private_cache: bool = False


class QueueSpec(SpecSection):
    """What a gateway keeps waiting, of each model; the fields are `QueueLimits`'."""

    max_queued: Count = 4096
    max_wait_s: Seconds = 60


class GatewaySpec(SpecSection):
    """The front door.

    Attributes:
        host: address it listens on.
        port: of gRPC; 0 takes any free one.
        http: the HTTP listener; null for none.
        count: gateways; each needs a node of its own when a port is fixed.
        drain_s: how long running streams may go on when it is told to stop.
        tls: of both listeners; null listens in the clear.
        keys: file of API keys (`arriero keys`), on every node; null asks for none.
        tenants: those whose keys have limits.
        queue: what may wait.
        request_log: a line for each request; null writes none.
        lost_s: how long a stream whose group was lost waits for one that goes on with it.
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
    lost_s: Seconds = 120

    @model_validator(mode="after")
    def _tenants_have_keys(self) -> GatewaySpec:
        names = [tenant.name for tenant in self.tenants]
        refuse_twice(names, "tenant", "keep one")
        if self.keys is None and any(name != ANYONE for name in names):
            raise ValueError(
                f"`tenants` without `keys`: nobody can tell them apart; give a key file, or limit "
                f"all callers together as the one tenant `{ANYONE}`"
            )
        return self

    @property
    def http_port(self) -> int:
        """The port of HTTP; 0 for any free one, or for none at all."""
        if self.http is None:
            return 0
        if self.http.port is not None:
            return self.http.port
        return DEFAULT_HTTP_PORT if self.port else 0

    def shares(self) -> tuple[Tenant, ...]:
        """The tenants, as gateways take them."""
        return tuple(Tenant(**dict(tenant)) for tenant in self.tenants)

    def config(
        self,
        models: tuple[str, ...],
        link_tls: TlsSpec | None = None,
        tracing: TracingSpec | None = None,
        wake_s: Mapping[str, float] | None = None,
    ) -> GatewayConfig:
        """What each gateway runs with; see there for the arguments."""
        log = None if self.request_log is None else RequestLogConfig(**dict(self.request_log))
        return GatewayConfig(
            address=f"{self.host}:{self.port}",
            http_address=None if self.http is None else f"{self.http.host}:{self.http_port}",
            cors=() if self.http is None else self.http.cors,
            models=models,
            tls=None if self.tls is None else self.tls.files(),
            link_tls=None if link_tls is None else link_tls.files(),
            keys=self.keys,
            tenants=self.shares(),
            limits=QueueLimits(**dict(self.queue)),
            num_gateways=self.count,
            tracing=None if tracing is None else tracing.config(),
            request_log=log,
            lost_s=self.lost_s,
            wake_s=wake_s or {},
        )
