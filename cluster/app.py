"""The Ray Serve application of a deployment: its leaders and its gateways.

Knows how a spec becomes deployments; knows nothing of what they do.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve import Application

from arriero.cluster.gateway import GatewayReplica, GatewaySettings
from arriero.cluster.group import GroupSettings, Leader
from arriero.cluster.spec import ModelSpec, Spec, load
from arriero.shards.errors import SpecError

NAME = "arriero"
SERVICE_CPUS = 0.01
"""Logical CPUs of a leader or gateway: they share the cores that the slices leave."""
_STOP_MARGIN_S = 10.0


def build(spec: Spec, *, num_cpus: float, num_gpus: float, shared: bool) -> Application:
    """The application of `spec`.

    Args:
        spec: the deployment.
        num_cpus: logical CPUs of the cluster.
        num_gpus: GPUs of the cluster.
        shared: others run on this cluster too; then a slice takes a CPU of its own by default.

    Raises:
        SpecError: the cluster has not what a model asks for.
    """
    services = SERVICE_CPUS * (sum(m.groups for m in spec.models) + spec.gateway.count)
    part = 1.0 if shared else min(1.0, int((num_cpus - services) / spec.num_slices * 1e3) / 1e3)
    leaders = [_leader(model, spec, part, num_gpus) for model in spec.models]
    # a fixed port can be bound once on a node
    fixed = spec.gateway.port or spec.gateway.http_port
    apart: dict[str, Any] = {"max_replicas_per_node": 1} if fixed else {}
    gateways = serve.deployment(
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
    return gateways.bind(GatewaySettings(spec=spec.gateway, models=names), *leaders)


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
    resources = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return build(
        spec,
        num_cpus=resources.get("CPU", 0.0),
        num_gpus=resources.get("GPU", 0.0),
        shared=True,
    )


def _leader(model: ModelSpec, spec: Spec, part: float, num_gpus: float) -> Application:
    num_slices = model.mesh.num_slices
    wanted = num_slices * model.groups
    device = model.device
    if device == "auto":
        device = "cuda" if num_gpus >= wanted else "cpu"
    if device == "cuda" and num_gpus < wanted:
        raise SpecError(
            f"model `{model.name}`: {wanted} slices want a GPU each, and the cluster has"
            f" {num_gpus:g}; ask for fewer, or for `device: cpu`"
        )
    cpus = model.cpus_per_slice or part
    bundle = {"CPU": cpus} | ({"GPU": 1.0} if device == "cuda" else {})
    settings = GroupSettings(
        model=model.name,
        config=model.group_config(device),
        cpus_per_slice=cpus,
        period_s=spec.health.period_s,
        start_timeout_s=spec.health.start_timeout_s,
        drain_s=spec.health.drain_s,
    )
    leaders = serve.deployment(
        name=f"group-{model.name}",
        num_replicas=model.groups,
        ray_actor_options={"num_cpus": SERVICE_CPUS},
        placement_group_bundles=[{"CPU": SERVICE_CPUS}, *[bundle] * num_slices],
        placement_group_strategy="PACK",
        health_check_period_s=spec.health.period_s,
        health_check_timeout_s=spec.health.timeout_s,
        graceful_shutdown_wait_loop_s=0.1,
        graceful_shutdown_timeout_s=spec.health.drain_s + _STOP_MARGIN_S,
    )(Leader)
    return leaders.bind(settings)
