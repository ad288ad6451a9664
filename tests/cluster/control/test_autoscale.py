"""The autoscaler in virtual time."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from arriero.cluster.control.autoscale import Autoscaler, ModelLoad
from arriero.cluster.spec.scale_limits import ScaleLimits

LIMITS = ScaleLimits(least=1, most=4, target=0.5, wait_s=2.0, up_s=5.0, down_s=60.0)


class Model:
    """A model whose groups come and go as the policy says, asked once a second."""

    def __init__(self, limits: ScaleLimits, groups: int = 1) -> None:
        self.policy = Autoscaler(limits)
        self.groups = groups
        self.now_s = 0.0

    def run(
        self, seconds: int, sequences: int, wait_s: float = 0.0, serving: int | None = None
    ) -> int:
        for _ in range(seconds):
            serve = self.groups if serving is None else serving
            demand = ModelLoad(sequences=sequences, capacity=32, serving=serve, wait_s=wait_s)
            self.groups = self.policy.count(demand, self.groups, self.now_s)
            self.now_s += 1.0
        return self.groups


def test_more_is_asked_for_long_enough() -> None:
    model = Model(LIMITS)
    assert model.run(60, 8) == 1
    assert model.run(4, 40) == 1, "a burst"
    assert model.run(60, 8) == 1
    assert model.run(7, 40) == 3, "40 of 16 wanted in each"
    assert model.run(7, 400) == 4, "the most"


def test_less_is_asked_for_long_enough() -> None:
    model = Model(LIMITS, groups=4)
    model.run(90, 64)
    assert model.groups == 4
    assert model.run(50, 0) == 4, "the next burst may come"
    model.run(1, 64)
    assert model.run(59, 0) == 4, "it came"
    assert model.run(5, 0) == 1


def test_long_waits_want_a_group_more() -> None:
    model = Model(LIMITS)
    assert model.run(30, 8, wait_s=1.9) == 1
    assert model.run(7, 8, wait_s=5.0) == 2


def test_to_zero_and_back() -> None:
    model = Model(replace(LIMITS, least=0))
    assert model.run(59, 0) == 1
    assert model.run(5, 0) == 0
    assert model.run(600, 0) == 0
    assert model.run(1, 1) == 1, "at once"
    assert model.run(30, 1) == 1


def test_a_group_on_its_way_is_wanted_until_it_serves() -> None:
    model = Model(replace(LIMITS, least=0))
    assert model.run(300, 0, serving=0) == 1
    assert model.run(59, 0) == 1
    assert model.run(5, 0) == 0


@given(
    st.integers(0, 3),
    st.integers(1, 6),
    st.lists(st.tuples(st.integers(0, 500), st.floats(0, 10), st.floats(0.1, 30)), max_size=60),
)
def test_the_count_stays_within_its_limits(
    least: int, more: int, asked: list[tuple[int, float, float]]
) -> None:
    limits = replace(LIMITS, least=least, most=least + more)
    policy, groups, now_s = Autoscaler(limits), max(1, least), 0.0
    for sequences, wait_s, pause_s in asked:
        now_s += pause_s
        demand = ModelLoad(sequences=sequences, capacity=16, serving=groups, wait_s=wait_s)
        groups = policy.count(demand, groups, now_s)
        assert limits.least <= groups <= limits.most
        assert groups or not sequences, "whoever asks is served"
