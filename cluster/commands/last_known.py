"""What `arriero status` knows without Admin: the state file, processes, and open ports.

Knows the state file, the head of a local cluster and sockets; knows nothing of Ray's API, which
waits minutes for a head that is gone.
"""

from __future__ import annotations

import socket
from pathlib import Path

from arriero.cluster import deployment_file as state
from arriero.cluster.commands import remote_admin
from arriero.cluster.deployment_file import Deployment
from arriero.shards.errors import Unavailable

_CONNECT_S = 1.0


def check_head(state_dir: Path | None) -> None:
    """Check the head of the deployment's local cluster, within some seconds.

    Raises:
        Unavailable: the head is gone; the error tells what still runs, and the remedy.
    """
    deployment = None if remote_admin.chosen() else state.read(state.state_folder(state_dir))
    if deployment is None or deployment.local_session is None or not deployment.ray_address:
        return
    from arriero.cluster.connection import checked_access

    try:
        checked_access(deployment)
    except Unavailable as error:
        add_to(error, state_dir)
        raise


def add_to(error: Unavailable, state_dir: Path | None) -> None:
    """Note in an error what the state file knows and which ports still answer."""
    if remote_admin.chosen() is not None:
        return
    folder = state.state_folder(state_dir)
    deployment = state.read(folder)
    if deployment is not None:
        error.add_note(f"last known ({folder}): {_words(deployment)}")


def _words(deployment: Deployment) -> str:
    ports = [
        ("gateway", deployment.gateway),
        ("HTTP", deployment.http),
        ("Admin", deployment.admin),
    ]
    words = [
        f"{name} at {address} {'still listens' if _listens(address) else 'is gone'}"
        for name, address in ports
        if address
    ]
    cluster = f"Ray at {deployment.ray_address or '(starting)'}"
    if deployment.local_session is not None:
        from arriero.cluster.connection import cluster_of
        from arriero.cluster.hosts import local_cluster as local

        known = cluster_of(deployment)
        alive = known is not None and local.is_alive(known)
        cluster += f", local, {'some processes still run' if alive else 'no process runs'}"
    return "; ".join([cluster, *words])


def _listens(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_S).close()
    except (OSError, ValueError):
        return False
    return True
