"""The fair queue and the bucket: properties over random loads."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arriero.router.tenants.bucket import Bucket
from arriero.router.tenants.fair_queue import OUTPUT_COST, PROMPT_COST, FairQueue
from arriero.router.tenants.tenant import Tenant


def served(queue: FairQueue[tuple[str, int, int]], tenants: dict[str, Tenant], turns: int) -> dict:
    """Serve `turns` items one after the other; cost given to each tenant."""
    given_cost = dict.fromkeys(tenants, 0.0)
    for _ in range(turns):
        item = queue.pop(lambda name, item: True)
        assert item is not None
        name, prompt, output = item
        cost = PROMPT_COST * prompt + OUTPUT_COST * output
        queue.charge(tenants[name], cost)
        given_cost[name] += cost
    return given_cost


@settings(deadline=None, max_examples=60)
@given(
    weights=st.lists(st.sampled_from([0.5, 1.0, 2.0, 3.0]), min_size=2, max_size=5),
    floods=st.lists(st.integers(1, 20), min_size=5, max_size=5),
    seed=st.integers(0, 2**32),
)
def test_backlogged_tenants_differ_by_a_bounded_cost(
    weights: list[float], floods: list[int], seed: int
) -> None:
    rng = random.Random(seed)
    tenants = {f"t{i}": Tenant(name=f"t{i}", weight=w) for i, w in enumerate(weights)}
    queue: FairQueue[tuple[str, int, int]] = FairQueue()
    most = 200 * PROMPT_COST + 200 * OUTPUT_COST
    for (name, tenant), flood in zip(tenants.items(), floods, strict=False):
        for _ in range(400 * flood):
            item = (name, rng.randint(1, 200), rng.randint(1, 200))
            queue.push(tenant, item, cost=1.0)
    given_cost = served(queue, tenants, turns=100 * len(tenants))
    shares = [given_cost[name] / tenant.weight for name, tenant in tenants.items()]
    # the bound of the paper for one place: the dearest request, over the smallest weight
    assert max(shares) - min(shares) <= most / min(weights) + 1e-6


def test_idleness_earns_no_credit() -> None:
    a, b = Tenant(name="a"), Tenant(name="b")
    queue: FairQueue[str] = FairQueue()
    queue.push(b, "b", cost=1)
    assert queue.pop(lambda *_: True) == "b"
    for _ in range(1000):
        queue.push(a, "a", cost=1)
    for _ in range(500):
        queue.pop(lambda *_: True)
        queue.charge(a, 10)
    for _ in range(100):
        queue.push(b, "b", cost=1)  # back from a long pause
    got = []
    for _ in range(100):
        got.append(queue.pop(lambda *_: True))
        queue.charge(a if got[-1] == "a" else b, 10)
    assert abs(got.count("a") - got.count("b")) <= 2


def test_lower_priority_numbers_go_first_and_own_items_by_their_own() -> None:
    high, low = Tenant(name="high", priority=-1), Tenant(name="low")
    queue: FairQueue[str] = FairQueue()
    queue.push(low, "l1", cost=1)
    queue.push(high, "h2", cost=1, priority=5)
    queue.push(high, "h1", cost=1, priority=1)
    queue.charge(high, 1e9)
    assert [queue.pop(lambda *_: True) for _ in range(4)] == ["h1", "h2", "l1", None]


def test_the_longest_line_is_pushed_out() -> None:
    a, b = Tenant(name="a"), Tenant(name="b")
    queue: FairQueue[int] = FairQueue()
    for i in range(5):
        queue.push(a, i, cost=10)
    queue.push(b, 9, cost=30)
    assert queue.push_out() == 4
    queue.remove("a", 2)
    assert queue.push_out() in (3, 9)


def test_cost_before_counts_only_what_goes_first() -> None:
    a, b, urgent, later = (
        Tenant(name=n, priority=p) for n, p in zip("abul", (0, 0, -1, 1), strict=True)
    )
    queue: FairQueue[int] = FairQueue()
    for i in range(100):
        queue.push(a, i, cost=10)
    queue.push(urgent, 1, cost=7)
    queue.push(later, 1, cost=10_000)
    assert queue.cost_before(b) == 17  # one turn of a, and all that is urgent
    assert queue.cost_before(a) == 1007


@settings(deadline=None)
@given(
    per_minute=st.floats(1, 1e6),
    steps=st.lists(st.tuples(st.floats(0, 30), st.floats(0, 1e5)), max_size=60),
)
def test_a_bucket_never_lets_more_through_than_its_rate(
    per_minute: float, steps: list[tuple[float, float]]
) -> None:
    now = 0.0
    bucket = Bucket(per_minute, now)
    taken, largest = 0.0, 0.0
    for pause, amount in steps:
        now += pause
        wait = bucket.wait_s(amount, now)
        if wait:
            now += wait
            assert bucket.wait_s(amount, now) == pytest.approx(0, abs=1e-6)
        bucket.take(amount, now)
        taken += amount
        largest = max(largest, amount)
        assert taken <= per_minute * (1 + now / 60) + largest + 1e-3
