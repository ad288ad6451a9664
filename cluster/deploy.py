"""Bringing a deployment up and taking it down: what `up`, `down`, `demo` and `bench` share.

Knows the order of things; knows nothing of the terminal (progress is told to a callback).
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

Say = Callable[[str], None]
"""Told in a few words what is waited for; called again as that changes."""
_FAILURES: dict[str, type[ArrieroError]] = {
    kind.__name__: kind for kind in (CheckpointError, SpecError, GroupFailed)
}
_POLL_S = 0.1
_JOIN_LIMIT_S = 30.0


def up(spec: DeploymentSpec, folder: Path, say: Say) -> Deployment:
    """Deploy `spec`; returns once a token came out of every group and a gateway listens.

    Model folders are checked before anything is started. A local cluster that was started for it
    is stopped again if that fails.

    Args:
        spec: the deployment.
        folder: the state folder.
        say: progress.

    Raises:
        SpecError: something is deployed already, or the cluster lacks what is asked for.
        CheckpointError: a model folder is not what it should be.
        Unauthenticated: the cluster to join asks for a token that the user does not have.
        GroupFailed: a group could not start; the text is the first cause.
        Unavailable: no Ray cluster, or not in time.
    """
    if (old := state.read(folder)) is not None and _is_up(old):
        raise SpecError(
            f"a deployment is up already (gateway {old.gateway or 'not listening yet'});"
            " `arriero down` takes it down, or --state-dir keeps several apart"
        )
    say("checking the models' files")
    model_check.check_models(spec.models)
    address = spec.ray.address or os.environ.get("RAY_ADDRESS") or None
    if address == "local":  # Ray's own word for none of those that run
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
        say("starting a local Ray cluster" if cluster else f"joining the Ray cluster at {address}")
        importlib.import_module("ray.serve")  # takes a second, while the local cluster starts
        if cluster is not None:
            deployment = replace(deployment, ray_address=local.wait_address(cluster))
            state.write(folder, deployment)
        with connected(deployment):
            served = _deploy(spec, say, deployment.admin_token, shared=cluster is None)
        gateway, http, admin = served
        deployment = replace(deployment, gateway=gateway, http=http, admin=admin)
        ca, name = _admin_trust(spec)
        deployment = replace(deployment, admin_ca=ca, admin_name=name)
        state.write(folder, deployment)
    except BaseException:
        if cluster is not None:
            say("stopping the local Ray cluster")
            local.stop(cluster)
        state.clear(folder)
        raise
    return deployment


def down(folder: Path, say: Say) -> bool:
    """Take down what `up` brought up, and only that; False when there was nothing.

    Streams that run may end within the spec's `drain_s`.

    Raises:
        Unauthenticated: a joined cluster asks for a token that is not here; all stays as it was.
        Unavailable: the cluster cannot be reached; the deployment is forgotten.
    """
    deployment = state.read(folder)
    if deployment is None:
        return False
    cluster = _cluster(deployment)
    forget = True
    try:
        if cluster is None or (local.is_alive(cluster) and deployment.gateway):
            say("draining")
            with connected(deployment):
                _undeploy()
    except Unauthenticated:  # another try, with the joined cluster's token, can take it down
        forget = False
        raise
    finally:
        if cluster is not None:
            say("stopping the local Ray cluster")
            local.stop(cluster)
        if forget:
            state.clear(folder)
    return True


def snapshot(deployment: Deployment) -> RegistrySnapshot:
    """What the deployment's registry knows.

    Raises:
        Unavailable: the cluster or the registry cannot be reached.
    """
    import ray

    from arriero.cluster.registry import registry

    cluster = _cluster(deployment)
    if cluster is not None and not local.is_alive(cluster):
        raise Unavailable("the local Ray cluster is gone; `arriero down` clears what is left")
    with connected(deployment):
        try:
            actor = ray.get_actor(registry.NAME, namespace=registry.NAMESPACE)
            found: Any = ray.get(actor.snapshot.remote(), timeout=_JOIN_LIMIT_S)
        except (ValueError, ray.exceptions.RayError) as error:
            raise Unavailable(f"no registry at {deployment.ray_address}: {error}") from None
        assert isinstance(found, RegistrySnapshot)
        return found


@contextmanager
def connected(deployment: Deployment) -> Iterator[None]:
    """This process as a driver on the deployment's cluster.

    Raises:
        Unauthenticated: a joined cluster asks for a token that the user does not have.
        Unavailable: the cluster cannot be reached.
    """
    import ray

    from arriero.cluster.registry import registry

    cluster = _cluster(deployment)
    joined = deployment.ray_address
    access = cluster.access if cluster is not None else ray_access.joined_cluster(joined)
    options: dict[str, Any] = {}
    if deployment.node_address is not None:
        options["_node_ip_address"] = deployment.node_address
    with ray_access.applied(access):
        try:
            ray.init(
                address=deployment.ray_address,
                namespace=registry.NAMESPACE,
                log_to_driver=False,
                logging_level=logging.ERROR,
                **options,
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


def _deploy(spec: DeploymentSpec, say: Say, token: str, *, shared: bool) -> tuple[str, str, str]:
    """Deploy and wait; gives the addresses of gRPC, HTTP ("" for none) and Admin."""
    import ray
    from ray import serve
    from ray.serve.config import ProxyLocation

    from arriero.cluster import app
    from arriero.cluster.control import operator
    from arriero.cluster.registry import registry

    say("starting Ray Serve")
    directory = registry.connect()  # starts while Serve does
    _hush_serve()
    serve.start(proxy_location=ProxyLocation.Disabled)
    if app.NAME in serve.status().applications:
        raise SpecError(
            f"the Ray cluster serves an application `{app.NAME}` already; take it down where it"
            " was brought up, or give another cluster"
        )
    before: Any = ray.get(directory.snapshot.remote(), timeout=_JOIN_LIMIT_S)
    try:
        room = app.ClusterCapacity.of_cluster(spec, shared=shared)
        for model in spec.models:  # what cannot be is said before anything starts
            app.leader(model, spec, room, seat=model.name, revision=0)
        manager = operator.connect(spec, shared=shared, token=token)
        try:
            admin: Any = ray.get(manager.deploy.remote(), timeout=spec.health.start_timeout_s)
        except ray.exceptions.RayError as error:
            raise _cause_of(error) from None
        _check_admin(spec, admin, token)
        gateway, http = _wait(spec, directory, before.failures, say)
        return gateway, http, admin
    except BaseException:
        if shared:  # a local cluster is stopped as a whole
            say("taking it down again")
            _undeploy()
        raise


def _admin_trust(spec: DeploymentSpec) -> tuple[str, str]:
    """What the command line checks Admin's certificate by: authorities in PEM, and a name."""
    if spec.admin.tls is None:
        return "", ""
    return spec.admin.tls.ca.read_text(encoding="utf-8"), spec.admin.tls.name or ""


def _check_admin(spec: DeploymentSpec, address: str, token: str) -> None:
    """Ask Admin once over TLS, so that a certificate that nobody believes is found now.

    Raises:
        SpecError: it does not answer so.
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
                f"`admin.tls`: its certificate is not believed at {address}: it must be from `ca`,"
                f" and for `name`={name or address.rpartition(':')[0]!r}: {error}"
            ) from None


def _cause_of(error: Exception) -> ArrieroError:
    """Why the operator did not start, in words."""
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
    spec: DeploymentSpec, directory: ActorHandle[Registry], old: tuple[Failure, ...], say: Say
) -> tuple[str, str]:
    """Wait until all of it serves; gives a gateway's addresses: gRPC, and HTTP or ""."""
    import ray
    from ray import serve

    from arriero.cluster import app
    from arriero.cluster.control import operator

    wanted = sum(model.groups for model in spec.models)
    deadline_s = time.monotonic() + spec.health.start_timeout_s
    while True:
        snapshot: Any = ray.get(directory.snapshot.remote(), timeout=_JOIN_LIMIT_S)
        new = [one for one in snapshot.failures if one not in old]
        if new:
            first = new[0]
            kind = _FAILURES.get(first.kind, GroupFailed)
            raise kind(f"{first.who} cannot serve: {first.cause}")
        gateway = max(snapshot.gateways, key=lambda one: len(one.linked), default=None)
        if gateway is not None and len(gateway.linked) >= wanted:
            return gateway.address, gateway.http
        for name, status in serve.status().applications.items():
            ours = name == app.NAME or name.startswith(operator.PREFIX)
            if ours and status.status == "DEPLOY_FAILED":
                raise GroupFailed(f"Ray Serve could not deploy {name}: {status.message.strip()}")
        if time.monotonic() > deadline_s:
            raise Unavailable(
                f"{len(snapshot.groups)} of {wanted} groups and"
                f" {len(snapshot.gateways)} gateways serve,"
                f" and {'none' if gateway is None else gateway.address} reaches"
                f" {0 if gateway is None else len(gateway.linked)} groups, after"
                f" health.start_timeout_s={spec.health.start_timeout_s:g}"
            )
        say(_progress(snapshot, wanted))
        time.sleep(_POLL_S)


def _progress(snapshot: RegistrySnapshot, wanted: int) -> str:
    if len(snapshot.groups) >= wanted:
        return "linking the gateway"
    told = [f"{group_id}: {text}" for group_id, text in snapshot.progress.items()]
    return "; ".join(told) or "starting leaders"


def _undeploy() -> None:
    import ray
    from ray import serve

    from arriero.cluster import app
    from arriero.cluster.control import operator
    from arriero.cluster.hosts import kv_store as store
    from arriero.cluster.registry import registry

    _hush_serve()
    with contextlib.suppress(ValueError):  # first, or it would start the groups again
        ray.kill(ray.get_actor(operator.NAME, namespace=registry.NAMESPACE))
    ours = [
        name
        for name in serve.status().applications
        if name == app.NAME or name.startswith(operator.PREFIX)
    ]
    for name in ours:
        serve.delete(name, _blocking=False)
    while set(ours) & set(serve.status().applications):
        time.sleep(_POLL_S)
    with contextlib.suppress(ValueError):
        ray.kill(ray.get_actor(registry.NAME, namespace=registry.NAMESPACE))
    for kept in (operator.NAME, "epochs", "fenced", "history", "live", "spares"):
        store.clear(kept)


def _hush_serve() -> None:
    # importing Serve sets its logger up, so this comes after; we tell progress ourselves
    logging.getLogger("ray.serve").setLevel(logging.ERROR)


def _loopback(address: str) -> str | None:
    """The driver's own address on a cluster of this machine; Ray finds it for all others."""
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
