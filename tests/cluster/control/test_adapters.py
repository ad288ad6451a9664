"""Admin's adapters: refused by name before a leader is asked, stored when each group agrees."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from arriero.cluster.control import adapter_admin
from arriero.cluster.control.adapter_admin import AdapterAdmin
from arriero.cluster.control.adapter_calls import AdapterCalls
from arriero.cluster.control.admin_roles import AdminToken, AdminTokens, Role
from arriero.cluster.control.desired_state import ModelState, OperatorState, Revision
from arriero.cluster.registry.snapshot import GroupEntry, RegistrySnapshot
from arriero.cluster.replica.adapter_actions import (
    AdapterArguments,
    AdapterReport,
    GroupAdapter,
    WantedAdapter,
)
from arriero.cluster.spec.model import ModelSpec
from arriero.router.proto.arriero.v1 import admin_pb2 as pb
from arriero.shards.errors import InvalidRequest, NotFound, Unavailable
from arriero.shards.protocol import wire


@dataclass
class Leader:
    """A leader that serves what it is told, but for broken paths; gone leaders do not answer.

    `files` stands for the contents of the folders on the leader's node; `shown` has all adapters
    that it ever showed.
    """

    served: tuple[WantedAdapter, ...] = ()
    broken: set[str] = field(default_factory=set)
    gone: bool = False
    gone_after_prepare: bool = False
    files: str = "d"
    calls: int = 0
    shown: set[tuple[str, int]] = field(default_factory=set)

    def answer(self, arguments: AdapterArguments) -> AdapterReport:
        report = self._answer(arguments)
        self.shown |= {(adapter.name, adapter.version) for adapter in self.served}
        return report

    def _answer(self, arguments: AdapterArguments) -> AdapterReport:
        self.calls += 1
        if self.gone:
            raise Unavailable("no answer")
        if (a := arguments.prepare) is not None:
            self.gone = self.gone_after_prepare
            if a.path in self.broken:
                return AdapterReport(adapters=(GroupAdapter(name=a.name, error="wrong shape"),))
            entry = GroupAdapter(name=a.name, digest=f"{self.files}{a.version}")
            return AdapterReport(adapters=(entry,))
        if arguments.wanted is not None:
            self.served = tuple(a for a in arguments.wanted if a.path not in self.broken)
        errors = [a for a in arguments.wanted or () if a.path in self.broken]
        return AdapterReport(
            adapters=(
                *(GroupAdapter(name=a.name, digest=f"d{a.version}") for a in self.served),
                *(GroupAdapter(name=a.name, error="the shape is wrong") for a in errors),
            )
        )


class Deployment:
    """An `AdapterAdmin` over leaders, without Ray."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root, self.saves = root, 0
        self.leaders = {"a": Leader(), "b": Leader()}
        listed = [{"name": "listed", "path": str(root / "listed")}]
        able = ModelSpec(
            name="m",
            path="m",
            adapter_slots=2,
            adapter_root=root,
            adapters=listed,  # type: ignore[arg-type]
        )
        plain = ModelSpec(name="plain", path="p")
        self.by_name = {"m": able, "plain": plain}
        self.state = OperatorState({}, True)
        for name, settings in self.by_name.items():
            first = Revision(1, settings.model_dump(mode="json"), "d")
            self.state.models[name] = ModelState(1, [first])
        self.spec = SimpleNamespace(link_tls=None)
        self.notes: list[tuple[str, ...]] = []
        monkeypatch.setattr(adapter_admin, "ask_leader", self.ask)
        self.admin = self.start()

    def start(self) -> AdapterAdmin:
        """A new operator over the stored state."""
        return AdapterAdmin(self, self)  # type: ignore[arg-type]

    async def ask(
        self,
        leader: tuple[str, str],
        context: object,
        action: str,
        arguments: AdapterArguments,
        *_: object,
    ) -> AdapterReport:
        return self.leaders[leader[0]].answer(arguments)

    # as a StateStore

    def settings(self, name: str) -> ModelSpec:
        return self.by_name[name]

    def current_settings(self) -> list[ModelSpec]:
        return list(self.by_name.values())

    def save(self) -> None:
        self.state = wire.decode(wire.encode(self.state), OperatorState)
        self.saves += 1

    # as a registry

    @property
    def groups(self) -> RegistrySnapshot:
        entries = [GroupEntry(group_id=f"m-{n}.1", model="m", address=n) for n in self.leaders]
        return RegistrySnapshot(
            version=1, groups=tuple(entries), gateways=(), progress={}, failures=()
        )

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        async def remote(*values: Any) -> Any:  # noqa: ANN401
            if name == "snapshot":
                return self.groups
            self.notes.append(values)
            return None

        return SimpleNamespace(remote=remote)

    async def call(self, action: str, name: str = "", path: str = "", **more: Any) -> Any:  # noqa: ANN401
        where = str(self.root / path) if path and not path.startswith("/") else path
        request = pb.AdaptersRequest(action=action, name=name, path=where, **more)
        return await self.admin.adapters(request)

    async def settle(self) -> None:
        """As the operator's loop."""
        self.admin.assign(self.groups)
        await asyncio.gather(*self.admin._tasks.values())


@pytest.fixture
def deployment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Deployment:
    return Deployment(tmp_path, monkeypatch)


async def test_every_group_gets_an_adapter_and_later_groups_too(deployment: Deployment) -> None:
    await deployment.call("add", "poet", "poet")
    assert [a.name for leader in deployment.leaders.values() for a in leader.served] == ["poet"] * 2
    assert deployment.saves == 1 and deployment.notes
    listed = (await deployment.call("list")).adapters
    assert [(a.name, a.listed, len(a.groups)) for a in listed] == [
        ("listed", True, 0),
        ("poet", False, 2),
    ]


@pytest.mark.parametrize(
    ("name", "path", "more", "text"),
    [
        ("poet", "/etc/passwd", {}, "outside of `adapter_root`"),
        ("poet", "../poet", {}, "outside of `adapter_root`"),
        ("a name", "poet", {}, "`name`='a name'"),
        ("plain", "poet", {}, "is a model or another adapter"),
        ("listed", "poet", {"replace": True}, "is a model or another adapter"),
        ("poet", "poet", {"model": "plain"}, "has no `adapter_slots`"),
    ],
)
async def test_what_cannot_be_is_refused_by_name(
    deployment: Deployment, name: str, path: str, more: dict[str, Any], text: str
) -> None:
    with pytest.raises(InvalidRequest, match=text):
        await deployment.call("add", name, path, **more)
    assert not deployment.saves and not any(leader.calls for leader in deployment.leaders.values())


async def test_a_group_that_refuses_changes_nothing_anywhere(deployment: Deployment) -> None:
    await deployment.call("add", "poet", "poet")
    deployment.leaders["b"].broken = {str(deployment.root / "bad")}
    with pytest.raises(InvalidRequest, match=r"m-b\.1: wrong shape"):
        await deployment.call("add", "bad", "bad")
    with pytest.raises(InvalidRequest, match=r"m-b\.1: wrong shape"):
        await deployment.call("add", "poet", "bad", replace=True)
    deployment.leaders["b"].files = "other"
    with pytest.raises(InvalidRequest, match=r"m-b\.1: the files in .* are not those of group m-a"):
        await deployment.call("add", "clerk", "clerk")
    for leader in deployment.leaders.values():
        assert [a.name for a in leader.served] == ["poet"]
        assert leader.shown == {("poet", 1)}, "an adapter was seen before all groups had it"
    assert list(deployment.state.models["m"].adapters) == ["poet"] and deployment.saves == 1


async def test_a_group_that_is_lost_after_it_read_gets_the_adapter_later(
    deployment: Deployment,
) -> None:
    away = deployment.leaders["b"]
    away.gone_after_prepare = True
    await deployment.call("add", "poet", "poet")
    assert deployment.saves == 1 and not away.served
    away.gone = False
    await deployment.settle()
    assert [a.name for a in away.served] == ["poet"]


async def test_a_name_is_replaced_only_on_request_and_has_a_new_version(
    deployment: Deployment,
) -> None:
    await deployment.call("add", "poet", "poet")
    with pytest.raises(InvalidRequest, match="--replace"):
        await deployment.call("add", "poet", "poet")
    await deployment.call("add", "poet", "poet", replace=True)
    assert deployment.leaders["a"].served[0].version == 2


async def test_removal_reaches_a_group_that_was_away(deployment: Deployment) -> None:
    await deployment.call("add", "poet", "poet")
    deployment.leaders["b"].gone = True
    await deployment.call("remove", "poet")
    deployment.leaders["b"].gone = False
    assert deployment.leaders["a"].served == () and deployment.leaders["b"].served
    await deployment.settle()
    assert deployment.leaders["b"].served == ()
    with pytest.raises(NotFound):
        await deployment.call("remove", "poet")
    with pytest.raises(InvalidRequest, match="stands in the spec"):
        await deployment.call("remove", "listed")


async def test_the_wishes_outlive_the_operator_and_a_leader(deployment: Deployment) -> None:
    await deployment.call("add", "poet", "poet")
    deployment.leaders["b"] = Leader()  # a new group in place of a lost one
    deployment.admin = deployment.start()
    await deployment.settle()
    assert [a.name for a in deployment.leaders["b"].served] == ["poet"]
    calls = deployment.leaders["b"].calls
    await deployment.settle()
    assert deployment.leaders["b"].calls == calls, "a group that agrees is left alone"


class Audit:
    """Gathers the lines of an audit log."""

    def __init__(self) -> None:
        self.outcomes: list[tuple[str, str]] = []

    def write(self, call: Any, outcome: str, text: str = "") -> None:  # noqa: ANN401
        self.outcomes.append((call.who, outcome))


async def test_a_call_through_a_gateway_needs_the_role_operate(deployment: Deployment) -> None:
    tokens = [
        AdminToken.of("viewer", Role.VIEW, "v" * 32),
        AdminToken.of("ci", Role.OPERATE, "o" * 32),
    ]
    audit = Audit()
    calls = AdapterCalls(
        AdminTokens(tokens[0], lambda: tokens, lambda _: None),
        deployment.admin,
        audit,  # type: ignore[arg-type]
    )
    request = pb.AdaptersRequest(action="add", name="poet", path=str(deployment.root / "poet"))
    for given, kind in (("", "Unauthenticated"), (f"Bearer {'v' * 32}", "PermissionDenied")):
        assert (await calls.change(given, request))[0] == kind
    assert not deployment.saves
    assert (await calls.change(f"Bearer {'o' * 32}", request))[0] == ""
    assert (await calls.change(f"Bearer {'o' * 32}", request))[0] == "InvalidRequest"
    assert audit.outcomes == [
        ("", "UNAUTHENTICATED"),
        ("viewer", "PERMISSION_DENIED"),
        ("ci", "OK"),
        ("ci", "INVALID_ARGUMENT"),
    ]
