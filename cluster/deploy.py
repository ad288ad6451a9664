"""Start and end of a deployment, for the commands `up`, `down`, `demo` and `bench`.

Knows the order of the steps; knows nothing of the terminal: a callback shows the progress.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arriero.cluster import deployment_file as state
from arriero.cluster.deployment_file import Deployment
from arriero.cluster.hosts import local_cluster as local
from arriero.cluster.hosts import ray_access
from arriero.cluster.planner import model_check
from arriero.cluster.registry.snapshot import RegistrySnapshot
from arriero.cluster.spec.deployment import DeploymentSpec
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

    from arriero.cluster.registry.history import Failure
    from arriero.cluster.registry.registry import Registry

ShowProgress = Callable[[str], None]
"""Shows the current step in a few words; called at each step and during waits."""
_FAILURES: dict[str, type[ArrieroError]] = {
    kind.__name__: kind for kind in (CheckpointError, SpecError, GroupFailed)
}
_POLL_S = 0.1
_JOIN_LIMIT_S = 30.0


def up(spec: DeploymentSpec, folder: Path, show: ShowProgress) -> Deployment:
    """Deploy `spec`; returns when every group has generated a token and a gateway reaches them all.

    Checks the model folders first. After a failure, stops the local cluster that `up` started.

    Args:
        spec: the deployment.
        folder: the state folder.
        show: shows the progress.

    Raises:
        SpecError: a deployment is up already, or the cluster lacks resources of the spec.
        CheckpointError: a model folder is broken.
        Unauthenticated: the cluster to join needs a token that the user does not have.
        GroupFailed: a group could not start; the text is the first cause.
        Unavailable: no Ray cluster, or the start exceeded `health.start_timeout_s`.
    """
    if (old := state.read(folder)) is not None and _is_up(old):
        raise SpecError(
            f"a deployment is up already (gateway {old.gateway or 'not listening yet'});"
            " end it with `arriero down`, or give another --state-dir"
        )
    show("checking the models' files")
    model_check.check_models(spec.models)
    address = spec.ray.address or os.environ.get("RAY_ADDRESS") or None
    if address == "local":  # Ray's word for a new local cluster
        address = None
    cluster = None
    if address is None:
        cluster = local.start(spec.ray)
    deployment = Deployment(
        ray_address=address or "",
        node_address=cluster.node_address if cluster else _loopback(address or ""),
        local_session=cluster.session if cluster else None,
        local_folder=str(cluster.folder) if cluster else None,
        admin_token=secrets.token_urlsafe(32),
        ray_token=cluster.token if cluster else "",
    )
    try:
        state.write(folder, deployment)
        show("starting a local Ray cluster" if cluster else f"joining the Ray cluster at {address}")
        importlib.import_module("ray.serve")  # a second of work, while the local cluster starts
        if cluster is not None:
            deployment = replace(deployment, ray_address=local.wait_address(cluster))
            state.write(folder, deployment)
        with connected(deployment):
            addresses = _deploy(spec, show, deployment.admin_token, shared=cluster is None)
        gateway, http, admin = addresses
        deployment = replace(deployment, gateway=gateway, http=http, admin=admin)
        ca, name = _admin_trust(spec)
        deployment = replace(deployment, admin_ca=ca, admin_name=name)
        state.write(folder, deployment)
    except BaseException:
        if cluster is not None:
            show("stopping the local Ray cluster")
            local.stop(cluster)
        state.clear(folder)
        raise
    return deployment


def down(folder: Path, show: ShowProgress) -> bool:
    """End the deployment that `up` started, and nothing else; False without a deployment.

    Running streams may finish within `health.drain_s`.

    Raises:
        Unauthenticated: the joined cluster needs a token that the user does not have; nothing
            changes.
        Unavailable: the cluster cannot be reached; the state file is removed.
    """
    deployment = state.read(folder)
    if deployment is None:
        return False
    cluster = _cluster(deployment)
    remove_state = True
    try:
        if cluster is None or (local.is_alive(cluster) and deployment.gateway):
            show("draining")
            with connected(deployment):
                _undeploy()
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


def snapshot(deployment: Deployment) -> RegistrySnapshot:
    """The snapshot of the deployment's registry.

    Raises:
        Unavailable: the cluster or the registry cannot be reached.
    """
    import ray

    from arriero.cluster.registry import registry

    cluster = _cluster(deployment)
    if cluster is not None and not local.is_alive(cluster):
        raise Unavailable(
            "the local Ray cluster has ended; `arriero down` removes the rest of the deployment"
        )
    with connected(deployment):
        try:
            actor = ray.get_actor(registry.NAME, namespace=registry.NAMESPACE)
            current: Any = ray.get(actor.snapshot.remote(), timeout=_JOIN_LIMIT_S)
        except (ValueError, ray.exceptions.RayError) as error:
            raise Unavailable(f"no registry at {deployment.ray_address}: {error}") from None
        assert isinstance(current, RegistrySnapshot)
        return current


@contextmanager
def connected(deployment: Deployment) -> Iterator[None]:
    """Connects this process as a driver to the deployment's cluster.

    Raises:
        Unauthenticated: the joined cluster needs a token that the user does not have.
        Unavailable: the cluster cannot be reached.
    """
    import ray

    from arriero.cluster.hosts import ray_private
    from arriero.cluster.registry import registry

    cluster = _cluster(deployment)
    joined = deployment.ray_address
    access = cluster.access if cluster is not None else ray_access.joined_cluster(joined)
    with ray_access.applied(access):
        try:
            ray.init(
                address=deployment.ray_address,
                namespace=registry.NAMESPACE,
                log_to_driver=False,
                logging_level=logging.ERROR,
                **ray_private.driver_options(deployment.node_address),
            )
        except ray.exceptions.AuthenticationError as error:
            raise Unauthenticated(
                f"the Ray cluster at {deployment.ray_address}: {error.message}"
            ) from None
        except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
            raise Unavailable(
                f"no Ray cluster at {deployment.ray_address}: {' '.join(str(error).split())}"
            ) from None
        try:
            yield
        finally:
            ray.shutdown()


def _deploy(
    spec: DeploymentSpec, show: ShowProgress, token: str, *, shared: bool
) -> tuple[str, str, str]:
    """Deploy and wait; returns the addresses of gRPC, HTTP ("" for none) and Admin."""
    import ray
    from ray import serve
    from ray.serve.config import ProxyLocation

    from arriero.cluster import app
    from arriero.cluster.control import operator
    from arriero.cluster.registry import registry

    show("starting Ray Serve")
    registry_actor = registry.connect()  # starts while Serve starts
    _quiet_serve()
    serve.start(proxy_location=ProxyLocation.Disabled)
    if app.NAME in serve.status().applications:
        raise SpecError(
            f"the Ray cluster serves an application `{app.NAME}` already; run `arriero down` with"
            " the --state-dir of that deployment, or give another --address"
        )
    before: Any = ray.get(registry_actor.snapshot.remote(), timeout=_JOIN_LIMIT_S)
    try:
        capacity = app.ClusterCapacity.of_cluster(spec, shared=shared)
        for model in spec.models:  # raises before anything starts if GPUs are missing
            app.leader(model, spec, capacity, seat=model.name, revision=0)
        operator_actor = operator.connect(spec, shared=shared, token=token)
        try:
            admin: Any = ray.get(
                operator_actor.deploy.remote(), timeout=spec.health.start_timeout_s
            )
        except ray.exceptions.RayError as error:
            raise _cause_of(error) from None
        _check_admin(spec, admin, token)
        gateway, http = _wait(spec, registry_actor, before.failures, show)
        return gateway, http, admin
    except BaseException:
        if shared:  # `up` stops a local cluster as a whole
            show("removing the deployment")
            _undeploy()
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
    old: tuple[Failure, ...],
    show: ShowProgress,
) -> tuple[str, str]:
    """Wait until all groups serve; returns a gateway's addresses: gRPC, and HTTP or ""."""
    import ray
    from ray import serve

    from arriero.cluster.control.applications import is_ours

    num_groups = sum(model.groups for model in spec.models)
    deadline_s = time.monotonic() + spec.health.start_timeout_s
    while True:
        snapshot: Any = ray.get(registry_actor.snapshot.remote(), timeout=_JOIN_LIMIT_S)
        new = [failure for failure in snapshot.failures if failure not in old]
        if new:
            first = new[0]
            kind = _FAILURES.get(first.kind, GroupFailed)
            raise kind(f"{first.who} cannot serve: {first.cause}")
        gateway = max(snapshot.gateways, key=lambda entry: len(entry.linked), default=None)
        if gateway is not None and len(gateway.linked) >= num_groups:
            return gateway.address, gateway.http
        for name, status in serve.status().applications.items():
            if is_ours(name) and status.status == "DEPLOY_FAILED":
                raise GroupFailed(f"Ray Serve could not deploy {name}: {status.message.strip()}")
        if time.monotonic() > deadline_s:
            raise Unavailable(
                f"{len(snapshot.groups)} of {num_groups} groups and"
                f" {len(snapshot.gateways)} gateways serve, and the best gateway"
                f" ({'none' if gateway is None else gateway.address}) reaches"
                f" {0 if gateway is None else len(gateway.linked)} groups, after"
                f" `health.start_timeout_s`={spec.health.start_timeout_s:g}; raise the limit"
            )
        show(_progress(snapshot, num_groups))
        time.sleep(_POLL_S)


def _progress(snapshot: RegistrySnapshot, num_groups: int) -> str:
    if len(snapshot.groups) >= num_groups:
        return "connecting the gateway to the groups"
    starts = [f"{group_id}: {text}" for group_id, text in snapshot.progress.items()]
    return "; ".join(starts) or "starting leaders"


def _undeploy() -> None:
    import ray
    from ray import serve

    from arriero.cluster.control import operator
    from arriero.cluster.control.applications import is_ours
    from arriero.cluster.hosts import kv_store as store
    from arriero.cluster.hosts import ray_private
    from arriero.cluster.registry import registry

    _quiet_serve()
    with contextlib.suppress(ValueError):  # first: a living operator would restart the groups
        ray.kill(ray.get_actor(operator.NAME, namespace=registry.NAMESPACE))
    ours = [name for name in serve.status().applications if is_ours(name)]
    for name in ours:
        ray_private.delete_application(name)
    while set(ours) & set(serve.status().applications):
        time.sleep(_POLL_S)
    with contextlib.suppress(ValueError):
        ray.kill(ray.get_actor(registry.NAME, namespace=registry.NAMESPACE))
    for key in (operator.NAME, *registry.STORED):
        store.clear(key)


def _quiet_serve() -> None:
    # Serve's import sets the level of this logger; call after the import. `show` gives progress.
    logging.getLogger("ray.serve").setLevel(logging.ERROR)


def _loopback(address: str) -> str | None:
    """The driver's address for a cluster on a loopback address; None lets Ray choose."""
    host = address.removeprefix("ray://").rpartition(":")[0]
    return host if host.startswith("127.") else None


def _is_up(deployment: Deployment) -> bool:
    cluster = _cluster(deployment)
    return local.is_alive(cluster) if cluster is not None else True


def _cluster(deployment: Deployment) -> local.LocalCluster | None:
    if deployment.local_session is None or deployment.local_folder is None:
        return None
    return local.LocalCluster(
        session=deployment.local_session,
        folder=Path(deployment.local_folder),
        node_address=deployment.node_address or "",
        token=deployment.ray_token,
    )
