"""The Ray Serve application of a deployment: its leaders and its gateways.

Knows how a spec becomes deployments; knows nothing of what they do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve import Application

from arriero.cluster.replica.gateway import GatewayReplica, GatewaySettings
from arriero.cluster.replica.group_settings import GroupSettings
from arriero.cluster.replica.leader import Leader
from arriero.cluster.spec.deployment import DeploymentSpec
from arriero.cluster.spec.load import load
from arriero.cluster.spec.model import ModelSpec
from arriero.shards.errors import SpecError

NAME = "arriero"
SERVICE_CPUS = 0.01
"""Logical CPUs of a leader or gateway: they share the cores that the slices leave."""
_STOP_MARGIN_S = 10.0


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterCapacity:
    """What the cluster has for groups.

    Attributes:
        num_cpus, num_gpus: of the whole cluster.
        cpus_per_slice: logical CPUs that a slice takes when its model does not say.
    """

    num_cpus: float
    num_gpus: float
    cpus_per_slice: float

    @classmethod
    def of_cluster(cls, spec: DeploymentSpec, *, shared: bool) -> ClusterCapacity:
        """Ask Ray.

        Args:
            spec: the deployment.
            shared: others run on this cluster too; then a slice takes a CPU of its own by default,
                else all slices, and one group more while an update is under way, share the CPUs.
        """
        resources = ray.cluster_resources()  # type: ignore[no-untyped-call]
        num_cpus = resources.get("CPU", 0.0)
        surge = max(m.mesh.num_slices for m in spec.models)
        services = SERVICE_CPUS * (sum(m.most_seats for m in spec.models) + spec.gateway.count + 1)
        part = int((num_cpus - services) / (spec.num_slices + surge) * 1e3) / 1e3
        return cls(
            num_cpus=num_cpus,
            num_gpus=resources.get("GPU", 0.0),
            cpus_per_slice=1.0 if shared else min(1.0, part),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class PlacementBundles:
    """How a group's slices are bundled: a bundle is always on one node.

    Attributes:
        slices_each: slices in a bundle: the tensor-parallel ones of a stage, or 1 where these may
            span nodes.
        count: bundles.
        accelerator: GPU type that each wants; "" for any.
        selector: labels of the nodes.
    """

    slices_each: int
    count: int
    accelerator: str
    selector: Mapping[str, str]

    @classmethod
    def of(cls, model: ModelSpec) -> PlacementBundles:
        """As a model's mesh and placement say."""
        each = 1 if model.placement.span else model.mesh.tp
        return cls(
            slices_each=each,
            count=model.mesh.num_slices // each,
            accelerator=model.placement.accelerator or "",
            selector=model.placement.labels,
        )

    def bundles(self, cpus: float, device: str) -> list[dict[str, float]]:
        """What each wants.

        Args:
            cpus: of a slice.
            device: "cpu" or "cuda".
        """
        bundle = {"CPU": cpus * self.slices_each}
        if device == "cuda":
            bundle["GPU"] = float(self.slices_each)
        if self.accelerator:
            bundle[f"accelerator_type:{self.accelerator}"] = 0.001
        return [bundle] * self.count

    @property
    def labels(self) -> dict[str, Any]:
        """Serve's argument for the labels of each bundle's node, the leader's first."""
        if not self.selector:
            return {}
        selectors = [dict(self.selector)] * (1 + self.count)
        return {"placement_group_bundle_label_selector": selectors}


def build(spec: DeploymentSpec, room: ClusterCapacity) -> Application:
    """The whole of `spec` as one application.

    Raises:
        SpecError: the cluster has not what a model asks for.
    """
    leaders = [
        leader(model, spec, room, seat=f"{model.name}-{index}", revision=1)
        for model in spec.models
        for index in range(model.groups)
    ]
    return gateways(spec, leaders)


def gateways(spec: DeploymentSpec, leaders: Sequence[Application] = ()) -> Application:
    """The gateways of `spec`; `leaders` are tied into the same application."""
    # a fixed port can be bound once on a node
    fixed = spec.gateway.port or spec.gateway.http_port
    apart: dict[str, Any] = {"max_replicas_per_node": 1} if fixed else {}
    deployment = serve.deployment(
        name="gateway",
        num_replicas=spec.gateway.count,
        ray_actor_options={"num_cpus": SERVICE_CPUS},
        health_check_period_s=spec.health.period_s,
        health_check_timeout_s=spec.health.timeout_s,
        graceful_shutdown_wait_loop_s=0.1,
        graceful_shutdown_timeout_s=spec.gateway.drain_s + _STOP_MARGIN_S,
        **apart,
    )(serve.ingress()(GatewayReplica))
    names = tuple(model.name for model in spec.models)
    settings = GatewaySettings(
        spec=spec.gateway,
        models=names,
        link_tls=spec.link_tls,
        tracing=spec.tracing,
        wake_s=spec.wake_s,
        log_level=spec.log_level,
    )
    return deployment.bind(settings, *leaders)


def application(args: Mapping[str, str]) -> Application:
    """The application of a spec file, for Serve's own commands.

    `serve run arriero.cluster.app:application spec=arriero.yaml`; Serve's proxy answers HTTP then,
    and the gateways' own HTTP listens only where the spec gives it a port.

    Raises:
        SpecError: no such argument, a wrong spec, or the cluster has not what it asks for.
    """
    if set(args) != {"spec"}:
        raise SpecError(f"arguments {sorted(args)}: give one, spec=PATH of an arriero.yaml")
    spec = load(Path(args["spec"]), {})
    if spec.gateway.http is not None and spec.gateway.http.port is None:
        gateway = spec.gateway.model_copy(update={"http": None})
        spec = spec.model_copy(update={"gateway": gateway})
    return build(spec, ClusterCapacity.of_cluster(spec, shared=True))


def leader(
    model: ModelSpec, spec: DeploymentSpec, room: ClusterCapacity, *, seat: str, revision: int
) -> Application:
    """One group of a model, as an application or a part of one.

    Raises:
        SpecError: the cluster has not what it asks for.
    """
    num_slices = model.mesh.num_slices
    wanted = num_slices * (model.groups + model.spares)
    device = model.device
    if device == "auto":
        device = "cuda" if room.num_gpus >= wanted else "cpu"
    if device == "cuda" and room.num_gpus < wanted:
        raise SpecError(
            f"model `{model.name}`: {wanted} slices want a GPU each, and the cluster has"
            f" {room.num_gpus:g}; ask for fewer, or for `device: cpu`"
        )
    cpus = model.cpus_per_slice or room.cpus_per_slice
    stages = PlacementBundles.of(model)
    settings = GroupSettings(
        model=model.name,
        seat=seat,
        revision=revision,
        config=model.group_config(device),
        cpus_per_slice=cpus,
        slices_per_bundle=stages.slices_each,
        period_s=spec.health.period_s,
        start_timeout_s=spec.health.start_timeout_s,
        drain_s=spec.health.drain_s,
        link_tls=spec.link_tls,
        tracing=spec.tracing,
        canary_s=spec.health.canary_s,
        limits=spec.health.limits(),
        log_level=spec.log_level,
    )
    deployment = serve.deployment(
        name=f"group-{seat}",
        num_replicas=1,
        ray_actor_options={"num_cpus": SERVICE_CPUS},
        placement_group_bundles=[{"CPU": SERVICE_CPUS}, *stages.bundles(cpus, device)],
        placement_group_strategy="SPREAD" if model.placement.stages == "spread" else "PACK",
        **stages.labels,
        health_check_period_s=spec.health.period_s,
        health_check_timeout_s=spec.health.timeout_s,
        graceful_shutdown_wait_loop_s=0.1,
        graceful_shutdown_timeout_s=spec.health.drain_s + _STOP_MARGIN_S,
    )(Leader)
    return deployment.bind(settings)
