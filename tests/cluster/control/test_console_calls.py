"""Reads of the cluster's state through a gateway: who may, what comes, how often Admin is asked."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from arriero.cluster.control import console_calls
from arriero.cluster.control.admin_roles import AdminToken, AdminTokens, Role
from arriero.cluster.control.console_calls import ConsoleCalls
from arriero.router.proto.arriero.v1 import admin_pb2 as pb
from arriero.shards.errors import NotFound

VIEWER = f"Bearer {'v' * 32}"


class Admin:
    """Answers as `AdminServer`; counts the questions for the status."""

    def __init__(self) -> None:
        self.num_asked = 0
        self.failed = False
        self.kv_s = 0.0

    async def status(self, request: pb.GetStatusRequest) -> pb.Status:
        self.num_asked += 1
        group = pb.GroupStatus(seat="tiny-0", phase="serving", output_tokens=2**40)
        group.expert_loads.add(layer=3, tokens=[1, 0, 5])
        return pb.Status(groups=[group])

    async def events(self, request: pb.ListEventsRequest) -> pb.ListEventsResponse:
        assert request.limit == console_calls.MAX_EVENTS
        return pb.ListEventsResponse(events=[pb.Event(at=1.5, kind="serving", who="tiny-0.1")])

    async def why(self, request: pb.WhyRequest) -> pb.WhyResponse:
        if not self.failed:
            raise NotFound("no failure is recorded")
        return pb.WhyResponse(failure=pb.Failure(who="tiny-0.1", cause="killed"), lines=["a", "b"])

    async def kv(self, request: pb.KvRequest) -> pb.KvResponse:
        assert request.action == "stats"
        await asyncio.sleep(self.kv_s)
        tiers = [pb.KvTier(tier="host", used=2, total=8)]
        return pb.KvResponse(groups=[pb.KvGroup(group="tiny-0.1", tiers=tiers)])


class Audit:
    """Gathers the lines of an audit log."""

    def __init__(self) -> None:
        self.outcomes: list[tuple[str, str, str]] = []

    def write(self, call: Any, outcome: str, text: str = "") -> None:  # noqa: ANN401
        self.outcomes.append((call.who, call.rpc, outcome))


def made(admin: Admin) -> tuple[ConsoleCalls, Audit]:
    viewer = AdminToken.of("viewer", Role.VIEW, "v" * 32)
    tokens = AdminTokens(viewer, lambda: None, lambda _: None)
    audit = Audit()
    return ConsoleCalls(tokens, admin, audit), audit  # type: ignore[arg-type]


async def test_a_token_of_the_role_view_reads_everything() -> None:
    admin = Admin()
    calls, audit = made(admin)
    kind, text = await calls.read(VIEWER)
    state = json.loads(text)
    (group,) = state["status"]["groups"]
    assert (kind, group["seat"], int(group["output_tokens"])) == ("", "tiny-0", 2**40)
    assert group["expert_loads"] == [{"layer": 3, "tokens": ["1", "0", "5"]}]
    assert (group["running"], state["status"]["nodes"], state["why"]) == (0, [], None)
    assert state["events"][0]["who"] == "tiny-0.1"
    assert state["kv"][0]["tiers"] == [{"tier": "host", "used": "2", "total": "8"}]
    assert not audit.outcomes, "reads leave no line, as with Admin's own"


async def test_others_are_refused_and_noted() -> None:
    admin = Admin()
    calls, audit = made(admin)
    for given in ("", "Bearer x", "v" * 32, f"Basic {'v' * 32}"):
        assert (await calls.read(given))[0] == "Unauthenticated"
    assert audit.outcomes == [("", "GetStatus", "UNAUTHENTICATED")] * 4
    assert admin.num_asked == 0


async def test_a_role_that_is_too_low_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert console_calls.NEEDED == Role.VIEW
    monkeypatch.setattr(console_calls, "NEEDED", Role.OPERATE)
    calls, audit = made(Admin())
    kind, text = await calls.read(VIEWER)
    assert kind == "PermissionDenied" and "the role operate" in text
    assert audit.outcomes == [("viewer", "GetStatus", "PERMISSION_DENIED")]


async def test_many_consoles_ask_admin_once_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    admin = Admin()
    calls, _ = made(admin)
    answers = await asyncio.gather(*(calls.read(VIEWER) for _ in range(20)))
    assert admin.num_asked == 1 and len({text for _, text in answers}) == 1
    assert (await calls.read(f"Bearer {'x' * 32}"))[0] == "Unauthenticated"
    monkeypatch.setattr(console_calls, "FRESH_S", 0.0)
    admin.failed = True
    state = json.loads((await calls.read(VIEWER))[1])
    assert admin.num_asked == 2
    assert (state["why"]["failure"]["cause"], state["why"]["lines"]) == ("killed", ["a", "b"])


async def test_leaders_that_do_not_answer_hide_nothing_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(console_calls, "KV_TIMEOUT_S", 0.05)
    admin = Admin()
    admin.kv_s = 5.0
    calls, _ = made(admin)
    state = json.loads((await calls.read(VIEWER))[1])
    assert state["kv"] == [] and state["status"]["groups"]
