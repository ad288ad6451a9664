"""The state machine of changes, run in virtual time against a cluster that starts and stops."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arriero.cluster.control.reconcile import (
    DesiredModel,
    GroupSeat,
    Phase,
    Promote,
    Start,
    Stop,
    reconcile,
    settled,
    spares_settled,
)


class Cluster:
    """Slots that take some turns to start and to stop."""

    def __init__(self, wish: DesiredModel) -> None:
        self.wish = wish
        self.slots: dict[str, GroupSeat] = {}
        self.due: dict[str, int] = {}
        self.bad_revisions: set[int] = set()
        self.serving: list[int] = []
        self.most = 0

    def turn(self) -> None:
        for action in reconcile({"m": self.wish}, self.slots.values()):
            if isinstance(action, Start):
                assert action.slot not in self.slots
                self.slots[action.slot] = GroupSeat(
                    name=action.slot, model="m", revision=action.revision, phase=Phase.STARTING
                )
            else:
                assert isinstance(action, Stop)
                slot = self.slots[action.slot]
                assert slot.phase is not Phase.STOPPING
                self.slots[action.slot] = replace(slot, phase=Phase.STOPPING)
            self.due[action.slot] = 3
        for name in list(self.slots):
            self.due[name] = self.due.get(name, 0) - 1
            if self.due[name] > 0:
                continue
            slot = self.slots[name]
            if slot.phase is Phase.STARTING:
                bad = slot.revision in self.bad_revisions
                self.slots[name] = replace(slot, phase=Phase.FAILED if bad else Phase.SERVING)
            elif slot.phase is Phase.STOPPING:
                del self.slots[name]
                left = self.wish.drained - {name}
                self.wish = replace(self.wish, drained=left)
        self.serving.append(sum(one.phase is Phase.SERVING for one in self.slots.values()))
        self.most = max(self.most, len(self.slots))

    def settle(self, turns: int = 200) -> None:
        self.serving.clear()
        self.most = 0
        for _ in range(turns):
            self.turn()
            if settled({"m": self.wish}, self.slots.values()):
                return
        raise AssertionError(f"not settled: {self.slots}")


def up(count: int, surge: int = 1) -> Cluster:
    cluster = Cluster(DesiredModel(revision=1, count=count, surge=surge))
    cluster.settle()
    return cluster


def test_a_rollout_with_surge_never_has_fewer_groups() -> None:
    cluster = up(3)
    cluster.wish = replace(cluster.wish, revision=2)
    cluster.settle()
    assert min(cluster.serving) == 3 and cluster.most == 4
    assert {one.revision for one in cluster.slots.values()} == {2}


def test_a_rollout_without_room_goes_one_by_one() -> None:
    cluster = up(3, surge=0)
    cluster.wish = replace(cluster.wish, revision=2)
    cluster.settle()
    assert min(cluster.serving) == 2 and cluster.most == 3


def test_scale_up_and_down() -> None:
    cluster = up(1)
    for count in (3, 1, 0, 2):
        cluster.wish = replace(cluster.wish, count=count)
        cluster.settle()
        assert len(cluster.slots) == count


def test_the_least_loaded_groups_go_first() -> None:
    cluster = up(3)
    for load, name in enumerate(("m-1", "m-0", "m-2")):
        cluster.slots[name] = replace(cluster.slots[name], load=load)
    cluster.wish = replace(cluster.wish, count=1)
    cluster.settle()
    assert list(cluster.slots) == ["m-2"]


def test_a_drained_group_has_a_successor_first() -> None:
    cluster = up(2)
    cluster.wish = replace(cluster.wish, drained=frozenset({"m-0"}))
    assert not settled({"m": cluster.wish}, cluster.slots.values())
    cluster.settle()
    assert set(cluster.slots) == {"m-1", "m-2"}
    assert min(cluster.serving) == 2


def test_a_revision_that_does_not_start_harms_nobody() -> None:
    cluster = up(2)
    cluster.bad_revisions = {2}
    cluster.wish = replace(cluster.wish, revision=2)
    with pytest.raises(AssertionError, match="not settled"):
        cluster.settle()
    assert min(cluster.serving) == 2
    cluster.wish = replace(cluster.wish, revision=3)
    cluster.settle()
    assert min(cluster.serving) == 2
    assert {one.revision for one in cluster.slots.values()} == {3}


def test_a_model_that_is_no_longer_wanted_goes() -> None:
    slot = GroupSeat(name="x-0", model="x", revision=1, phase=Phase.SERVING)
    assert reconcile({}, [slot]) == [Stop(slot="x-0", why="its model is no longer wanted")]
    assert reconcile({}, [replace(slot, phase=Phase.STOPPING)]) == []


@given(
    wishes=st.lists(
        st.tuples(st.integers(0, 4), st.integers(0, 1), st.booleans(), st.integers(0, 30)),
        min_size=1,
        max_size=6,
    )
)
def test_any_changes_settle(wishes: list[tuple[int, int, bool, int]]) -> None:
    """Also when the next change comes while one is under way."""
    cluster = up(2)
    for count, surge, revise, turns in wishes:
        revision = cluster.wish.revision + revise
        cluster.wish = replace(cluster.wish, count=count, surge=surge, revision=revision)
        for _ in range(turns):
            cluster.turn()
    cluster.settle()


def spare(name: str, phase: Phase = Phase.STANDBY, revision: int = 1) -> GroupSeat:
    return GroupSeat(name=name, model="m", revision=revision, phase=phase, spare=True)


def main(name: str, phase: Phase = Phase.SERVING, revision: int = 1) -> GroupSeat:
    return GroupSeat(name=name, model="m", revision=revision, phase=phase)


WISH = DesiredModel(revision=1, count=1, spares=1)


def test_a_spare_comes_once_all_groups_serve() -> None:
    assert reconcile({"m": WISH}, []) == [Start(slot="m-0", model="m", revision=1)]
    assert reconcile({"m": WISH}, [main("m-0", Phase.STARTING)]) == []
    begun = Start(slot="m-1", model="m", revision=1, spare=True)
    assert reconcile({"m": WISH}, [main("m-0")]) == [begun]
    for phase, done in ((Phase.STARTING, False), (Phase.STANDBY, True)):
        slots = [main("m-0"), spare("m-1", phase)]
        assert reconcile({"m": WISH}, slots) == []
        assert settled({"m": WISH}, slots)  # spares are not waited for
        assert spares_settled({"m": WISH}, slots) == done


def test_a_spare_serves_when_more_groups_are_wanted() -> None:
    more = replace(WISH, count=2)
    assert reconcile({"m": more}, [main("m-0"), spare("m-1")]) == [Promote(slot="m-1")]
    started = reconcile({"m": more}, [main("m-0"), spare("m-1", Phase.STARTING)])
    assert started == [Start(slot="m-2", model="m", revision=1)]


def test_spares_that_are_of_no_use_go_first() -> None:
    """Of an old revision, failed, drained or too many; what serves is replaced after them."""
    newer = replace(WISH, revision=2)
    (stop,) = reconcile({"m": newer}, [main("m-0"), spare("m-1")])
    assert isinstance(stop, Stop) and stop.slot == "m-1"
    (start,) = reconcile({"m": newer}, [main("m-0"), spare("m-1", Phase.STOPPING)])
    assert start == Start(slot="m-2", model="m", revision=2)
    for wish, slot in (
        (WISH, spare("m-1", Phase.FAILED)),
        (replace(WISH, drained=frozenset({"m-1"})), spare("m-1")),
        (replace(WISH, spares=0), spare("m-1")),
    ):
        (stop,) = reconcile({"m": wish}, [main("m-0"), slot])
        assert isinstance(stop, Stop) and stop.slot == "m-1"
        stopping = replace(slot, phase=Phase.STOPPING)
        begun = reconcile({"m": wish}, [main("m-0"), stopping])
        assert all(isinstance(one, Start) and one.spare for one in begun)
