"""Start and end of a deployment, for the commands `up`, `down`, `demo` and `bench`.

Knows the order of the steps; knows nothing of the terminal: a callback shows the progress.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arriero.cluster import deployment_file as state
from arriero.cluster import interrupts
from arriero.cluster.connection import cluster_of, connected, loopback
from arriero.cluster.deployment_file import Deployment
from arriero.cluster.hosts import local_cluster as local
from arriero.cluster.preflight import check_before_start
from arriero.cluster.registry.snapshot import RegistrySnapshot
from arriero.cluster.spec.deployment import DeploymentSpec
from arriero.cluster.undeploy import (
    START_S,
    STOP_MARGIN_S,
    clear_store,
    operator_lives,
    quiet_serve,
    undeploy,
    undeploy_within,
)
from arriero.shards.errors import (
    ArrieroError,
    CheckpointError,
    GroupFailed,
    SpecError,
    Unauthenticated,
    Unavailable,
)

if TYPE_CHECKING:
    from ray.actor import ActorHandle

    from arriero.cluster.control.operator import Operator
    from arriero.cluster.registry.history import Failure
    from arriero.cluster.registry.registry import Registry

ShowProgress = Callable[[str], None]
"""Shows the current step in a few words; called at each step and during waits."""
_FAILURES: dict[str, type[ArrieroError]] = {
    kind.__name__: kind for kind in (CheckpointError, SpecError, GroupFailed)
}
FAILED_LOGS = "failed-up-logs"
"""Folder, in the state folder, of the logs of the last local `up` that failed."""
_POLL_S = 0.1
_JOIN_LIMIT_S = 30.0
_PROBLEMS_S = 1.0
"""Seconds between two questions to the operator why groups wait."""


def up(
    spec: DeploymentSpec, folder: Path, show: ShowProgress, *, keep_logs: Path | None = None
) -> Deployment:
    """Deploy `spec`; returns when every group has generated a token and a gateway reaches them all.

    Checks the model folders first, and removes what a dead local deployment left behind. After a
    failure, stops the local cluster that `up` started, and notes the folder of its logs in the
    error.

    Args:
        spec: the deployment.
        folder: the state folder.
        show: shows the progress.
        keep_logs: folder for the logs of a failed start; None for the state folder.

    Raises:
        SpecError: a deployment is up already, or the cluster lacks resources of the spec.
        CheckpointError: a model folder is broken.
        Unauthenticated: the cluster to join needs a token that the user does not have.
        GroupFailed: a group could not start; the text is the first cause.
        Unavailable: no Ray cluster, or the start exceeded `health.start_timeout_s`.
    """
    if (old := state.read(folder)) is not None:
        _remove_dead(old, folder, show)
    address = spec.ray.address or os.environ.get("RAY_ADDRESS") or None
    if address == "local":  # Ray's word for a new local cluster
        address = None
    show("checking the spec, the models and the machine")
    check_before_start(spec, local=address is None)
    cluster, token = None, state.admin_token()
    try:
        with interrupts.deferred():  # no cluster may run that the state file does not name
            cluster = local.start(spec.ray) if address is None else None
            noted = _NotedDeployment(folder, _first_state(spec, address, cluster, token))
        show("starting a local Ray cluster" if cluster else f"joining the Ray cluster at {address}")
        importlib.import_module("ray.serve")  # a second of work, while the local cluster starts
        if cluster is not None:
            noted.note(ray_address=local.wait_address(cluster))
        with connected(noted.deployment):
            _deploy(spec, show, noted, shared=cluster is None)
    except BaseException as error:
        with interrupts.ignored():
            if cluster is not None:
                show("stopping the local Ray cluster")
                _stop_failed(cluster, folder if keep_logs is None else keep_logs, error)
            state.clear(folder)
        raise
    return noted.deployment


def _first_state(
    spec: DeploymentSpec, address: str | None, cluster: local.LocalCluster | None, token: str
) -> Deployment:
    """The state of a deployment that has just begun to start."""
    return Deployment(
        ray_address=address or "",
        node_address=cluster.node_address if cluster else loopback(address or ""),
        local_session=cluster.session if cluster else None,
        local_folder=str(cluster.folder) if cluster else None,
        admin_token=token,
        ray_token=cluster.token if cluster else "",
        stop_s=max(spec.health.drain_s, spec.gateway.drain_s) + STOP_MARGIN_S,
    )


class _NotedDeployment:
    """A deployment whose state file follows each change, for commands that run meanwhile."""

    def __init__(self, folder: Path, deployment: Deployment) -> None:
        self._folder = folder
        self.deployment = deployment
        state.write(folder, deployment)

    def note(self, **fields: Any) -> None:  # noqa: ANN401
        """Change fields of the deployment."""
        self.deployment = replace(self.deployment, **fields)
        state.write(self._folder, self.deployment)


def _remove_dead(old: Deployment, folder: Path, show: ShowProgress) -> None:
    """Remove what a deployment left behind whose local cluster has no head any more.

    Raises:
        SpecError: the deployment is up, or may be up on a cluster that was joined.
    """
    cluster = cluster_of(old)
    starting = not old.ray_address  # another `up`, whose head may not run yet
    if cluster is None or (local.is_alive(cluster) and (starting or local.has_head(cluster))):
        raise SpecError(
            f"a deployment is up already (gateway {old.gateway or 'not listening yet'});"
            " end it with `arriero down`, or give another --state-dir"
        )
    show("removing the rest of a dead deployment")
    local.stop(cluster)
    state.clear(folder)


def _stop_failed(cluster: local.LocalCluster, folder: Path, error: BaseException) -> None:
    """Stop a cluster whose deployment failed; keeps the logs unless the user interrupted `up`."""
    if not isinstance(error, Exception):
        local.stop(cluster)
        return
    logs = folder / FAILED_LOGS
    local.stop(cluster, keep_logs=logs)
    error.add_note(f"logs of the failed start: {logs}")


def down(folder: Path, show: ShowProgress, *, force: bool = False) -> bool:
    """End the deployment that `up` started, and nothing else; False without a deployment.

    Running streams may finish within `health.drain_s`, unless the head of a local cluster is gone.

    Args:
        folder: the state folder.
        show: shows the progress.
        force: let no stream finish, and forget a joined cluster that cannot be reached.

    Raises:
        Unauthenticated: the joined cluster needs a token that the user does not have; nothing
            changes.
        Unavailable: the joined cluster cannot be reached; the state file is removed.
    """
    deployment = state.read(folder)
    if deployment is None:
        return False
    cluster = cluster_of(deployment)
    remove_state = True
    try:
        if cluster is None:
            show("ending the groups" if force else "draining")
            _undeploy_joined(deployment, show, force=force)
        elif deployment.gateway and not force and local.is_alive(cluster):
            show("draining")
            with contextlib.suppress(Unavailable):  # all processes end below
                undeploy_within(deployment, START_S + deployment.stop_s, show)
    except Unauthenticated:  # a later `down` with the token can end the deployment
        remove_state = False
        raise
    finally:
        if cluster is not None:
            show("stopping the local Ray cluster")
            local.stop(cluster)
        if remove_state:
            state.clear(folder)
    return True


def _undeploy_joined(deployment: Deployment, show: ShowProgress, *, force: bool) -> None:
    stop_s = 0.0 if force else deployment.stop_s
    try:
        undeploy_within(deployment, START_S + stop_s, show, force=force)
    except Unavailable as error:
        if not force:
            raise Unavailable(f"{error}; the state of the deployment is removed") from None


def _deploy(
    spec: DeploymentSpec, show: ShowProgress, noted: _NotedDeployment, *, shared: bool
) -> None:
    """Deploy and wait; notes the addresses of Admin, gRPC and HTTP as soon as each is known."""
    import ray
    from ray import serve
    from ray.serve.config import ProxyLocation

    from arriero.cluster import app
    from arriero.cluster.control import operator
    from arriero.cluster.hosts.capacity import ClusterCapacity
    from arriero.cluster.planner.capacity_check import refuse_spec
    from arriero.cluster.registry import registry

    show("starting Ray Serve")
    registry_actor = registry.connect()  # starts while Serve starts
    quiet_serve()
    serve.start(proxy_location=ProxyLocation.Disabled)
    if app.NAME in serve.status().applications:
        raise SpecError(
            f"the Ray cluster serves an application `{app.NAME}` already; run `arriero down` with"
            " the --state-dir of that deployment, or give another --address"
        )
    before: Any = ray.get(registry_actor.snapshot.remote(), timeout=_JOIN_LIMIT_S)
    if not operator_lives():  # else the state of a clean-up that was cut off would count
        clear_store()
    try:
        capacity = ClusterCapacity.of_cluster(spec, shared=shared)
        refuse_spec(spec, capacity)
        token = noted.deployment.admin_token
        operator_actor = operator.connect(spec, shared=shared, token=token)
        try:
            limit_s = spec.health.start_timeout_s
            admin: Any = ray.get(operator_actor.admin_address.remote(), timeout=limit_s)
            _check_admin(spec, admin, token)
            ca, name = _admin_trust(spec)
            noted.note(admin=admin, admin_ca=ca, admin_name=name)
            show("starting the gateways")
            ray.get(operator_actor.deploy.remote(), timeout=limit_s)
        except ray.exceptions.GetTimeoutError:
            raise Unavailable(
                f"the operator gave no answer within `health.start_timeout_s`={limit_s:g}; raise"
                " the limit"
            ) from None
        except ray.exceptions.RayError as error:
            raise _cause_of(error) from None
        gateway, http = _wait(spec, registry_actor, operator_actor, before.failures, show)
        noted.note(gateway=gateway, http=http, console=spec.gateway.console_url(http))
    except BaseException:
        if shared:  # `up` stops a local cluster as a whole
            with interrupts.ignored():
                show("removing the deployment")
                undeploy()
        raise


def _admin_trust(spec: DeploymentSpec) -> tuple[str, str]:
    """Certificate authorities (PEM) and host name that Admin's certificate is checked against."""
    if spec.admin.tls is None:
        return "", ""
    return spec.admin.tls.ca.read_text(encoding="utf-8"), spec.admin.tls.name or ""


def _check_admin(spec: DeploymentSpec, address: str, token: str) -> None:
    """Call Admin once over TLS, so that `up` refuses a wrong certificate.

    Raises:
        SpecError: the certificate does not pass.
    """
    from arriero.cluster.control.admin_client import AdminClient

    if spec.admin.tls is None:
        return
    ca, name = _admin_trust(spec)
    with AdminClient(address, token, ca=ca, name=name) as client:
        try:
            client.events(1)
        except Unavailable as error:
            raise SpecError(
                f"`admin.tls`: the certificate at {address} does not pass; it must be signed by"
                f" `ca` and valid for `name`={name or address.rpartition(':')[0]!r}: {error}"
            ) from None


def _cause_of(error: Exception) -> ArrieroError:
    """The arriero error behind an error of Ray; the operator did not start."""
    cause = getattr(error, "cause", None)
    while isinstance(cause, BaseException) and not isinstance(cause, ArrieroError):
        cause = cause.__cause__
    if isinstance(cause, ArrieroError):
        return cause
    last = next((line for line in reversed(str(error).splitlines()) if line.strip()), "")
    for kind in (CheckpointError, SpecError):
        _, mark, text = last.partition(f"{kind.__name__}: ")
        if mark:
            return kind(text)
    return GroupFailed(f"the operator did not start: {last.strip()}")


def _wait(
    spec: DeploymentSpec,
    registry_actor: ActorHandle[Registry],
    operator_actor: ActorHandle[Operator],
    old: tuple[Failure, ...],
    show: ShowProgress,
) -> tuple[str, str]:
    """Wait until all groups serve; returns a gateway's addresses: gRPC, and HTTP or ""."""
    import ray
    from ray import serve

    from arriero.cluster.control.applications import is_ours

    num_groups = sum(model.groups for model in spec.models)
    deadline_s = time.monotonic() + spec.health.start_timeout_s
    problems: Any = {}
    next_problems_s = 0.0
    while True:
        snapshot: Any = ray.get(registry_actor.snapshot.remote(), timeout=_JOIN_LIMIT_S)
        new = [failure for failure in snapshot.failures if failure not in old]
        if new:
            first = new[0]
            kind = _FAILURES.get(first.kind, GroupFailed)
            raise kind(f"{first.who} cannot serve: {first.cause}")
        gateway = max(snapshot.gateways, key=lambda entry: len(entry.linked), default=None)
        applications = serve.status().applications
        lacks_guard = spec.gateway.prompt_guard is not None and not _gateways_run(applications)
        linked = gateway is not None and len(gateway.linked) >= num_groups
        if gateway is not None and linked and not lacks_guard:
            return gateway.address, gateway.http
        for name, status in applications.items():
            if is_ours(name) and status.status == "DEPLOY_FAILED":
                raise GroupFailed(f"Ray Serve could not deploy {name}: {status.message.strip()}")
        if time.monotonic() > next_problems_s:
            problems = ray.get(operator_actor.problems.remote(), timeout=_JOIN_LIMIT_S)
            next_problems_s = time.monotonic() + _PROBLEMS_S
        if time.monotonic() > deadline_s:
            raise Unavailable(
                f"{len(snapshot.groups)} of {num_groups} groups and"
                f" {len(snapshot.gateways)} gateways serve, and the best gateway"
                f" ({'none' if gateway is None else gateway.address}) reaches"
                f" {0 if gateway is None else len(gateway.linked)} groups, after"
                f" `health.start_timeout_s`={spec.health.start_timeout_s:g}; raise the limit"
                + ("; Prompt Guard does not run" if linked else "")
                + "".join(f"; {seat} {text}" for seat, text in problems.items())
            )
        starting = _progress(snapshot, num_groups, problems)
        show("starting Prompt Guard" if linked else starting)
        time.sleep(_POLL_S)


def _gateways_run(applications: Mapping[str, Any]) -> bool:
    """Whether the application of the gateways runs with all that belongs to it, by Serve."""
    from arriero.cluster import app

    return app.NAME in applications and applications[app.NAME].status == "RUNNING"


def _progress(snapshot: RegistrySnapshot, num_groups: int, problems: Mapping[str, str]) -> str:
    if len(snapshot.groups) >= num_groups:
        return "connecting the gateway to the groups"
    starts = [f"{seat}: {text}" for seat, text in problems.items()]
    starts += [f"{group_id}: {text}" for group_id, text in snapshot.progress.items()]
    return "; ".join(starts) or "starting leaders"
