"""The deployment spec, `arriero.yaml`: fields, limits and defaults.

Knows the name and the allowed values of each field; knows nothing of Ray, of placement, or of the
files that fields name. `model` and `gateway` have the sections of models and gateways.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from arriero.cluster.spec.fields import (
    Bytes,
    Count,
    LogFormat,
    LogLevel,
    Port,
    Seconds,
    SpecSection,
    refuse_twice,
)
from arriero.cluster.spec.gateway import GatewaySpec, TlsSpec, TracingSpec
from arriero.cluster.spec.model import ModelSpec
from arriero.router.tls import TlsFiles
from arriero.shards.leader.health import HealthLimits


class HealthSpec(SpecSection):
    """Time limits of health checks (Ray's defaults, 10 s and three failures, are too slow).

    Attributes:
        period_s: seconds between two checks of a group or gateway.
        timeout_s: seconds after which a check has failed.
        start_timeout_s: seconds within which a group must generate a first token; after that the
            start has failed.
        drain_s: seconds for which the streams of a stopping group may continue; streams that still
            run then move to another group.
        silence_s: seconds without a heartbeat after which a slice is lost; slices send two
            heartbeats a second.
        hang_s: seconds after which a step is lost in which all slices wait and nothing progresses.
        step_s: longest computation of a step, in seconds.
        canary_s: seconds between two test tokens of an idle group.
    """

    period_s: Seconds = 1
    timeout_s: Seconds = 5
    silence_s: Seconds = 3
    hang_s: Seconds = 4
    step_s: Seconds = 600
    canary_s: Seconds = 5
    start_timeout_s: Seconds = 600
    drain_s: Seconds = 10

    def limits(self) -> HealthLimits:
        """Limits for a group."""
        return HealthLimits(silence_s=self.silence_s, hang_s=self.hang_s, step_s=self.step_s)


class AdminTlsSpec(SpecSection):
    """PEM files for Admin, on the nodes where the operator may run: first of all the head.

    Attributes:
        certificate: certificate chain, the server's certificate first.
        key: private key.
        ca: certificates of the authority that signed the server's certificate. `up` stores these
            in the state file, and the command line trusts no others; callers send the admin token,
            no certificate.
        name: name in the certificate; null for the host in Admin's address.
    """

    certificate: Path
    key: Path
    ca: Path
    name: Annotated[str, Field(min_length=1, max_length=253)] | None = None

    def files(self) -> TlsFiles:
        """Files for a server."""
        return TlsFiles(certificate=self.certificate, key=self.key)


class AuditLogSpec(SpecSection):
    """The audit log of Admin: a line of JSON for each change and each refusal.

    Attributes:
        path: file on the node where the operator runs; null for `arriero-audit.jsonl` in the
            folder of Ray's logs.
        max_bytes: size at which the file is rotated.
        keep: number of older files.
    """

    path: Path | None = None
    max_bytes: Bytes = 10**7
    keep: Count = 5


class AdminSpec(SpecSection):
    """The server of `arriero.v1.Admin`, for callers with the deployment's admin token.

    Attributes:
        host: address to bind to, on the node where the operator runs.
        port: port to bind to; 0 for any free port.
        tls: null sends everything unencrypted, the admin token too: only for loopback and trusted
            networks.
        audit_log: who changed what.
    """

    host: str = "127.0.0.1"
    port: Port = 0
    tls: AdminTlsSpec | None = None
    audit_log: AuditLogSpec = AuditLogSpec()


class RaySpec(SpecSection):
    """The Ray cluster.

    Attributes:
        address: address of a running cluster; None starts a local cluster on this machine.
        node_address: loopback address of the local cluster's node. At 127.0.0.1 Ray binds to
            loopback only; at another address (127.0.0.2) Ray binds to every interface, and other
            nodes can join. Both require the cluster's own token.
        num_cpus: logical CPUs of the local cluster; None takes the number of the machine.
        object_store: bytes of the local cluster's object store (streams do not use the store).
        dashboard: start Ray's dashboard and metrics collection with the local cluster.
    """

    address: str | None = None
    node_address: str = "127.0.0.1"
    num_cpus: Count | None = None
    object_store: Bytes = 200 * 10**6
    dashboard: bool = False

    @model_validator(mode="after")
    def _least_store(self) -> RaySpec:
        if self.object_store < 80 * 10**6:
            raise ValueError("`object_store` is below Ray's minimum of 80 MB; give 80MB or more")
        return self


class DeploymentSpec(SpecSection):
    """A whole deployment: `arriero.yaml`.

    Attributes:
        models, gateway, health, admin, ray: sections; see the classes.
        link_tls: TLS files of the links between gateways and leaders; the certificate must be for
            the name `arriero-link`. With null the links are unencrypted, and only the token of the
            leader protects a link.
        tracing: export of spans of requests; null for none.
        log_level: log level of leaders, slices and gateways; `arriero logs` shows the logs.
        log_format: text, or a line of JSON for each message.
    """

    models: Annotated[tuple[ModelSpec, ...], Field(min_length=1)]
    gateway: GatewaySpec = GatewaySpec()
    link_tls: TlsSpec | None = None
    tracing: TracingSpec | None = None
    health: HealthSpec = HealthSpec()
    admin: AdminSpec = AdminSpec()
    ray: RaySpec = RaySpec()
    log_level: LogLevel = "warning"
    log_format: LogFormat = "text"

    @model_validator(mode="after")
    def _names(self) -> DeploymentSpec:
        names = [model.name for model in self.models]
        names += [adapter.name for model in self.models for adapter in model.adapters]
        refuse_twice(names, "model name", "give each model and each adapter its own")
        if self.link_tls is not None and self.link_tls.ca is None:
            raise ValueError(
                "`link_tls` needs `ca`: both ends of a link check the other end's certificate"
            )
        for guard in self.gateway.guards:
            if guard not in names:
                raise ValueError(
                    f"guard {guard!r} of the gateway is no model of the spec; add it to `models`, "
                    f"or name one of: {', '.join(names)}"
                )
        worker = self.gateway.vllm_engine
        if worker is True and len(names) > 1:
            raise ValueError(
                f"`gateway.vllm_engine: true` with {len(names)} models: the service has one model; "
                f"name it: `vllm_engine: {names[0]}`"
            )
        if isinstance(worker, str) and worker not in names:
            raise ValueError(
                f"`gateway.vllm_engine: {worker}` is none of the models {', '.join(names)}"
            )
        return self

    @property
    def wake_s(self) -> dict[str, float]:
        """Models that scale to zero, and the seconds that a first request may wait for a start."""
        return {
            model.name: self.health.start_timeout_s
            for model in self.models
            if model.autoscale is not None and model.autoscale.min == 0
        }

    @property
    def num_slices(self) -> int:
        """Largest number of slices of all groups, spare groups included."""
        return sum(model.most_seats * model.mesh.num_slices for model in self.models)
