"""A gateway's reads of the cluster's state: the operator answers, and checks the admin token.

Knows the operator's method; knows nothing of tokens and roles.
"""

from __future__ import annotations

import ray

from arriero.cluster.registry.registry import NAMESPACE
from arriero.cluster.replica.adapter_changes import OPERATOR
from arriero.shards.errors import PermissionDenied, Unauthenticated, Unavailable


async def read_cluster(authorization: str) -> str:
    """The state of the cluster as JSON; see `router.http.console.routes.ReadCluster`.

    Raises:
        Unauthenticated, PermissionDenied: no admin token, or one of a role that is too low.
        Unavailable: the operator does not answer.
    """
    try:
        operator = ray.get_actor(OPERATOR, NAMESPACE)
        kind, text = await operator.read_cluster.remote(authorization)
    except (ray.exceptions.RayError, ValueError):
        raise Unavailable("the operator does not answer; try again") from None
    if kind == Unauthenticated.__name__:
        raise Unauthenticated(text)
    if kind:
        raise PermissionDenied(text)
    return str(text)
