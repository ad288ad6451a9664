"""Background requests in virtual time: they take what interactive requests leave free."""

from __future__ import annotations

from arriero.router.tenants.admission_policy import AdmissionPolicy, QueuedRequest
from arriero.router.tenants.background import QUIET_S, BackgroundPace
from arriero.router.tenants.day_budgets import DayBudgets
from arriero.router.tenants.tenant import QueueLimits, Tenant

ACME = Tenant(name="acme", requests_per_minute=1, max_running=1, tokens_per_day=100)
BATCH = ACME.in_background()


def request(tenant: Tenant) -> QueuedRequest:
    return QueuedRequest(tenant=tenant, num_prompt=10, max_output=10)


def enqueue(
    policy: AdmissionPolicy, tenant: Tenant, count: int, now_s: float
) -> list[QueuedRequest]:
    requests = [request(tenant) for _ in range(count)]
    for each in requests:
        policy.enqueue(each, now_s)
    return requests


def test_interactive_requests_of_every_tenant_go_first() -> None:
    policy = AdmissionPolicy(QueueLimits())
    enqueue(policy, BATCH, 3, 0.0)
    late = Tenant(name="late", priority=1000)
    (interactive,) = enqueue(policy, late, 1, 0.0)
    assert policy.start_next(1, 0.0) == [interactive]


def test_no_background_request_starts_while_a_prompt_is_computed() -> None:
    policy = AdmissionPolicy(QueueLimits())
    (interactive,) = enqueue(policy, Tenant(name="a"), 1, 0.0)
    batch = enqueue(policy, BATCH, 3, 0.0)
    assert policy.start_next(100, 0.0) == [interactive]
    assert policy.start_next(100, 0.5) == []
    policy.count_output(interactive, 1, 1.0)
    assert policy.start_next(100, 1.0) == batch[:1]  # one prompt at a time beside others
    assert policy.start_next(100, 1.1) == []
    policy.count_output(batch[0], 1, 1.2)
    assert policy.start_next(100, 1.2) == batch[1:2]


def test_a_refused_interactive_request_holds_nothing_back() -> None:
    policy = AdmissionPolicy(QueueLimits(max_queued=1))
    (interactive,) = enqueue(policy, Tenant(name="a"), 1, 0.0)
    policy.release(interactive, 0.1)  # gave up while it waited
    batch = enqueue(policy, BATCH, 1, 100.0)
    assert policy.start_next(100, 100.0) == batch


def test_a_quarter_of_the_seats_stays_free() -> None:
    policy = AdmissionPolicy(QueueLimits())
    policy._pace.window = 1000.0
    enqueue(policy, BATCH, 20, 100.0)
    assert len(policy.start_next(8, 100.0)) == 6
    (interactive,) = enqueue(policy, Tenant(name="a"), 1, 100.0)
    assert policy.start_next(8, 100.0) == [interactive]


def test_limits_of_the_tenant_stay_for_its_interactive_requests() -> None:
    policy = AdmissionPolicy(QueueLimits(max_wait_s=0.001))
    batch = enqueue(policy, BATCH, 3, 0.0)
    assert policy.start_next(100, 0.0) == batch
    (interactive,) = enqueue(policy, ACME, 1, 0.0)
    assert policy.start_next(100, 0.0) == [interactive]
    assert policy.num_waiting_interactive == 0


def test_the_budget_of_the_day_counts_both() -> None:
    budgets = DayBudgets(lambda: 0.0)
    budgets.charge(BATCH, "m", 60)
    budgets.charge(ACME, "m", 30)
    assert budgets.used("acme") == 90


def test_background_requests_ask_for_no_further_groups() -> None:
    policy = AdmissionPolicy(QueueLimits())
    enqueue(policy, BATCH, 50, 0.0)
    assert (policy.num_waiting, policy.num_waiting_interactive) == (50, 0)
    assert policy.backlog_s == 0.0


def finish(pace: BackgroundPace, now_s: float, gap_s: float) -> None:
    for _ in range(32):
        pace.next_token(gap_s)
    pace.ended(1, now_s, background=True, started=True, prompting=False)
    pace.started(1, background=True)
    pace.first_token(background=True)


def test_the_window_grows_while_steps_stay_short_and_shrinks_after() -> None:
    pace = BackgroundPace()
    for _ in range(100):
        pace.started(1, background=True)
        pace.first_token(background=True)
    now_s = 100.0
    before = pace.window
    for _ in range(10):
        now_s += 1
        finish(pace, now_s, 0.02)
    assert pace.window == before + 10
    pace.arrived(now_s)  # interactive traffic is back
    pace.first_token(background=False)
    for _ in range(60):
        now_s += 1
        pace.arrived(now_s)
        pace.first_token(background=False)
        finish(pace, now_s, 0.04)
        if pace.window == 1.0:
            break
    assert pace.window < 3


def test_alone_a_batch_may_use_the_whole_step() -> None:
    pace = BackgroundPace()
    for _ in range(100):
        pace.started(1, background=True)
        pace.first_token(background=True)
    now_s = 10 * QUIET_S
    finish(pace, now_s, 0.02)
    for _ in range(20):
        now_s += 1
        finish(pace, now_s, 0.04)
    assert pace.window > 20
