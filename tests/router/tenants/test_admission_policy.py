"""The door in virtual time: what begins, what is refused, and with which time to come back."""

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


def ticket(tenant: Tenant, prompt: int = 10, output: int = 10, **fields: object) -> QueuedRequest:
    return QueuedRequest(tenant=tenant, num_prompt=prompt, max_output=output, **fields)  # type: ignore[arg-type]


def test_requests_begin_in_the_room_there_is() -> None:
    door = AdmissionPolicy(QueueLimits())
    one = Tenant(name="one")
    tickets = [ticket(one) for _ in range(5)]
    for each in tickets:
        assert door.offer(each, 0.0) is None
    assert door.turns(2, 0.0) == tickets[:2]
    assert door.turns(2, 0.0) == []
    door.leave(tickets[0], 1.0)
    assert door.turns(2, 1.0) == [tickets[2]]
    door.leave(tickets[3], 1.0)  # gave up while it waited
    door.leave(tickets[1], 1.0)
    assert door.turns(2, 1.0) == [tickets[4]]
    wide = ticket(one, num_sequences=9)
    door.offer(wide, 1.0)
    assert door.turns(2, 1.0) == []
    for each in (tickets[2], tickets[4]):
        door.leave(each, 2.0)
    assert door.turns(2, 2.0) == [wide]  # alone, for it would never fit
    door.leave(wide, 3.0)
    assert (door.num_waiting, door.num_sequences) == (0, 0)


def test_rates_say_when_to_come_back() -> None:
    door = AdmissionPolicy(QueueLimits())
    slow = Tenant(name="slow", requests_per_minute=6)
    for _ in range(6):
        door.offer(ticket(slow), 0.0)
    with pytest.raises(Overloaded, match="`requests_per_minute`=6") as refused:
        door.offer(ticket(slow), 0.0)
    assert refused.value.retry_after_s == pytest.approx(10)
    door.offer(ticket(slow), 10.001)


def test_tokens_are_charged_as_they_come() -> None:
    door = AdmissionPolicy(QueueLimits())
    thrifty = Tenant(name="thrifty", tokens_per_minute=600)
    first = ticket(thrifty, prompt=100, output=1000)
    door.offer(first, 0.0)
    assert door.turns(8, 0.0) == [first]
    door.used(first, 560, 0.0)  # 60 in debt
    with pytest.raises(Overloaded, match="`tokens_per_minute`=600") as refused:
        door.offer(ticket(thrifty, prompt=40), 0.0)
    assert refused.value.retry_after_s == pytest.approx(10)
    door.offer(ticket(thrifty, prompt=40), 10.01)


def test_limits_may_change_at_any_time() -> None:
    """What was used up stays so; the new rate counts from the tenant's next request on."""
    door = AdmissionPolicy(QueueLimits())
    slow, fast = Tenant(name="a", requests_per_minute=6), Tenant(name="a", requests_per_minute=60)
    for _ in range(6):
        door.offer(ticket(slow), 0.0)
    with pytest.raises(Overloaded, match="`requests_per_minute`=60") as refused:
        door.offer(ticket(fast), 0.0)
    assert refused.value.retry_after_s == pytest.approx(1)
    door.offer(ticket(fast), 1.001)
    door.offer(ticket(Tenant(name="a", weight=5)), 1.001)  # no limit any more
    door.limits = QueueLimits(max_queued=8)
    with pytest.raises(Overloaded, match="8 requests wait"):
        door.offer(ticket(Tenant(name="a")), 1.001)
    door.turns(99, 2.0)
    with pytest.raises(Overloaded, match="`requests_per_minute`=1;"):
        for _ in range(3):  # a new limit begins full
            door.offer(ticket(Tenant(name="a", requests_per_minute=1)), 2.0)


def test_max_running_keeps_a_tenant_waiting_and_lets_others_pass() -> None:
    door = AdmissionPolicy(QueueLimits())
    narrow, other = Tenant(name="narrow", max_running=1, max_queued=2), Tenant(name="other")
    mine = [ticket(narrow) for _ in range(3)]
    door.offer(mine[0], 0.0)
    assert door.turns(8, 0.0) == [mine[0]]
    door.offer(mine[1], 0.0)
    door.offer(mine[2], 0.0)
    assert door.turns(8, 0.0) == []
    with pytest.raises(Overloaded, match="`max_queued`"):
        door.offer(ticket(narrow), 0.0)
    theirs = ticket(other)
    door.offer(theirs, 0.0)
    assert door.turns(8, 0.0) == [theirs]


def test_a_full_queue_refuses_whoever_fills_it() -> None:
    door = AdmissionPolicy(QueueLimits(max_queued=10))
    flood, quiet = Tenant(name="flood"), Tenant(name="quiet")
    waiting = [ticket(flood) for _ in range(10)]
    for each in waiting:
        door.offer(each, 0.0)
    with pytest.raises(Overloaded, match="'flood' has most"):
        door.offer(ticket(flood), 0.0)
    assert door.offer(ticket(quiet), 0.0) is waiting[-1]
    assert isinstance(waiting[-1].refusal, Overloaded)
    door.leave(waiting[-1], 0.0)
    assert door.waiting_by_tenant() == {"flood": 9, "quiet": 1}


def test_what_has_no_chance_is_refused_before_work_is_spent_on_it() -> None:
    door = AdmissionPolicy(QueueLimits(max_queued=10))
    flood, quiet = Tenant(name="flood"), Tenant(name="quiet")
    door.refuse_early(flood, 0, None, 0.0)
    for _ in range(10):
        door.refuse_early(flood, 0, None, 0.0)
        door.offer(ticket(flood), 0.0)
    with pytest.raises(Overloaded, match="'flood' has most"):
        door.refuse_early(flood, 0, None, 0.0)
    door.refuse_early(flood, -1, None, 0.0)  # pushes out another of its own
    door.refuse_early(quiet, 0, None, 0.0)
    assert door.num_waiting == 10
    narrow = Tenant(name="narrow", max_queued=1, requests_per_minute=6)
    door.offer(ticket(narrow), 0.0)
    with pytest.raises(Overloaded, match="`max_queued`"):
        door.refuse_early(narrow, 0, None, 0.0)
    busy, tenant = busy_door(QueueLimits())
    with pytest.raises(Overloaded, match="deadline"):
        busy.refuse_early(tenant, 0, 20.0 + 5, 20.0)


@given(st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_whatever_is_refused_early_would_have_been_refused(seed: int) -> None:
    rng = random.Random(seed)
    door = AdmissionPolicy(QueueLimits(max_queued=6, max_wait_s=3))
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
            door.refuse_early(tenant, priority, deadline_s, now_s)
            hopeless = False
        except Overloaded:
            hopeless = True
        one = ticket(tenant, rng.randint(1, 20), 10, priority=priority, deadline_s=deadline_s)
        try:
            door.offer(one, now_s)
            assert not hopeless
        except Overloaded:
            pass
        running += door.turns(2, now_s)
        for each in list(running):
            door.used(each, 1, now_s)
            if rng.random() < 0.1:
                running.remove(each)
                door.leave(each, now_s)


def busy_door(limits: QueueLimits, rate: float = 100.0) -> tuple[AdmissionPolicy, Tenant]:
    """A door that has served `rate` of cost a second for a while, and has 1000 waiting."""
    door = AdmissionPolicy(limits)
    tenant = Tenant(name="busy")
    running = ticket(tenant, prompt=1, output=10_000)
    door.offer(running, 0.0)
    door.turns(1, 0.0)
    for tick in range(200):
        door.used(running, int(rate / 20), tick / 10)
    for _ in range(10):
        door.offer(ticket(tenant, prompt=80, output=10), 20.0)
    return door, tenant


def test_deadlines_that_cannot_be_met_are_refused_early() -> None:
    door, tenant = busy_door(QueueLimits())
    with pytest.raises(Overloaded, match="deadline") as refused:
        door.offer(ticket(tenant, deadline_s=20.0 + 5), 20.0)
    assert 8 < refused.value.retry_after_s < 12
    door.offer(ticket(tenant, deadline_s=20.0 + 15), 20.0)
    # another tenant's turn comes after one request, not after ten
    door.offer(ticket(Tenant(name="other"), deadline_s=20.0 + 5), 20.0)


def test_a_wait_past_the_limit_is_refused_at_once() -> None:
    door, tenant = busy_door(QueueLimits(max_wait_s=12))
    door.offer(ticket(tenant, prompt=280, output=10), 20.0)
    with pytest.raises(Overloaded, match="the most is 12 s"):
        door.offer(ticket(tenant), 20.0)


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
    door = AdmissionPolicy(QueueLimits(max_queued=64, max_wait_s=1e9))
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
                each = ticket(tenant, prompt=rng.randint(1, 60), output=asked)
                try:
                    door.offer(each, now)
                except Overloaded as error:
                    assert error.retry_after_s >= 0
                else:
                    outputs_of[each] = output
        begun = door.turns(8, now)
        counted = served if step >= counted_from else dict(served)
        for each in begun:
            counted[each.tenant.name] += PROMPT_COST * each.num_prompt
            left[each] = outputs_of.pop(each)
        for each in list(left):
            door.used(each, 1, now)
            counted[each.tenant.name] += OUTPUT_COST
            left[each] -= 1
            if not left[each]:
                del left[each]
                door.leave(each, now)
        assert door.num_sequences <= 8
        assert door.num_waiting <= 64
        if step >= counted_from:
            assert min(door.waiting_by_tenant().values()) > 0, "not both backlogged"
    assert served["quiet"] / sum(served.values()) >= 0.47, served


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**32))
def test_nothing_is_lost_and_nothing_begins_twice(seed: int) -> None:
    """Random offers, ends and departures: every ticket begins, is refused or left, once."""
    rng = random.Random(seed)
    door = AdmissionPolicy(
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
            door.leave(done, now)
        each = ticket(
            rng.choice(tenants), prompt=rng.randint(1, 100), num_sequences=rng.randint(1, 3)
        )
        try:
            pushed = door.offer(each, now)
        except Overloaded as error:
            assert error.retry_after_s >= 0
        else:
            waiting.add(each)
            if pushed is not None:
                assert pushed.refusal is not None
                waiting.remove(pushed)
                door.leave(pushed, now)
        if waiting and rng.random() < 0.1:
            gone = rng.choice(sorted(waiting, key=id))
            waiting.remove(gone)
            door.leave(gone, now)
        for begun in door.turns(6, now):
            waiting.remove(begun)
            count += 1
            door.used(begun, rng.randint(1, 10), now)
            heapq.heappush(ends, (now + rng.expovariate(4), number * 1000 + count, begun))
        assert door.num_waiting == len(waiting)
    for _, _, done in ends:
        door.leave(done, now)
    assert door.num_sequences == 0
