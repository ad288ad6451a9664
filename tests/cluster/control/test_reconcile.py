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

    def __init__(self, desired: DesiredModel) -> None:
        self.desired = desired
        self.seats: dict[str, GroupSeat] = {}
        self.due: dict[str, int] = {}
        self.bad_revisions: set[int] = set()
        self.serving: list[int] = []
        self.most = 0

    def wait_for_promotion(self) -> None:
        for action in reconcile({"m": self.desired}, self.seats.values()):
            if isinstance(action, Start):
                assert action.seat not in self.seats
                self.seats[action.seat] = GroupSeat(
                    name=action.seat, model="m", revision=action.revision, phase=Phase.STARTING
                )
            else:
                assert isinstance(action, Stop)
                seat = self.seats[action.seat]
                assert seat.phase is not Phase.STOPPING
                self.seats[action.seat] = replace(seat, phase=Phase.STOPPING)
            self.due[action.seat] = 3
        for name in list(self.seats):
            self.due[name] = self.due.get(name, 0) - 1
            if self.due[name] > 0:
                continue
            seat = self.seats[name]
            if seat.phase is Phase.STARTING:
                bad = seat.revision in self.bad_revisions
                self.seats[name] = replace(seat, phase=Phase.FAILED if bad else Phase.SERVING)
            elif seat.phase is Phase.STOPPING:
                del self.seats[name]
                left = self.desired.drained - {name}
                self.desired = replace(self.desired, drained=left)
        self.serving.append(sum(one.phase is Phase.SERVING for one in self.seats.values()))
        self.most = max(self.most, len(self.seats))

    def settle(self, turns: int = 200) -> None:
        self.serving.clear()
        self.most = 0
        for _ in range(turns):
            self.wait_for_promotion()
            if settled({"m": self.desired}, self.seats.values()):
                return
        raise AssertionError(f"not settled: {self.seats}")


def up(count: int, surge: int = 1) -> Cluster:
    cluster = Cluster(DesiredModel(revision=1, count=count, surge=surge))
    cluster.settle()
    return cluster


def test_a_rollout_with_surge_never_has_fewer_groups() -> None:
    cluster = up(3)
    cluster.desired = replace(cluster.desired, revision=2)
    cluster.settle()
    assert min(cluster.serving) == 3 and cluster.most == 4
    assert {one.revision for one in cluster.seats.values()} == {2}


def test_a_rollout_without_room_goes_one_by_one() -> None:
    cluster = up(3, surge=0)
    cluster.desired = replace(cluster.desired, revision=2)
    cluster.settle()
    assert min(cluster.serving) == 2 and cluster.most == 3


def test_scale_up_and_down() -> None:
    cluster = up(1)
    for count in (3, 1, 0, 2):
        cluster.desired = replace(cluster.desired, count=count)
        cluster.settle()
        assert len(cluster.seats) == count


def test_the_least_loaded_groups_go_first() -> None:
    cluster = up(3)
    for load, name in enumerate(("m-1", "m-0", "m-2")):
        cluster.seats[name] = replace(cluster.seats[name], load=load)
    cluster.desired = replace(cluster.desired, count=1)
    cluster.settle()
    assert list(cluster.seats) == ["m-2"]


def test_a_drained_group_has_a_successor_first() -> None:
    cluster = up(2)
    cluster.desired = replace(cluster.desired, drained=frozenset({"m-0"}))
    assert not settled({"m": cluster.desired}, cluster.seats.values())
    cluster.settle()
    assert set(cluster.seats) == {"m-1", "m-2"}
    assert min(cluster.serving) == 2


def test_a_revision_that_does_not_start_harms_nobody() -> None:
    cluster = up(2)
    cluster.bad_revisions = {2}
    cluster.desired = replace(cluster.desired, revision=2)
    with pytest.raises(AssertionError, match="not settled"):
        cluster.settle()
    assert min(cluster.serving) == 2
    cluster.desired = replace(cluster.desired, revision=3)
    cluster.settle()
    assert min(cluster.serving) == 2
    assert {one.revision for one in cluster.seats.values()} == {3}


def test_a_model_that_is_no_longer_wanted_goes() -> None:
    seat = GroupSeat(name="x-0", model="x", revision=1, phase=Phase.SERVING)
    assert reconcile({}, [seat]) == [Stop(seat="x-0", why="its model is no longer wanted")]
    assert reconcile({}, [replace(seat, phase=Phase.STOPPING)]) == []


@given(
    desired_models=st.lists(
        st.tuples(st.integers(0, 4), st.integers(0, 1), st.booleans(), st.integers(0, 30)),
        min_size=1,
        max_size=6,
    )
)
def test_any_changes_settle(desired_models: list[tuple[int, int, bool, int]]) -> None:
    """Also when the next change comes while one is under way."""
    cluster = up(2)
    for count, surge, revise, turns in desired_models:
        revision = cluster.desired.revision + revise
        cluster.desired = replace(cluster.desired, count=count, surge=surge, revision=revision)
        for _ in range(turns):
            cluster.wait_for_promotion()
    cluster.settle()


def spare(name: str, phase: Phase = Phase.STANDBY, revision: int = 1) -> GroupSeat:
    return GroupSeat(name=name, model="m", revision=revision, phase=phase, spare=True)


def main(name: str, phase: Phase = Phase.SERVING, revision: int = 1) -> GroupSeat:
    return GroupSeat(name=name, model="m", revision=revision, phase=phase)


WISH = DesiredModel(revision=1, count=1, spares=1)


def test_a_spare_comes_once_all_groups_serve() -> None:
    assert reconcile({"m": WISH}, []) == [Start(seat="m-0", model="m", revision=1)]
    assert reconcile({"m": WISH}, [main("m-0", Phase.STARTING)]) == []
    begun = Start(seat="m-1", model="m", revision=1, spare=True)
    assert reconcile({"m": WISH}, [main("m-0")]) == [begun]
    for phase, done in ((Phase.STARTING, False), (Phase.STANDBY, True)):
        seats = [main("m-0"), spare("m-1", phase)]
        assert reconcile({"m": WISH}, seats) == []
        assert settled({"m": WISH}, seats)  # spares are not waited for
        assert spares_settled({"m": WISH}, seats) == done


def test_a_spare_serves_when_more_groups_are_wanted() -> None:
    more = replace(WISH, count=2)
    assert reconcile({"m": more}, [main("m-0"), spare("m-1")]) == [Promote(seat="m-1")]
    started = reconcile({"m": more}, [main("m-0"), spare("m-1", Phase.STARTING)])
    assert started == [Start(seat="m-2", model="m", revision=1)]


def test_spares_that_are_of_no_use_go_first() -> None:
    """Of an old revision, failed, drained or too many; what serves is replaced after them."""
    newer = replace(WISH, revision=2)
    (stop,) = reconcile({"m": newer}, [main("m-0"), spare("m-1")])
    assert isinstance(stop, Stop) and stop.seat == "m-1"
    (start,) = reconcile({"m": newer}, [main("m-0"), spare("m-1", Phase.STOPPING)])
    assert start == Start(seat="m-2", model="m", revision=2)
    for desired, seat in (
        (WISH, spare("m-1", Phase.FAILED)),
        (replace(WISH, drained=frozenset({"m-1"})), spare("m-1")),
        (replace(WISH, spares=0), spare("m-1")),
    ):
        (stop,) = reconcile({"m": desired}, [main("m-0"), seat])
        assert isinstance(stop, Stop) and stop.seat == "m-1"
        stopping = replace(seat, phase=Phase.STOPPING)
        begun = reconcile({"m": desired}, [main("m-0"), stopping])
        assert all(isinstance(one, Start) and one.spare for one in begun)


@pytest.mark.parametrize("surge", [0, 1])
def test_a_revision_that_no_node_holds_stops_no_group_that_serves(surge: int) -> None:
    desired = DesiredModel(revision=2, count=2, surge=surge, fits=False)
    seats = [GroupSeat(name=f"m-{i}", model="m", revision=1, phase=Phase.SERVING) for i in range(2)]
    assert not any(isinstance(action, Stop) for action in reconcile({"m": desired}, seats))
    fits = replace(desired, fits=True, surge=0)
    assert any(isinstance(action, Stop) for action in reconcile({"m": fits}, seats))


def test_what_people_drain_stops_whether_or_not_the_revision_fits() -> None:
    seat = GroupSeat(name="m-0", model="m", revision=2, phase=Phase.SERVING)
    drained = frozenset({"m-0"})
    desired = DesiredModel(revision=2, count=1, surge=0, fits=False, drained=drained)
    assert reconcile({"m": desired}, [seat]) == [Stop(seat="m-0", why="it is drained")]


def test_fewer_groups_stop_whether_or_not_the_revision_fits() -> None:
    desired = DesiredModel(revision=2, count=1, surge=0, fits=False)
    seats = [GroupSeat(name=f"m-{i}", model="m", revision=1, phase=Phase.SERVING) for i in range(2)]
    (stop,) = reconcile({"m": desired}, seats)
    assert isinstance(stop, Stop)
