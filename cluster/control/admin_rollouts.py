"""Admin's answers about rollouts, nodes and the spec.

Knows messages; knows nothing of gRPC and of the meaning of a change (`changes`).
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Collection, Iterable, Iterator

from arriero.cluster.control import cluster_nodes
from arriero.cluster.control.changes import DeploymentChanges
from arriero.cluster.control.desired_state import ModelState
from arriero.cluster.control.node_drain import Node, groups_on
from arriero.cluster.control.state_store import StateStore
from arriero.cluster.registry.snapshot import RegistrySnapshot
from arriero.router.proto.arriero.v1 import admin_pb2 as pb
from arriero.shards.errors import InvalidRequest


class RolloutAdmin:
    """Methods of Admin.

    Args:
        store: the desired state.
        changes: makes the changes.
    """

    def __init__(self, store: StateStore, changes: DeploymentChanges) -> None:
        self._store, self._changes = store, changes

    async def pause_rollout(self, request: pb.PauseRolloutRequest) -> pb.ChangeResponse:
        """Pause or resume the rollout of a model."""
        text = await self._changes.pause_rollout(request.model, paused=request.paused)
        return pb.ChangeResponse(text=text)

    async def drain_node(self, request: pb.DrainNodeRequest) -> pb.ChangeResponse:
        """Drain a node, or take the drain back."""
        text = await self._changes.drain_node(request.name, undo=request.undo)
        return pb.ChangeResponse(text=text)

    async def get_spec(self, request: pb.GetSpecRequest) -> pb.GetSpecResponse:
        """The spec with the settings and counts that hold now."""
        models = tuple(
            self._store.settings(name).model_copy(update={"groups": state.count})
            for name, state in self._store.state.models.items()
        )
        spec = self._store.spec.model_copy(update={"models": models})
        return pb.GetSpecResponse(spec=spec.model_dump_json())


def check_deadline(deadline_s: float) -> float:
    """The deadline of a rollout; 0 for none.

    Raises:
        InvalidRequest: the number is no time.
    """
    if not (math.isfinite(deadline_s) and deadline_s >= 0):
        raise InvalidRequest(
            "deadline_s", f"`deadline_s`={deadline_s} must be 0 (no deadline) or more seconds"
        )
    return deadline_s


def fill_rollout(status: pb.ModelStatus, state: ModelState) -> None:
    """Add the state of the rollout to the status of a model."""
    status.paused, status.rolled_back = state.paused, state.rolled_back
    if state.deadline is not None:
        status.deadline_left_s = state.deadline.remaining_s(time.time())


async def read_nodes() -> list[Node]:
    """The nodes of the cluster."""
    return await asyncio.to_thread(cluster_nodes.read)


def node_statuses(
    nodes: Iterable[Node], drained: Collection[str], snapshot: RegistrySnapshot
) -> Iterator[pb.NodeStatus]:
    """The nodes that are alive, with their groups; the head first."""
    entries = (*snapshot.groups, *snapshot.starting)
    alive = [node for node in nodes if node.alive]
    for node in sorted(alive, key=lambda node: (not node.head, node.address, node.id)):
        yield pb.NodeStatus(
            id=node.id,
            address=node.address,
            hostname=node.hostname,
            alive=node.alive,
            head=node.head,
            draining=node.id in drained,
            cpus=node.resources.get("CPU", 0.0),
            cpus_free=node.free.get("CPU", 0.0),
            gpus=node.resources.get("GPU", 0.0),
            gpus_free=node.free.get("GPU", 0.0),
            memory=int(node.resources.get("memory", 0.0)),
            groups=[entry.group_id for entry in groups_on([node.id], entries)],
        )
