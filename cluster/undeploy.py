"""The end of a deployment's applications and actors, within a limit.

Knows which applications and actors belong to a deployment; knows nothing of local clusters' ends.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import signal
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

from arriero.cluster.connection import checked_access, connected
from arriero.cluster.deployment_file import Deployment
from arriero.shards.errors import ArrieroError, Unavailable

START_S = 20.0
"""Seconds for the imports and the connection of the process that ends a deployment."""
STOP_MARGIN_S = 20.0
"""Seconds beyond the drain within which the groups' and gateways' processes end."""
_POLL_S = 0.1
_HEAD_CHECK_S = 2.0


def undeploy_within(
    deployment: Deployment, limit_s: float, show: Callable[[str], None], *, force: bool = False
) -> None:
    """End a deployment's applications; gives up at once when the head is gone.

    The work runs in a process of its own: Ray's calls have no time limit, and wait minutes for a
    head that is gone.

    Args:
        deployment: of the state file.
        limit_s: seconds for the whole work.
        show: shows the progress; called repeatedly.
        force: do not wait until the streams and the processes have ended.

    Raises:
        Unauthenticated: the joined cluster needs a token that the user does not have.
        Unavailable: the head is gone, or the work exceeded `limit_s`.
    """
    checked_access(deployment)
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_undeploy_there, args=(deployment, force, sender), daemon=True)
    process.start()
    sender.close()
    deadline_s = time.monotonic() + limit_s
    next_check_s = time.monotonic() + _HEAD_CHECK_S
    try:
        while not receiver.poll(_POLL_S):
            show("ending the groups" if force else "draining")
            now_s = time.monotonic()
            if now_s > deadline_s:
                raise Unavailable(f"the deployment did not end within {limit_s:g} s")
            if now_s > next_check_s:
                checked_access(deployment)
                next_check_s = time.monotonic() + _HEAD_CHECK_S
        try:
            error: ArrieroError | None = receiver.recv()
        except EOFError:
            error = Unavailable("the process that ends the deployment has died")
        if error is not None:
            raise error
    finally:
        process.kill()
        process.join()
        receiver.close()


def undeploy(*, force: bool = False) -> None:
    """End the applications and actors on the connected cluster.

    Args:
        force: do not wait until the applications have ended.
    """
    import ray
    from ray import serve

    from arriero.cluster.control import state_store
    from arriero.cluster.control.applications import is_ours
    from arriero.cluster.control.received_folders import delete_on_nodes, folders_to_delete
    from arriero.cluster.hosts import kv_store, ray_private
    from arriero.cluster.registry import registry
    from arriero.cluster.replica import response_archive, weight_actions

    quiet_serve()
    with contextlib.suppress(ValueError):  # first: a living operator would restart the groups
        ray.kill(ray.get_actor(state_store.NAME, namespace=registry.NAMESPACE))
    ours = {name for name in serve.status().applications if is_ours(name)}
    for name in ours:
        ray_private.delete_application(name)
    while not force and ours & set(serve.status().applications):
        time.sleep(_POLL_S)
    for actor in (registry.NAME, response_archive.NAME):
        with contextlib.suppress(ValueError):
            ray.kill(ray.get_actor(actor, namespace=registry.NAMESPACE))
    pushed = kv_store.get(weight_actions.STORED, dict[str, weight_actions.WantedWeights])
    delete_on_nodes(folders_to_delete(pushed or {}))
    clear_store()


def operator_lives() -> bool:
    """Whether the cluster that this process is connected to has an operator."""
    import ray

    from arriero.cluster.control import state_store
    from arriero.cluster.registry import registry

    try:
        ray.get_actor(state_store.NAME, namespace=registry.NAMESPACE)
    except ValueError:
        return False
    return True


def clear_store() -> None:
    """Forget the deployment before: the operator's state, and what the registry stored."""
    from arriero.cluster.control import admin_roles, state_store
    from arriero.cluster.hosts import kv_store as store
    from arriero.cluster.registry import registry

    for key in (state_store.NAME, admin_roles.STORED, *registry.STORED):
        store.clear(key)


def quiet_serve() -> None:
    """Silence Serve's own messages; call after the import of Serve, which sets the level."""
    logging.getLogger("ray.serve").setLevel(logging.ERROR)


def _undeploy_there(deployment: Deployment, force: bool, sender: Connection) -> None:
    """Connect, undeploy, and send the error, or None for none."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent kills this process at its own end
    error: ArrieroError | None = None
    try:
        with connected(deployment):
            undeploy(force=force)
    except ArrieroError as raised:
        error = raised
    except Exception as raised:
        error = Unavailable(f"the deployment could not be ended: {' '.join(str(raised).split())}")
    sender.send(error)
