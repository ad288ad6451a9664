"""The deployment spec, `arriero.yaml`: its fields and what they may be.

Knows what may be asked for and how each field is spelt; knows nothing of Ray, of placement, or of
any file that a field names. The sections of a model and of the front door have rooms of their own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from arriero.cluster.spec.fields import (
    Bytes,
    Count,
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
    """How fast a loss is noticed (Ray's own defaults, 10 s and three failures, are too slow).

    Attributes:
        period_s: time between two checks of a group or gateway.
        timeout_s: a check that takes longer has failed.
        start_timeout_s: a group that has not given a token by then has failed to start.
        drain_s: how long a group's running streams may go on when it is told to stop; what still
            runs then moves to another group.
        silence_s: a slice that sends no pulse for so long is lost; it sends two a second.
        hang_s: a step in which every slice waits and nothing moves for so long is lost.
        step_s: the longest a step may compute.
        canary_s: an idle group draws a token so often, to see that it still can.
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
        """As a group takes them."""
        return HealthLimits(silence_s=self.silence_s, hang_s=self.hang_s, step_s=self.step_s)


class AdminTlsSpec(SpecSection):
    """PEM files of Admin, on the nodes where the operator may run: the head before others.

    Attributes:
        certificate: the chain, its own certificate first.
        key: the private key.
        ca: certificates of the authority that signed it. `up` notes them in its state file, and
            the command line believes no other; callers show the token, not a certificate.
        name: that the certificate is for; null: the address that Admin is reached at.
    """

    certificate: Path
    key: Path
    ca: Path
    name: Annotated[str, Field(min_length=1, max_length=253)] | None = None

    def files(self) -> TlsFiles:
        """As a listener takes them."""
        return TlsFiles(certificate=self.certificate, key=self.key)


class AdminSpec(SpecSection):
    """Where `arriero.v1.Admin` listens, for those who hold the deployment's admin token.

    Attributes:
        host: address it listens on, on the node where the operator runs.
        port: 0 takes any free one.
        tls: null listens in the clear, token included: for loopback and networks of one's own.
    """

    host: str = "127.0.0.1"
    port: Port = 0
    tls: AdminTlsSpec | None = None


class RaySpec(SpecSection):
    """The Ray cluster.

    Attributes:
        address: of a running cluster; None starts one on this machine.
        node_address: loopback address of the local cluster's node. At 127.0.0.1 Ray binds to
            loopback alone; at any other (127.0.0.2) it binds to every interface, and other nodes
            can join. Either asks for the cluster's own token.
        num_cpus: logical CPUs of the local cluster; None takes the machine's.
        object_store: bytes of the local cluster's object store (streams do not pass through it).
        dashboard: start Ray's dashboard and its metrics' collection with the local cluster.
    """

    address: str | None = None
    node_address: str = "127.0.0.1"
    num_cpus: Count | None = None
    object_store: Bytes = 200 * 10**6
    dashboard: bool = False

    @model_validator(mode="after")
    def _least_store(self) -> RaySpec:
        if self.object_store < 80 * 10**6:
            raise ValueError("`object_store` is below Ray's own minimum; give 80MB or more")
        return self


class DeploymentSpec(SpecSection):
    """A whole deployment: `arriero.yaml`.

    Attributes:
        models, gateway, health, ray: see there.
        link_tls: of the links between gateways and leaders; its certificate must be for the name
            `arriero-link`. Null leaves them in the clear, each opened by its leader's token.
        tracing: spans of requests; null makes none.
        log_level: of what leaders, slices and gateways log; `arriero logs` shows it.
    """

    models: Annotated[tuple[ModelSpec, ...], Field(min_length=1)]
    gateway: GatewaySpec = GatewaySpec()
    link_tls: TlsSpec | None = None
    tracing: TracingSpec | None = None
    health: HealthSpec = HealthSpec()
    admin: AdminSpec = AdminSpec()
    ray: RaySpec = RaySpec()
    log_level: LogLevel = "warning"

    @model_validator(mode="after")
    def _names(self) -> DeploymentSpec:
        names = [model.name for model in self.models]
        refuse_twice(names, "model name", "give each model its own")
        if self.link_tls is not None and self.link_tls.ca is None:
            raise ValueError("`link_tls` needs its `ca`: both ends of a link check each other")
        return self

    @property
    def wake_s(self) -> dict[str, float]:
        """Models that have no group while nobody asks, and how long their first request waits."""
        return {
            model.name: self.health.start_timeout_s
            for model in self.models
            if model.autoscale is not None and model.autoscale.min == 0
        }

    @property
    def num_slices(self) -> int:
        """Slices of all groups, as many as there may be, with the spare ones."""
        return sum(m.most_seats * m.mesh.num_slices for m in self.models)
