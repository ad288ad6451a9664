"""Groups and gateways as the registry knows them; plain data that actors send to each other."""

from __future__ import annotations

from dataclasses import dataclass, field

from arriero.cluster.registry.history import Failure
from arriero.cluster.spec.live_settings import LiveSettings
from arriero.router.observability.model_groups import ModelGroups
from arriero.shards.engine.stats import EngineStats


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupEntry:
    """One serving group.

    Attributes:
        group_id: seat and epoch; unique among all groups of all times.
        model: name of the model.
        address: of the leader's link.
        seat: place of the group in the deployment.
        epoch: number of the group among all groups of the seat.
        revision: of the model's settings.
        digest: of weights and numerics.
        layout: text for people, such as "TP1 x PP2 bfloat16".
        phase: "starting", "serving", or "draining" after the last request was accepted.
        node: address of the leader's node.
        node_id: Ray's id of the leader's node.
        pid: process of the leader.
        slice_pids: processes of the slices, by rank.
        slice_nodes: addresses of the slices' nodes, by rank.
        slice_node_ids: Ray's ids of the slices' nodes, by rank.
        stats: load of the engine at the last renewal.
        start_s: seconds from placed slices to the first token.
        link_token: secret that the leader requires from gateways.
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
    stats: EngineStats = field(default_factory=EngineStats)
    start_s: float = 0.0
    link_token: str = field(default="", repr=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class GatewayEntry:
    """One gateway.

    Attributes:
        id: unique among all gateways of all times.
        address: of gRPC, for clients.
        http: address of HTTP; "" for none.
        pid: process of the gateway.
        node_id: Ray's id of the node.
        linked: ids of the groups with an open link.
    """

    id: str
    address: str
    http: str = ""
    pid: int = 0
    node_id: str = ""
    linked: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class RegistrySnapshot:
    """State of the registry at one moment.

    Attributes:
        version: changes with `groups`, `fenced` and `live`.
        groups: all that serve or drain.
        gateways: all that listen.
        progress: progress of each start, by group id.
        starting: groups that start and whose slices are placed; without address and digest.
        failures: the latest failures, newest last.
        fenced: ids of the latest fenced groups.
        demand: by model, requests that wait in gateways and the longest predicted wait, in seconds.
        live: settings that `reload` changed; None for none.
        spares: seats of spare groups.
        standby: spare seats whose group is ready on standby.
        wanted: desired number of groups by model, as the operator last said.
        epochs: by seat, the number of groups that ever started there.
    """

    version: int
    groups: tuple[GroupEntry, ...]
    gateways: tuple[GatewayEntry, ...]
    progress: dict[str, str]
    failures: tuple[Failure, ...]
    starting: tuple[GroupEntry, ...] = ()
    fenced: tuple[str, ...] = ()
    demand: dict[str, tuple[int, float]] = field(default_factory=dict)
    live: LiveSettings | None = None
    spares: tuple[str, ...] = ()
    standby: tuple[str, ...] = ()
    wanted: dict[str, int] = field(default_factory=dict)
    epochs: dict[str, int] = field(default_factory=dict)

    def model_groups(self) -> dict[str, ModelGroups]:
        """The groups of each model in numbers, for the metrics of a gateway."""
        serving = [group for group in self.groups if group.phase == "serving"]
        models = {*self.wanted, *(group.model for group in serving)}
        return {
            model: ModelGroups(
                wanted=self.wanted.get(model, 0),
                starts=sum(
                    epoch for seat, epoch in self.epochs.items() if seat.rpartition("-")[0] == model
                ),
                start_s={
                    group.group_id: group.start_s for group in serving if group.model == model
                },
            )
            for model in models
        }
