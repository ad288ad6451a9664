"""The Ray Serve application of a deployment: its leaders and its gateways.

Knows the Serve deployments of a spec; knows nothing of the work of leaders and gateways.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve import Application

from arriero.cluster.connection import connect_driver
from arriero.cluster.hosts.capacity import SERVICE_CPUS, ClusterCapacity, PlacementBundles
from arriero.cluster.planner import model_check
from arriero.cluster.planner.capacity_check import refuse_spec
from arriero.cluster.replica import prompt_guard_service
from arriero.cluster.replica.gateway import GatewayReplica, GatewaySettings
from arriero.cluster.replica.group_settings import GroupSettings
from arriero.cluster.replica.leader import Leader
from arriero.cluster.spec.deployment import DeploymentSpec
from arriero.cluster.spec.load import load
from arriero.cluster.spec.model import ModelSpec
from arriero.shards.errors import SpecError

NAME = "arriero"
_STOP_MARGIN_S = 10.0
_SHORTEST_DIGEST = 12


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
    """The gateways of `spec` and its Prompt Guard; `leaders` join the same application."""
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
        log_format=spec.log_format,
    )
    more: dict[str, Any] = {}
    if (guard := spec.gateway.prompt_guard) is not None:
        more["prompt_guard"] = prompt_guard_service.application(
            guard, spec.log_level, spec.log_format, period_s=spec.health.period_s
        )
    return deployment.bind(settings, *leaders, **more)


def application(args: Mapping[str, str]) -> Application:
    """The application of a spec file, for Ray Serve's commands and KubeRay.

    `serve run arriero.cluster.app:application spec=arriero.yaml`. Serve's proxy then answers HTTP;
    a gateway opens an HTTP port of its own only if the spec sets `gateway.http.port`. `serve run`
    builds the application before it connects to Ray, so this function connects where nobody has.

    Args:
        args: `spec`, the path of an arriero.yaml; and `digest`, the start of the SHA-256 of that
            file. Serve compares arguments, not files: `serve deploy` takes a changed spec only
            together with a changed digest.

    Raises:
        SpecError: an unknown argument, a wrong spec or digest, or a cluster that can never hold the
            groups.
        CheckpointError: a model folder of this machine is broken.
        Unauthenticated: the cluster requires a token that this process does not have.
        Unavailable: no Ray cluster answers.
    """
    unknown = set(args) - {"spec", "digest"}
    if unknown or "spec" not in args:
        raise SpecError(
            f"arguments {sorted(args)}: give spec=PATH of an arriero.yaml, and digest=SHA256 of"
            " that file if you like"
        )
    path = Path(args["spec"])
    spec = load(path, {})
    if "digest" in args:
        _check_digest(path, args["digest"])
    if spec.gateway.http is not None and spec.gateway.http.port is None:
        gateway = spec.gateway.model_copy(update={"http": None})
        spec = spec.model_copy(update={"gateway": gateway})
    if not ray.is_initialized():
        connect_driver(spec.ray.address or os.environ.get("RAY_ADDRESS") or "auto")
    model_check.check_known_sizes(spec.models)
    capacity = ClusterCapacity.of_cluster(spec, shared=True)
    refuse_spec(spec, capacity)
    return build(spec, capacity)


def _check_digest(path: Path, digest: str) -> None:
    """Refuse the digest of another version of the spec, as a node with an old file would have it.

    Raises:
        SpecError: `digest` is not the start of the file's SHA-256, or is too short.
    """
    actual = hashlib.sha256(path.read_bytes()).hexdigest()
    if len(digest) < _SHORTEST_DIGEST or not actual.startswith(digest.lower()):
        raise SpecError(
            f"`digest`={digest!r} is not that of {path}: its SHA-256 begins with"
            f" {actual[:_SHORTEST_DIGEST]}; give that, or copy the right file to this node"
            " (`sha256sum` shows the digest)"
        )


def leader(
    model: ModelSpec,
    spec: DeploymentSpec,
    capacity: ClusterCapacity,
    *,
    seat: str,
    revision: int,
    avoid: Sequence[str] = (),
) -> Application:
    """The leader of a group, as an application or for `gateways`.

    Args:
        model: settings of the group's model.
        spec: the deployment.
        capacity: of the cluster.
        seat: place of the group in the deployment.
        revision: of the settings.
        avoid: ids of nodes on which nothing of the group may start.

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
        log_format=spec.log_format,
        guard=model.guard or "",
    )
    deployment = serve.deployment(
        name=f"group-{seat}",
        num_replicas=1,
        ray_actor_options={"num_cpus": SERVICE_CPUS},
        placement_group_bundles=[{"CPU": SERVICE_CPUS}, *placement.bundles(cpus, device)],
        placement_group_strategy="SPREAD" if model.placement.stages == "spread" else "PACK",
        **placement.labels(avoid),
        health_check_period_s=spec.health.period_s,
        health_check_timeout_s=spec.health.timeout_s,
        graceful_shutdown_wait_loop_s=0.1,
        graceful_shutdown_timeout_s=spec.health.drain_s + _STOP_MARGIN_S,
    )(Leader)
    return deployment.bind(settings)
