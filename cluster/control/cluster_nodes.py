"""The nodes of the Ray cluster, as Admin shows them. Knows Ray; knows nothing of groups."""

from __future__ import annotations

import ray

from arriero.cluster.control.node_drain import Node
from arriero.cluster.hosts import ray_private

_HEAD = "node:__internal_head__"


def read() -> list[Node]:
    """All nodes, those that are gone included."""
    free = ray_private.free_resources()
    return [
        Node(
            id=node["NodeID"],
            address=node["NodeManagerAddress"],
            hostname=node["NodeManagerHostname"],
            alive=node["Alive"],
            head=_HEAD in node["Resources"],
            resources=dict(node["Resources"]),
            free=dict(free.get(node["NodeID"], {})),
        )
        for node in ray.nodes()  # type: ignore[no-untyped-call]
    ]
