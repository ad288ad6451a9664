"""Nodes that are drained: which node a name means, and which groups must leave. Sans-I/O.

No group starts on a drained node, and its groups are replaced on other nodes, as far as these have
room; a group without room elsewhere serves on. Knows nodes and registry entries; knows nothing of
Ray and of actions.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field

from arriero.cluster.registry.snapshot import GroupEntry
from arriero.shards.errors import InvalidRequest, NotFound

_LEAST_ID = 4
"""Least number of characters of a node's id that may name the node."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """A node of the cluster.

    Attributes:
        id: Ray's id.
        address, hostname: as Ray reports them.
        alive: whether Ray counts the node as alive.
        head: whether the node has the head of the cluster.
        resources: all resources, free or not.
        free: free resources.
    """

    id: str
    address: str
    hostname: str = ""
    alive: bool = True
    head: bool = False
    resources: dict[str, float] = field(default_factory=dict)
    free: dict[str, float] = field(default_factory=dict)


def find_node(name: str, nodes: Iterable[Node]) -> Node:
    """The node that is alive and has this address, host name, or start of an id.

    Raises:
        NotFound: no node has the name.
        InvalidRequest: several nodes have the name.
    """
    alive = [node for node in nodes if node.alive]
    matches = [
        node
        for node in alive
        if name in (node.id, node.address, node.hostname)
        or (len(name) >= _LEAST_ID and node.id.startswith(name))
    ]
    known = ", ".join(f"{node.address} ({node.id[:8]})" for node in alive)
    if not matches:
        raise NotFound(f"no node {name[:128]!r} is alive; the nodes are {known}")
    if len(matches) > 1:
        raise InvalidRequest("name", f"{name[:128]!r} names several nodes; give an id of: {known}")
    return matches[0]


def groups_on(node_ids: Collection[str], entries: Iterable[GroupEntry]) -> list[GroupEntry]:
    """Groups with the leader or a slice on one of the nodes."""
    ids = set(node_ids)
    return [entry for entry in entries if ids & {entry.node_id, *entry.slice_node_ids}]


def leaving(
    node_ids: Collection[str],
    entries: Iterable[GroupEntry],
    has_room: Callable[[str], bool],
) -> dict[str, frozenset[str]]:
    """Seats by model whose groups must leave drained nodes.

    Args:
        node_ids: the drained nodes.
        entries: groups that serve or start.
        has_room: whether the other nodes can hold all groups of a model.
    """
    seats: dict[str, set[str]] = {}
    for entry in groups_on(node_ids, entries):
        seats.setdefault(entry.model, set()).add(entry.seat)
    return {model: frozenset(names) for model, names in seats.items() if has_room(model)}
