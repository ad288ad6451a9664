"""The admission policy in virtual time: starts, refusals and times to retry."""

from __future__ import annotations

import heapq
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arriero.router.tenants.admission_policy import AdmissionPolicy, QueuedRequest
from arriero.router.tenants.fair_queue import OUTPUT_COST, PROMPT_COST
from arriero.router.tenants.tenant import QueueLimits, Tenant
from arriero.shards.errors import Overloaded


def queued(tenant: Tenant, prompt: int = 10, output: int = 10, **fields: object) -> QueuedRequest:
    return QueuedRequest(tenant=tenant, num_prompt=prompt, max_output=output, **fields)  # type: ignore[arg-type]


def test_requests_begin_in_the_room_there_is() -> None:
    policy = AdmissionPolicy(QueueLimits())
    one = Tenant(name="one")
    requests = [queued(one) for _ in range(5)]
    for each in requests:
        assert policy.enqueue(each, 0.0) is None
    assert policy.start_next(2, 0.0) == requests[:2]
    assert policy.start_next(2, 0.0) == []
    policy.release(requests[0], 1.0)
    assert policy.start_next(2, 1.0) == [requests[2]]
    policy.release(requests[3], 1.0)  # gave up while it waited
    policy.release(requests[1], 1.0)
    assert policy.start_next(2, 1.0) == [requests[4]]
    wide = queued(one, num_sequences=9)
    policy.enqueue(wide, 1.0)
    assert policy.start_next(2, 1.0) == []
    for each in (requests[2], requests[4]):
        policy.release(each, 2.0)
    assert policy.start_next(2, 2.0) == [wide]  # alone, for it would never fit
    policy.release(wide, 3.0)
    assert (policy.num_waiting, policy.num_sequences) == (0, 0)


def test_rates_say_when_to_come_back() -> None:
    policy = AdmissionPolicy(QueueLimits())
    slow = Tenant(name="slow", requests_per_minute=6)
    for _ in range(6):
        policy.enqueue(queued(slow), 0.0)
    with pytest.raises(Overloaded, match="`requests_per_minute`=6") as refused:
        policy.enqueue(queued(slow), 0.0)
    assert refused.value.retry_after_s == pytest.approx(10)
    policy.enqueue(queued(slow), 10.001)


def test_tokens_are_charged_as_they_come() -> None:
    policy = AdmissionPolicy(QueueLimits())
    thrifty = Tenant(name="thrifty", tokens_per_minute=600)
    first = queued(thrifty, prompt=100, output=1000)
    policy.enqueue(first, 0.0)
    assert policy.start_next(8, 0.0) == [first]
    policy.count_output(first, 560, 0.0)  # 60 in debt
    with pytest.raises(Overloaded, match="`tokens_per_minute`=600") as refused:
        policy.enqueue(queued(thrifty, prompt=40), 0.0)
    assert refused.value.retry_after_s == pytest.approx(10)
    policy.enqueue(queued(thrifty, prompt=40), 10.01)


def test_limits_may_change_at_any_time() -> None:
    """What was used up stays so; the new rate counts from the tenant's next request on."""
    policy = AdmissionPolicy(QueueLimits())
    slow, fast = Tenant(name="a", requests_per_minute=6), Tenant(name="a", requests_per_minute=60)
    for _ in range(6):
        policy.enqueue(queued(slow), 0.0)
    with pytest.raises(Overloaded, match="`requests_per_minute`=60") as refused:
        policy.enqueue(queued(fast), 0.0)
    assert refused.value.retry_after_s == pytest.approx(1)
    policy.enqueue(queued(fast), 1.001)
    policy.enqueue(queued(Tenant(name="a", weight=5)), 1.001)  # no limit any more
    policy.limits = QueueLimits(max_queued=8)
    with pytest.raises(Overloaded, match="8 requests wait"):
        policy.enqueue(queued(Tenant(name="a")), 1.001)
    policy.start_next(99, 2.0)
    with pytest.raises(Overloaded, match="`requests_per_minute`=1;"):
        for _ in range(3):  # a new limit begins full
            policy.enqueue(queued(Tenant(name="a", requests_per_minute=1)), 2.0)


def test_max_running_keeps_a_tenant_waiting_and_lets_others_pass() -> None:
    policy = AdmissionPolicy(QueueLimits())
    narrow, other = Tenant(name="narrow", max_running=1, max_queued=2), Tenant(name="other")
    mine = [queued(narrow) for _ in range(3)]
    policy.enqueue(mine[0], 0.0)
    assert policy.start_next(8, 0.0) == [mine[0]]
    policy.enqueue(mine[1], 0.0)
    policy.enqueue(mine[2], 0.0)
    assert policy.start_next(8, 0.0) == []
    with pytest.raises(Overloaded, match="`max_queued`"):
        policy.enqueue(queued(narrow), 0.0)
    theirs = queued(other)
    policy.enqueue(theirs, 0.0)
    assert policy.start_next(8, 0.0) == [theirs]


def test_a_full_queue_refuses_whoever_fills_it() -> None:
    policy = AdmissionPolicy(QueueLimits(max_queued=10))
    flood, quiet = Tenant(name="flood"), Tenant(name="quiet")
    waiting = [queued(flood) for _ in range(10)]
    for each in waiting:
        policy.enqueue(each, 0.0)
    with pytest.raises(Overloaded, match="'flood' has the most"):
        policy.enqueue(queued(flood), 0.0)
    assert policy.enqueue(queued(quiet), 0.0) is waiting[-1]
    assert isinstance(waiting[-1].refusal, Overloaded)
    policy.release(waiting[-1], 0.0)
    assert policy.waiting_by_tenant() == {"flood": 9, "quiet": 1}


def test_what_has_no_chance_is_refused_before_work_is_spent_on_it() -> None:
    policy = AdmissionPolicy(QueueLimits(max_queued=10))
    flood, quiet = Tenant(name="flood"), Tenant(name="quiet")
    policy.refuse_early(flood, 0, None, 0.0)
    for _ in range(10):
        policy.refuse_early(flood, 0, None, 0.0)
        policy.enqueue(queued(flood), 0.0)
    with pytest.raises(Overloaded, match="'flood' has the most"):
        policy.refuse_early(flood, 0, None, 0.0)
    policy.refuse_early(flood, -1, None, 0.0)  # pushes out another of its own
    policy.refuse_early(quiet, 0, None, 0.0)
    assert policy.num_waiting == 10
    narrow = Tenant(name="narrow", max_queued=1, requests_per_minute=6)
    policy.enqueue(queued(narrow), 0.0)
    with pytest.raises(Overloaded, match="`max_queued`"):
        policy.refuse_early(narrow, 0, None, 0.0)
    busy, tenant = busy_policy(QueueLimits())
    with pytest.raises(Overloaded, match="deadline"):
        busy.refuse_early(tenant, 0, 20.0 + 5, 20.0)


@given(st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_whatever_is_refused_early_would_have_been_refused(seed: int) -> None:
    rng = random.Random(seed)
    policy = AdmissionPolicy(QueueLimits(max_queued=6, max_wait_s=3))
    tenants = [
        Tenant(name="a", requests_per_minute=30),
        Tenant(name="b", tokens_per_minute=300, weight=2),
        Tenant(name="c", max_queued=2),
        Tenant(name="d"),
    ]
    running: list[QueuedRequest] = []
    now_s = 0.0
    for _ in range(300):
        now_s += rng.uniform(0, 0.2)
        tenant, priority = rng.choice(tenants), rng.choice([0, 0, 0, -1, 1])
        deadline_s = rng.choice([None, now_s + rng.uniform(0, 5)])
        try:
            policy.refuse_early(tenant, priority, deadline_s, now_s)
            hopeless = False
        except Overloaded:
            hopeless = True
        one = queued(tenant, rng.randint(1, 20), 10, priority=priority, deadline_s=deadline_s)
        try:
            policy.enqueue(one, now_s)
            assert not hopeless
        except Overloaded:
            pass
        running += policy.start_next(2, now_s)
        for each in list(running):
            policy.count_output(each, 1, now_s)
            if rng.random() < 0.1:
                running.remove(each)
                policy.release(each, now_s)


def busy_policy(limits: QueueLimits, rate: float = 100.0) -> tuple[AdmissionPolicy, Tenant]:
    """A policy that has served `rate` of cost a second for a while, and has 1000 waiting."""
    policy = AdmissionPolicy(limits)
    tenant = Tenant(name="busy")
    running = queued(tenant, prompt=1, output=10_000)
    policy.enqueue(running, 0.0)
    policy.start_next(1, 0.0)
    for tick in range(200):
        policy.count_output(running, int(rate / 20), tick / 10)
    for _ in range(10):
        policy.enqueue(queued(tenant, prompt=80, output=10), 20.0)
    return policy, tenant


def test_deadlines_that_cannot_be_met_are_refused_early() -> None:
    policy, tenant = busy_policy(QueueLimits())
    with pytest.raises(Overloaded, match="deadline") as refused:
        policy.enqueue(queued(tenant, deadline_s=20.0 + 5), 20.0)
    assert 8 < refused.value.retry_after_s < 12
    policy.enqueue(queued(tenant, deadline_s=20.0 + 15), 20.0)
    # another tenant's turn comes after one request, not after ten
    policy.enqueue(queued(Tenant(name="other"), deadline_s=20.0 + 5), 20.0)


def test_a_wait_past_the_limit_is_refused_at_once() -> None:
    policy, tenant = busy_policy(QueueLimits(max_wait_s=12))
    policy.enqueue(queued(tenant, prompt=280, output=10), 20.0)
    with pytest.raises(Overloaded, match="`max_wait_s` is 12 s"):
        policy.enqueue(queued(tenant), 20.0)


@settings(deadline=None, max_examples=20)
@given(
    seed=st.integers(0, 2**32),
    ratio=st.sampled_from([2, 20]),
    late=st.integers(0, 60),
    outputs=st.sampled_from([(20, 20), (1, 40), (50, 70)]),
    wrong=st.booleans(),
)
def test_a_flood_takes_half(
    seed: int, ratio: int, late: int, outputs: tuple[int, int], wrong: bool
) -> None:
    """Two tenants, one sending `ratio` times as much, eight places, both backlogged.

    The quiet one comes `late` steps after the other. With `wrong` the flood asks for far more
    output than it takes. Places may become free all at once (equal outputs begin together).
    """
    rng = random.Random(seed)
    policy = AdmissionPolicy(QueueLimits(max_queued=64, max_wait_s=1e9))
    flood, quiet = Tenant(name="flood"), Tenant(name="quiet")
    served = {"flood": 0.0, "quiet": 0.0}
    counted_from, waves = late + outputs[1], 8
    outputs_of: dict[QueuedRequest, int] = {}
    left: dict[QueuedRequest, int] = {}  # of those that run
    for step in range(counted_from + waves * outputs[1]):
        now = step / 20
        for tenant, count in ((flood, ratio), (quiet, 1 if step >= late else 0)):
            for _ in range(count):
                output = rng.randint(*outputs)
                asked = output * 10 if wrong and tenant is flood else output
                each = queued(tenant, prompt=rng.randint(1, 60), output=asked)
                try:
                    policy.enqueue(each, now)
                except Overloaded as error:
                    assert error.retry_after_s >= 0
                else:
                    outputs_of[each] = output
        begun = policy.start_next(8, now)
        counted = served if step >= counted_from else dict(served)
        for each in begun:
            counted[each.tenant.name] += PROMPT_COST * each.num_prompt
            left[each] = outputs_of.pop(each)
        for each in list(left):
            policy.count_output(each, 1, now)
            counted[each.tenant.name] += OUTPUT_COST
            left[each] -= 1
            if not left[each]:
                del left[each]
                policy.release(each, now)
        assert policy.num_sequences <= 8
        assert policy.num_waiting <= 64
        if step >= counted_from:
            assert min(policy.waiting_by_tenant().values()) > 0, "not both backlogged"
    assert served["quiet"] / sum(served.values()) >= 0.47, served


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**32))
def test_nothing_is_lost_and_nothing_begins_twice(seed: int) -> None:
    """Random offers, ends and departures: every request begins, is refused or left, once."""
    rng = random.Random(seed)
    policy = AdmissionPolicy(
        QueueLimits(max_queued=rng.randint(1, 20), max_wait_s=rng.uniform(0.5, 5))
    )
    tenants = [
        Tenant(name="a", weight=2),
        Tenant(name="b", max_running=2, max_queued=3),
        Tenant(name="c", priority=-1, requests_per_minute=30, tokens_per_minute=900),
    ]
    waiting: set[QueuedRequest] = set()
    ends: list[tuple[float, int, QueuedRequest]] = []
    now, count = 0.0, 0
    for number in range(400):
        now += rng.expovariate(20)
        while ends and ends[0][0] <= now:
            _, _, done = heapq.heappop(ends)
            policy.release(done, now)
        each = queued(
            rng.choice(tenants), prompt=rng.randint(1, 100), num_sequences=rng.randint(1, 3)
        )
        try:
            pushed = policy.enqueue(each, now)
        except Overloaded as error:
            assert error.retry_after_s >= 0
        else:
            waiting.add(each)
            if pushed is not None:
                assert pushed.refusal is not None
                waiting.remove(pushed)
                policy.release(pushed, now)
        if waiting and rng.random() < 0.1:
            gone = rng.choice(sorted(waiting, key=id))
            waiting.remove(gone)
            policy.release(gone, now)
        for begun in policy.start_next(6, now):
            waiting.remove(begun)
            count += 1
            policy.count_output(begun, rng.randint(1, 10), now)
            heapq.heappush(ends, (now + rng.expovariate(4), number * 1000 + count, begun))
        assert policy.num_waiting == len(waiting)
    for _, _, done in ends:
        policy.release(done, now)
    assert policy.num_sequences == 0
