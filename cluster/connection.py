"""The connection of a command to the Ray cluster of its deployment.

A command asks the head of the cluster first, because Ray itself waits minutes for a head that is
gone. Knows the state file, clusters and drivers; knows nothing of the applications on the cluster.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from arriero.cluster.deployment_file import Deployment
from arriero.cluster.hosts import local_cluster as local
from arriero.cluster.hosts import ray_access, ray_private
from arriero.shards.errors import Unauthenticated, Unavailable

_SERVE_NAMESPACE = "serve"
"""Namespace of Serve's actors; Serve's commands connect to no other."""


def cluster_of(deployment: Deployment) -> local.LocalCluster | None:
    """The local cluster that `up` started; None on a joined cluster."""
    if deployment.local_session is None or deployment.local_folder is None:
        return None
    return local.LocalCluster(
        session=deployment.local_session,
        folder=Path(deployment.local_folder),
        node_address=deployment.node_address or "",
        token=deployment.ray_token,
    )


def loopback(address: str) -> str | None:
    """The driver's address for a cluster on a loopback address; None lets Ray choose."""
    host = address.removeprefix("ray://").rpartition(":")[0]
    return host if host.startswith("127.") else None


@contextmanager
def connected(deployment: Deployment) -> Iterator[None]:
    """Connects this process as a driver to the deployment's cluster.

    Raises:
        Unauthenticated: the joined cluster needs a token that the user does not have.
        Unavailable: the cluster cannot be reached, or its head is gone.
    """
    access = checked_access(deployment)  # before the import of Ray, which takes seconds
    import ray

    from arriero.cluster.registry import registry

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


def connect_driver(address: str) -> None:
    """Connect this process to a cluster for the rest of its life, in the namespace of Ray Serve.

    Args:
        address: as Ray accepts addresses: host:port, "auto" or ray://host:port.

    Raises:
        Unauthenticated: the cluster needs a token that the user does not have.
        Unavailable: the cluster cannot be reached.
    """
    access = ray_access.joined_cluster(address)
    import ray

    ray_access.apply(access)
    options = ray_private.driver_options(loopback(address))
    try:
        ray.init(address=address, namespace=_SERVE_NAMESPACE, **options)
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        raise Unavailable(f"no Ray cluster at {address}: {' '.join(str(error).split())}") from None


def checked_access(deployment: Deployment) -> ray_access.Changes:
    """Environment variables of a driver on a cluster whose head answers.

    Raises:
        Unauthenticated: the joined cluster needs a token that the user does not have.
        Unavailable: the head does not answer, or a process of the local head has ended.
    """
    cluster = cluster_of(deployment)
    if cluster is None:
        return ray_access.joined_cluster(deployment.ray_address)
    remedy = "`arriero down` ends the rest of the deployment"
    if not local.has_head(cluster):
        raise Unavailable(f"the head of the local Ray cluster has ended; {remedy}")
    if not ray_access.gcs_answers(deployment.ray_address, cluster.token):
        raise Unavailable(
            f"the head of the local Ray cluster at {deployment.ray_address} gave no answer in"
            f" {ray_access.PROBE_S:g} s; {remedy}"
        )
    return cluster.access
