"""What a rollout tells and refuses, and its deadline in virtual time."""

from __future__ import annotations

import json
from typing import Any

import pytest

from arriero.cluster.control.desired_state import ModelState, Revision
from arriero.cluster.control.reconcile import (
    DesiredModel,
    GroupSeat,
    Phase,
    Start,
    Stop,
    reconcile,
    settled,
)
from arriero.cluster.control.rollout_plan import (
    ModelRoom,
    NewRevision,
    judge,
    plan_rollout,
    refuse_rollout,
)
from arriero.cluster.spec.deployment import DeploymentSpec
from arriero.shards.errors import SpecError
from arriero.shards.protocol import wire


def spec(*models: dict[str, Any], **parts: Any) -> DeploymentSpec:  # noqa: ANN401
    named = [{"path": "/m", "name": "m"} | model for model in models or ({},)]
    return DeploymentSpec.model_validate({"models": named, **parts})


OLD = spec()


def states(of: DeploymentSpec = OLD) -> dict[str, ModelState]:
    return {
        model.name: ModelState(model.groups, [Revision(1, model.model_dump(mode="json"), "d1")])
        for model in of.models
    }


def revisions(of: DeploymentSpec, digest: str = "d1") -> dict[str, NewRevision]:
    return {
        model.name: NewRevision(settings=model.model_dump(mode="json"), digest=digest)
        for model in of.models
    }


def details(new: DeploymentSpec, *, digest: str = "d1", has_extra: bool = True) -> list[str]:
    plan = plan_rollout(OLD, new, states(), revisions(new, digest), force=False)
    room = {
        model.name: ModelRoom(count=model.groups, most=4, has_extra=has_extra)
        for model in new.models
    }
    return plan.details(states(), room)


@pytest.mark.parametrize(
    ("new", "lines"),
    [
        (spec(), ["settings and weights are as they were; nothing restarts"]),
        (
            spec({"mesh": {"pp": 2}}),
            [
                "models[m].mesh.pp: 1 -> 2 (by restart)",
                "m: 1 groups restart one after the other (settings), revision 2; a successor"
                " starts before a group stops; fits: 1 of at most 4 groups",
            ],
        ),
        (
            spec({"groups": 3}),
            ["models[m].groups: 1 -> 3 (at once)", "m: 1 to 3 groups; fits: 3 of at most 4 groups"],
        ),
        (
            spec({}, {"name": "n", "path": "/n"}),
            [
                "models[n]: none -> /n (by restart)",
                "n: new, 1 groups start; fits: 1 of at most 4 groups",
            ],
        ),
        (
            spec(gateway={"port": 5}),
            [
                "gateway.port: 50051 -> 5 (by restart)",
                "gateways: restart one after the other; their streams drain or move",
            ],
        ),
    ],
)
def test_a_plan_in_words(new: DeploymentSpec, lines: list[str]) -> None:
    assert details(new) == lines


def test_new_weights_and_no_room() -> None:
    (line,) = details(spec(), digest="d2", has_extra=False)
    assert "(weights d1 -> d2)" in line
    assert "no room for an extra group now: a group stops before its successor starts" in line


def test_a_model_goes_only_by_word() -> None:
    other = spec({"name": "n"})
    with pytest.raises(SpecError, match=r"the spec lacks `m`, which serves; .* --prune"):
        refuse_rollout(OLD, other, prune=False)
    refuse_rollout(OLD, other, prune=True)
    assert "m: removed, 1 groups end" in details(other)
    with pytest.raises(SpecError, match=r"`admin\.port` cannot be changed"):
        refuse_rollout(OLD, spec(admin={"port": 7}), prune=True)


def seat(name: str, revision: int, phase: Phase) -> GroupSeat:
    return GroupSeat(name=name, model="m", revision=revision, phase=phase)


OLD_SEAT = seat("m-0", 1, Phase.SERVING)


def rolling(limit_s: float) -> ModelState:
    """A model whose second revision was rolled out at time 100."""
    state = states()["m"]
    state.begin(limit_s, count_before=1, now_s=100.0)
    state.count = 2
    state.revise({"name": "m", "path": "/new"}, "d2")
    return state


def verdict(state: ModelState, *seats: GroupSeat, now_s: float) -> str | None:
    desired = DesiredModel(revision=state.current.number, count=1, paused=state.paused)
    return judge("m", state, desired, seats, now_s)


def test_a_deadline_that_passes() -> None:
    state = rolling(60)
    new = seat("m-1", 2, Phase.STARTING)
    assert verdict(state, OLD_SEAT, new, now_s=159.9) is None
    why = verdict(state, OLD_SEAT, new, now_s=160.0)
    assert why is not None and "revision 2 was not ready within 60 s" in why
    state.take_back(why)
    assert (state.current.number, state.count, state.deadline) == (1, 1, None)
    assert "revision 1 is current again" in state.rolled_back
    # the old group serves on, and only the new group stops
    actions = reconcile({"m": DesiredModel(revision=1, count=1)}, [OLD_SEAT, new])
    assert [(type(action), action.seat) for action in actions] == [(Stop, "m-1")]
    assert state.revise({}, "d3").number == 3  # a number is never used twice


def test_a_deadline_survives_the_store() -> None:
    state = rolling(60)
    stored = json.loads(json.dumps(wire.to_builtins(state)))
    assert wire.from_builtins(stored, ModelState) == state


def test_a_group_that_cannot_start_ends_the_rollout_early() -> None:
    state = rolling(60)
    why = verdict(state, OLD_SEAT, seat("m-1", 2, Phase.FAILED), now_s=101.0)
    assert why == "a group of revision 2 cannot start"
    assert verdict(state, seat("m-1", 2, Phase.SERVING), now_s=1000.0) == ""


def test_a_pause_stops_the_clock() -> None:
    state = rolling(60)
    assert state.deadline is not None
    state.deadline.pause(now_s=130.0)
    assert state.deadline.remaining_s(900.0) == 30.0 and not state.deadline.is_over(900.0)
    state.deadline.pause(now_s=140.0)  # a second pause changes nothing
    state.deadline.resume(now_s=1000.0)
    assert state.deadline.remaining_s(1010.0) == 20.0
    assert not state.deadline.is_over(1029.0) and state.deadline.is_over(1030.0)


def test_a_paused_rollout_holds_both_revisions() -> None:
    paused = DesiredModel(revision=2, count=2, paused=True)
    old, new = seat("m-0", 1, Phase.SERVING), seat("m-1", 2, Phase.SERVING)
    extra = seat("m-2", 1, Phase.SERVING)
    assert reconcile({"m": paused}, [old, new]) == []
    assert reconcile({"m": paused}, [old, new, extra]) == []  # the extra group of the rollout
    assert not settled({"m": paused}, [old, new])
    lost = reconcile({"m": paused}, [old])
    assert lost == [Start(seat="m-1", model="m", revision=2)]
    running = DesiredModel(revision=2, count=2)
    assert reconcile({"m": running}, [old, new]) == [Start(seat="m-2", model="m", revision=2)]
