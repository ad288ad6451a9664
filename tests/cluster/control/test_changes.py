"""Changes through Admin: what cannot be is refused at once, and nothing stops or changes."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
import yaml

from arriero.cluster.control import changes as changes_module
from arriero.cluster.control import cluster_nodes
from arriero.cluster.control.adapter_admin import AdapterAdmin
from arriero.cluster.control.admin_client import AdminClient
from arriero.cluster.control.admin_roles import AdminToken, Role
from arriero.cluster.control.admin_server import AdminServer
from arriero.cluster.control.applications import Applications
from arriero.cluster.control.changes import DeploymentChanges
from arriero.cluster.control.deployment_view import DeploymentView
from arriero.cluster.control.desired_state import ModelState, Revision, SeatState
from arriero.cluster.control.node_drain import Node
from arriero.cluster.control.placement_tracker import PlacementTracker
from arriero.cluster.control.reconcile import GroupSeat, Phase, Stop, reconcile
from arriero.cluster.control.state_store import StateStore
from arriero.cluster.control.weight_admin import WeightAdmin
from arriero.cluster.hosts import kv_store, ray_private
from arriero.cluster.hosts.capacity import ClusterCapacity
from arriero.cluster.spec.deployment import DeploymentSpec
from arriero.router.proto.arriero.v1 import admin_pb2 as pb
from arriero.shards.errors import InvalidRequest

T = TypeVar("T")

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 72,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "float32",
}
OWNER = AdminToken.of("up", Role.OWN, "token")
REFUSED_WITHIN_S = 3.0
NODES = ({"CPU": 4.1}, {"CPU": 4.1})


@dataclass
class Calls:
    """Every method of the registry; records the calls that change, and answers with nothing."""

    made: list[str] = field(default_factory=list)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        calls = self.made

        class Method:
            async def remote(self, *values: object) -> list[Any]:
                if name != "events":
                    calls.append(name)
                return []

        return Method()


@dataclass
class Deployed:
    """An operator's Admin without Ray."""

    store: StateStore
    view: DeploymentView
    registry: Calls
    address: str
    nodes: list[dict[str, float]]
    spec: dict[str, Any]

    async def call(self, method: Callable[[AdminClient], T]) -> T:
        """Call Admin as the command line does, from a thread."""

        def run() -> T:
            with AdminClient(self.address, "token") as client:
                return method(client)

        return await asyncio.to_thread(run)

    async def rollout(self, **model: Any) -> str:  # noqa: ANN401
        spec = self.spec | {"models": [self.spec["models"][0] | model]}
        return await self.call(lambda client: client.rollout(yaml.safe_dump(spec), force=False))


@pytest.fixture
def deployed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:  # noqa: ANN401
    """A context with Admin of a deployment: a group of the model `m` on two nodes of 4 CPUs."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    spec = {"models": [{"name": "m", "path": str(tmp_path), "device": "cpu", "mesh": {"tp": 1}}]}
    nodes, ids = [dict(node) for node in NODES], list[str]()

    def capacity(spec: DeploymentSpec, *, shared: bool) -> ClusterCapacity:
        capacity = ClusterCapacity(num_cpus=8, num_gpus=0, cpus_per_slice=1.0, nodes=tuple(nodes))
        prompt_guard = spec.gateway.prompt_guard
        return replace(capacity, node_ids=tuple(ids), prompt_guard=prompt_guard)

    async def digest(model: object, *, check: bool = True) -> str:
        return "d1"

    monkeypatch.setattr(ray_private, "free_resources", dict)
    monkeypatch.setattr(kv_store, "get", lambda name, kind: None)
    monkeypatch.setattr(kv_store, "put", lambda name, value: None)
    monkeypatch.setattr(ClusterCapacity, "of_cluster", staticmethod(capacity))
    monkeypatch.setattr(changes_module, "weights_digest", digest)

    @asynccontextmanager
    async def start(node_ids: Sequence[str] = ()) -> AsyncIterator[Deployed]:
        ids[:] = node_ids
        parsed = DeploymentSpec.model_validate(spec)
        store = StateStore(parsed.model_dump(mode="json"), True, OWNER)
        first = Revision(1, parsed.models[0].model_dump(mode="json"), "d1")
        store.state.models["m"] = ModelState(1, [first])
        store.state.seats["m-0"] = SeatState("m", 1)
        registry, applications = Calls(), Applications()
        view = DeploymentView(store, applications, PlacementTracker())
        changes = DeploymentChanges(
            store,
            applications,
            registry,  # type: ignore[arg-type]
            on_change=lambda: None,
            on_count_settings=lambda model: None,
        )
        admins = AdapterAdmin(store, registry), WeightAdmin(store, registry)  # type: ignore[arg-type]
        server = AdminServer(store, view, changes, registry, *admins)  # type: ignore[arg-type]
        address = await server.start("127.0.0.1", 0, None)
        try:
            yield Deployed(store, view, registry, address, nodes, spec)
        finally:
            assert server._server is not None
            await server._server.stop(0)

    return start


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"mesh": {"tp": 10}}, "model `m`: `tp`=10 must be 1 to 9, the model's query heads"),
        ({"limits": {"max_model_len": 100_000}}, "`max_model_len`=100000 must be 1 to 8192"),
        ({"mesh": {"dp": 2}}, "`dp`=2, `ep`=None: a dense model has no experts to spread"),
        ({"mesh": {"tp": 9}}, "`mesh` TP9 has 9 slices: .* lower `mesh.tp`"),
        ({"groups": 1000}, "`groups`=1000 exceeds 8, .* lower `groups` to 8 or less"),
        ({"mesh": {"pp": 3}, "groups": 3}, "`groups`=3 exceeds 2, "),
    ],
)
async def test_a_rollout_that_cannot_be_is_refused(
    deployed: Any,  # noqa: ANN401
    change: dict[str, Any],
    text: str,
) -> None:
    async with deployed() as now:
        begun_s = time.monotonic()
        with pytest.raises(InvalidRequest, match=text):
            await now.rollout(**change)
        assert time.monotonic() - begun_s < REFUSED_WITHIN_S
        state = now.store.state
        assert len(state.models["m"].revisions) == 1 and state.models["m"].count == 1
        assert not state.seats["m-0"].stopping
        assert now.registry.made == []  # no event, and nothing went to the groups


async def test_a_rollout_that_fits(deployed: Any) -> None:  # noqa: ANN401
    async with deployed() as now:
        assert "revision 2" in await now.rollout(mesh={"pp": 2}, groups=2)
        assert now.store.state.models["m"].count == 2


async def test_prompt_guard_takes_room_from_the_groups(deployed: Any) -> None:  # noqa: ANN401
    async with deployed() as now:
        folder = now.spec["models"][0]["path"]
        for replicas, cpus, words in (
            (7, 1, "`replicas`=7 with `cpus`=1 do not fit .* leave 6.98 CPUs"),
            (1, 5, "`replicas`=1 with `cpus`=5 do not fit"),
        ):
            guard = {"path": folder, "replicas": replicas, "cpus": cpus}
            now.spec["gateway"] = {"prompt_guard": guard}
            with pytest.raises(InvalidRequest, match=words):
                await now.rollout()
        now.spec["gateway"] = {"prompt_guard": {"path": folder, "replicas": 3}}
        with pytest.raises(InvalidRequest, match=r"`groups`=6 exceeds 5, .* 3 CPUs of Prompt"):
            await now.rollout(groups=6)


async def test_scale_ends_at_the_room(deployed: Any) -> None:  # noqa: ANN401
    async with deployed() as now:
        with pytest.raises(InvalidRequest, match="`groups`=1000 exceeds 8"):
            await now.call(lambda client: client.scale("m", 1000))
        assert now.store.state.models["m"].count == 1
        assert "1 to 8 groups" in await now.call(lambda client: client.scale("m", 8))
        now.nodes.pop()  # after the loss of a node, fewer groups are no wish for more
        assert "8 to 7 groups" in await now.call(lambda client: client.scale("m", 7))


async def test_a_roll_back_needs_room_too(deployed: Any) -> None:  # noqa: ANN401
    async with deployed() as now:
        await now.rollout(mesh={"tp": 4}, groups=1)
        await now.rollout(mesh={"tp": 1}, groups=1)
        now.nodes[:] = [{"CPU": 2.1}]
        with pytest.raises(InvalidRequest, match="`mesh` TP4 has 4 slices"):
            await now.call(lambda client: client.rollback("m"))
        assert now.store.state.models["m"].current.number == 3


async def test_a_revision_that_lost_its_room_waits(deployed: Any) -> None:  # noqa: ANN401
    async with deployed() as now:
        await now.rollout(mesh={"tp": 4}, groups=1)
        seat = GroupSeat(name="m-0", model="m", revision=1, phase=Phase.SERVING)
        stop = Stop(seat="m-0", why="revision 2 replaces it")
        assert reconcile(now.view.desired_models(), [seat]) == [stop]  # no room for both at once
        now.nodes[:] = [{"CPU": 2.1}]
        assert reconcile(now.view.desired_models(), [seat]) == []


def with_models(now: Deployed, *models: dict[str, Any]) -> str:
    base = now.spec["models"][0]
    return yaml.safe_dump(now.spec | {"models": [base | model for model in models]})


async def test_a_dry_run_changes_nothing(deployed: Any) -> None:  # noqa: ANN401
    async with deployed() as now:
        request = pb.RolloutRequest(spec=with_models(now, {"groups": 2}), dry_run=True)
        change: pb.ChangeResponse = await now.call(lambda client: client.change_spec(request))
        assert list(change.details) == [
            "models[m].groups: 1 -> 2 (at once)",
            "m: 1 to 2 groups; fits: 2 of at most 8 groups",
        ]
        assert now.store.state.models["m"].count == 1 and now.registry.made == []


async def test_models_come_and_go(deployed: Any) -> None:  # noqa: ANN401
    async with deployed() as now:
        both = pb.RolloutRequest(spec=with_models(now, {}, {"name": "n", "groups": 2}))
        change = await now.call(lambda client: client.change_spec(both))
        assert change.text == "n: added" and now.store.state.models["n"].count == 2
        now.store.state.seats["n-0"] = SeatState("n", 1)
        one = with_models(now, {})
        with pytest.raises(InvalidRequest, match="the spec lacks `n`, which serves"):
            await now.call(lambda client: client.change_spec(pb.RolloutRequest(spec=one)))
        pruned = pb.RolloutRequest(spec=one, prune=True)
        change = await now.call(lambda client: client.change_spec(pruned))
        assert change.text == "n: removed" and list(now.store.state.models) == ["m"]
        seat = GroupSeat(name="n-0", model="n", revision=1, phase=Phase.SERVING)
        assert reconcile({}, [seat]) == [Stop(seat="n-0", why="its model is no longer wanted")]
        assert now.view.start_problem("n-0") == ""
        too_many = pb.RolloutRequest(spec=with_models(now, {}, {"name": "n", "groups": 9}))
        with pytest.raises(InvalidRequest, match="model `n`: `groups`=9 exceeds 7"):
            await now.call(lambda client: client.change_spec(too_many))


async def test_the_spec_that_holds(deployed: Any) -> None:  # noqa: ANN401
    async with deployed() as now:
        await now.call(lambda client: client.scale("m", 3))
        spec = DeploymentSpec.model_validate_json(await now.call(lambda client: client.spec()))
        assert spec.models[0].groups == 3


async def test_a_pause_and_a_deadline(deployed: Any) -> None:  # noqa: ANN401
    async with deployed() as now:
        spec = with_models(now, {"mesh": {"pp": 2}})
        request = pb.RolloutRequest(spec=spec, deadline_s=60)
        await now.call(lambda client: client.change_spec(request))
        state = now.store.state.models["m"]
        assert state.deadline is not None and state.deadline.limit_s == 60
        text = await now.call(lambda client: client.pause_rollout("m", paused=True))
        assert "rollout resume m" in text and state.paused and state.deadline.ends_at == 0
        assert now.view.desired_models()["m"].paused
        await now.call(lambda client: client.pause_rollout("m", paused=False))
        assert not state.paused and state.deadline.ends_at > time.time()
        with pytest.raises(InvalidRequest, match="`deadline_s`=-1"):
            negative = pb.RolloutRequest(spec=spec, deadline_s=-1)
            await now.call(lambda client: client.change_spec(negative))


async def test_a_drained_node_has_no_room(
    deployed: Any,  # noqa: ANN401
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    nodes = [Node(id=f"{name}" * 8, address=f"10.0.0.{name}") for name in (1, 2)]
    monkeypatch.setattr(cluster_nodes, "read", lambda: nodes)
    async with deployed(node_ids=[node.id for node in nodes]) as now:
        text = await now.call(lambda client: client.drain_node("10.0.0.1"))
        assert "no group starts there" in text
        assert now.store.state.drained_nodes == [nodes[0].id]
        with pytest.raises(InvalidRequest, match="`groups`=5 exceeds 4"):
            await now.call(lambda client: client.scale("m", 5))
        await now.call(lambda client: client.drain_node("10.0.0.1", undo=True))
        with pytest.raises(InvalidRequest, match="is not drained"):
            await now.call(lambda client: client.drain_node("10.0.0.1", undo=True))
        await now.call(lambda client: client.scale("m", 5))
