"""The Ray Serve application of a deployment: its leaders and its gateways.

Knows the Serve deployments of a spec; knows nothing of the work of leaders and gateways.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve import Application

from arriero.cluster.hosts.capacity import SERVICE_CPUS, ClusterCapacity, PlacementBundles
from arriero.cluster.replica.gateway import GatewayReplica, GatewaySettings
from arriero.cluster.replica.group_settings import GroupSettings
from arriero.cluster.replica.leader import Leader
from arriero.cluster.spec.deployment import DeploymentSpec
from arriero.cluster.spec.load import load
from arriero.cluster.spec.model import ModelSpec
from arriero.shards.errors import SpecError

NAME = "arriero"
_STOP_MARGIN_S = 10.0


def build(spec: DeploymentSpec, capacity: ClusterCapacity) -> Application:
    """All groups and gateways of `spec` in a single application.

    Raises:
        SpecError: the cluster lacks GPUs that a model needs.
    """
    leaders = [
        leader(model, spec, capacity, seat=f"{model.name}-{index}", revision=1)
        for model in spec.models
        for index in range(model.groups)
    ]
    return gateways(spec, leaders)


def gateways(spec: DeploymentSpec, leaders: Sequence[Application] = ()) -> Application:
    """The gateways of `spec`; `leaders` join the same application."""
    # A fixed port can be bound only once on a node.
    fixed_port = spec.gateway.port or spec.gateway.http_port
    spread: dict[str, Any] = {"max_replicas_per_node": 1} if fixed_port else {}
    deployment = serve.deployment(
        name="gateway",
        num_replicas=spec.gateway.count,
        ray_actor_options={"num_cpus": SERVICE_CPUS},
        health_check_period_s=spec.health.period_s,
        health_check_timeout_s=spec.health.timeout_s,
        graceful_shutdown_wait_loop_s=0.1,
        graceful_shutdown_timeout_s=spec.gateway.drain_s + _STOP_MARGIN_S,
        **spread,
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
    """The application of a spec file, for Ray Serve's commands and KubeRay.

    `serve run arriero.cluster.app:application spec=arriero.yaml`. Serve's proxy then answers HTTP;
    a gateway opens an HTTP port of its own only if the spec sets `gateway.http.port`.

    Raises:
        SpecError: an unknown argument, a wrong spec, or a cluster that lacks GPUs.
    """
    if set(args) != {"spec"}:
        raise SpecError(f"arguments {sorted(args)}: give only spec=PATH of an arriero.yaml")
    spec = load(Path(args["spec"]), {})
    if spec.gateway.http is not None and spec.gateway.http.port is None:
        gateway = spec.gateway.model_copy(update={"http": None})
        spec = spec.model_copy(update={"gateway": gateway})
    return build(spec, ClusterCapacity.of_cluster(spec, shared=True))


def leader(
    model: ModelSpec, spec: DeploymentSpec, capacity: ClusterCapacity, *, seat: str, revision: int
) -> Application:
    """The leader of a group, as an application or for `gateways`.

    Raises:
        SpecError: the cluster lacks GPUs that the model needs.
    """
    capacity.check_gpus(model)
    device = capacity.device(model)
    cpus = model.cpus_per_slice or capacity.cpus_per_slice
    placement = PlacementBundles.of(model)
    settings = GroupSettings(
        model=model.name,
        seat=seat,
        revision=revision,
        config=model.group_config(device),
        cpus_per_slice=cpus,
        slices_per_bundle=placement.slices_per_bundle,
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
        placement_group_bundles=[{"CPU": SERVICE_CPUS}, *placement.bundles(cpus, device)],
        placement_group_strategy="SPREAD" if model.placement.stages == "spread" else "PACK",
        **placement.labels,
        health_check_period_s=spec.health.period_s,
        health_check_timeout_s=spec.health.timeout_s,
        graceful_shutdown_wait_loop_s=0.1,
        graceful_shutdown_timeout_s=spec.health.drain_s + _STOP_MARGIN_S,
    )(Leader)
    return deployment.bind(settings)
