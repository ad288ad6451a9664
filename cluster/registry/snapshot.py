"""What the registry shows: groups, gateways, and a snapshot of all there is.

Plain data that actors send each other.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from arriero.cluster.registry.history import Failure
from arriero.cluster.spec.live_settings import LiveSettings


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupEntry:
    """One serving group.

    Attributes:
        group_id: unique among all groups that ever were: seat and epoch.
        model: its name.
        address: of the leader's link.
        seat: its place in the deployment.
        epoch: counts the lives of the seat.
        revision: of the model's settings.
        digest: of its weights and arithmetic.
        layout: words for people, such as "TP1 x PP2 bfloat16".
        phase: "serving", or "draining" once it takes no more requests.
        node: address of the leader's node.
        node_id: Ray's name for it.
        pid: of the leader.
        slice_pids: processes of its slices, by rank.
        slice_nodes: addresses of their nodes, by rank.
        slice_node_ids: Ray's names for these.
        stats: the engine's counters at the last renewal.
        link_token: what its leader asks gateways for.
    """

    group_id: str
    model: str
    address: str
    seat: str = ""
    epoch: int = 0
    revision: int = 0
    digest: str = ""
    layout: str = ""
    phase: str = "serving"
    node: str = ""
    node_id: str = ""
    pid: int = 0
    slice_pids: tuple[int, ...] = ()
    slice_nodes: tuple[str, ...] = ()
    slice_node_ids: tuple[str, ...] = ()
    stats: dict[str, Any] = field(default_factory=dict)
    link_token: str = field(default="", repr=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class GatewayEntry:
    """One gateway.

    Attributes:
        id: unique among the gateways that ever were.
        address: of gRPC, as clients reach it.
        http: of HTTP; "" for none.
        pid: its process.
        node_id: Ray's name for its node.
        linked: groups that it can pass requests to.
    """

    id: str
    address: str
    http: str = ""
    pid: int = 0
    node_id: str = ""
    linked: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class RegistrySnapshot:
    """A snapshot.

    Attributes:
        version: changes with `groups`, `fenced` and `live`.
        groups: those that serve or drain.
        gateways: those that listen.
        progress: how far starts are, by group id.
        failures: the latest ones, newest last.
        fenced: the latest groups that are not to be heard any more.
        demand: by model, requests that wait in gateways and the longest predicted wait, in seconds.
        live: settings that were changed while everything runs; None for none.
        spares: seats whose groups are to stand by.
        standby: those of them that do.
    """

    version: int
    groups: tuple[GroupEntry, ...]
    gateways: tuple[GatewayEntry, ...]
    progress: dict[str, str]
    failures: tuple[Failure, ...]
    fenced: tuple[str, ...] = ()
    demand: dict[str, tuple[int, float]] = field(default_factory=dict)
    live: LiveSettings | None = None
    spares: tuple[str, ...] = ()
    standby: tuple[str, ...] = ()
