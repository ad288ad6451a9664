"""Admin's pushes: checked by all groups, stored, then taken by one group after another."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from arriero.cluster.control import weight_admin
from arriero.cluster.control.desired_state import ModelState, OperatorState, Revision
from arriero.cluster.control.weight_admin import WeightAdmin
from arriero.cluster.registry.snapshot import GroupEntry, RegistrySnapshot
from arriero.cluster.replica.weight_actions import WantedWeights, WeightArguments, WeightReport
from arriero.cluster.spec.model import ModelSpec
from arriero.router.proto.arriero.v1 import admin_pb2 as pb
from arriero.shards.engine.holds import HoldStatus, Kind
from arriero.shards.errors import InvalidRequest, NotFound
from arriero.shards.protocol import wire


class Leader:
    """A leader that takes weights at once, but for broken paths."""

    def __init__(self) -> None:
        self.kinds: list[str] = []
        self.sources: tuple[str, ...] = ()
        self.broken: set[str] = set()

    def answer(self, arguments: WeightArguments) -> WeightReport:
        change, error = arguments.change, ""
        if change is not None:
            self.kinds.append(change.kind)
            if self.broken & set(change.sources):
                error = "tensor x has the wrong shape"
            elif change.kind is Kind.PUSH:
                self.sources = change.sources
        status = HoldStatus(sources=self.sources, digest="d" * 32, checked="c")
        return WeightReport(status=status, error=error)


class Deployment:
    """A `WeightAdmin` over leaders, without Ray."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.leaders = {"a": Leader(), "b": Leader()}
        self.model = ModelSpec(name="m", path="m")
        self.state = OperatorState({}, True)
        first = Revision(1, self.model.model_dump(mode="json"), "d")
        self.state.models["m"] = ModelState(2, [first])
        self.spec = SimpleNamespace(link_tls=None)
        self.published: dict[str, WantedWeights] = {}
        self.order: list[str] = []
        monkeypatch.setattr(weight_admin, "ask_leader", self.ask)
        monkeypatch.setattr(weight_admin.kv_store, "put", self.put)
        self.admin = WeightAdmin(self, self)  # type: ignore[arg-type]

    async def ask(
        self,
        leader: tuple[str, str],
        context: object,
        action: str,
        arguments: Any,  # noqa: ANN401
        *_: object,
    ) -> WeightReport:
        if arguments.change is not None and arguments.change.kind is Kind.PUSH:
            self.order.append(leader[0])
            await asyncio.sleep(0.01)
        report: WeightReport = wire.decode(
            wire.encode(self.leaders[leader[0]].answer(arguments)), WeightReport
        )
        return report

    def put(self, name: str, value: dict[str, WantedWeights]) -> None:
        self.published = value

    def settings(self, name: str) -> ModelSpec:
        return self.model

    def save(self) -> None:
        self.state = wire.decode(wire.encode(self.state), OperatorState)

    @property
    def groups(self) -> RegistrySnapshot:
        entries = [GroupEntry(group_id=f"m-{n}.1", model="m", address=n) for n in self.leaders]
        return RegistrySnapshot(
            version=1, groups=tuple(entries), gateways=(), progress={}, failures={}
        )

    @property
    def snapshot(self) -> Any:  # noqa: ANN401
        async def remote() -> RegistrySnapshot:
            return self.groups

        return SimpleNamespace(remote=remote)

    @property
    def note(self) -> Any:  # noqa: ANN401
        async def remote(*_: str) -> None:
            return None

        return SimpleNamespace(remote=remote)

    async def settle(self) -> pb.ModelWeights:
        """Run the operator's loop until the push has ended."""
        for _ in range(200):
            self.admin.assign(self.groups)
            await asyncio.sleep(0.01)
            shown = await self.admin.weights(pb.WeightsRequest(action="status"))
            if shown.models[0].settled or shown.models[0].error:
                break
        return shown.models[0]

    async def push(self, path: str) -> pb.ModelWeights:
        await self.admin.weights(pb.WeightsRequest(action="push", model="m", path=path))
        return await self.settle()


@pytest.fixture
def deployment(monkeypatch: pytest.MonkeyPatch) -> Deployment:
    return Deployment(monkeypatch)


async def test_all_groups_check_before_any_changes(deployment: Deployment, tmp_path: Path) -> None:
    whole, delta = tmp_path / "whole", tmp_path / "delta.safetensors"
    whole.mkdir()
    (whole / "config.json").write_text("{}")
    state = await deployment.push(str(delta))
    assert state.settled and not state.error and list(state.sources) == [str(delta)]
    assert deployment.order == ["a", "b"], "one group after another"
    for leader in deployment.leaders.values():
        assert leader.kinds == [Kind.CHECK, Kind.PUSH] and leader.sources == (str(delta),)
    state = await deployment.push(str(tmp_path / "other"))
    assert list(state.sources) == [str(delta), str(tmp_path / "other")]
    state = await deployment.push(str(whole))
    assert list(state.sources) == [str(whole)] and state.version == 3
    assert deployment.published["m"].sources == (str(whole),)
    deployment.leaders["c"] = Leader()  # a group that starts later
    assert (await deployment.settle()).settled
    assert deployment.leaders["c"].sources == (str(whole),)


async def test_refused_weights_change_no_group(deployment: Deployment) -> None:
    deployment.leaders["b"].broken.add("/bad")
    state = await deployment.push("/bad")
    assert "m-b.1" in state.error and "wrong shape" in state.error
    assert not deployment.order and not deployment.published
    assert deployment.state.models["m"].weights is None
    with pytest.raises(InvalidRequest, match="not absolute"):
        await deployment.push("relative")
    with pytest.raises(InvalidRequest, match="unknown"):
        await deployment.admin.weights(pb.WeightsRequest(action="pull"))


async def test_another_folder_in_the_spec_replaces_pushed_weights(deployment: Deployment) -> None:
    await deployment.push("/delta")
    deployment.model = ModelSpec(name="m", path="another")
    state = (await deployment.admin.weights(pb.WeightsRequest(action="status"))).models[0]
    assert state.version == 0 and not state.sources


async def test_holds_name_groups_and_modes(deployment: Deployment) -> None:
    answer = await deployment.admin.hold(pb.HoldRequest(action="pause", name="m-a.1", mode="wait"))
    assert [group.group for group in answer.groups] == ["m-a.1"]
    assert deployment.leaders["a"].kinds == [Kind.PAUSE] and not deployment.leaders["b"].kinds
    with pytest.raises(NotFound, match="no group"):
        await deployment.admin.hold(pb.HoldRequest(action="wake", name="x"))
    for wrong in (
        {"action": "doze"},
        {"action": "sleep", "level": 7},
        {"action": "pause", "mode": "x"},
    ):
        with pytest.raises(InvalidRequest, match="is unknown"):
            await deployment.admin.hold(pb.HoldRequest(**wrong))  # type: ignore[arg-type]
