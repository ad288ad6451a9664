"""First tokens of interactive requests beside a batch, with the real policy in virtual time.

A group is a cost model: a step takes a fixed time, a time for each sequence that decodes and a time
for each prompt token; sequences go by priority, then by arrival, and background sequences wait for
interactive prompts, as the scheduler has them.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from arriero.router.tenants.admission_policy import AdmissionPolicy, QueuedRequest
from arriero.router.tenants.tenant import QueueLimits, Tenant
from arriero.shards.config.priorities import BACKGROUND_CHUNK

SEATS, ROOM, BUDGET = 32, 36, 512
INTERACTIVE = Tenant(name="a")
BATCH = INTERACTIVE.in_background()


@dataclass(frozen=True)
class Costs:
    """Seconds of a step, of a decoding sequence in a step, and of a prompt token."""

    step_s: float
    decode_s: float
    prompt_s: float


GPU = Costs(0.010, 0.00005, 0.00003)
CPU = Costs(0.015, 0.004, 0.0012)


@dataclass
class Sequence:
    request: QueuedRequest
    order: tuple[int, int]
    prefill: int
    left: int
    born_s: float
    first_s: float | None = None


@dataclass
class Result:
    first_token_s: list[float] = field(default_factory=list)
    batch_tokens: int = 0
    elapsed_s: float = 0.0

    @property
    def p99_s(self) -> float:
        return sorted(self.first_token_s)[int(0.99 * len(self.first_token_s))]


def arrivals(rate: float, count: int) -> list[tuple[float, int, int]]:
    """Time, prompt and output tokens of interactive requests, from 20 s on."""
    draw = random.Random(7)
    at_s, requests = 20.0, []
    for _ in range(count):
        at_s += draw.expovariate(rate)
        requests.append((at_s, draw.randint(64, 256), draw.randint(16, 64)))
    return requests


def simulate(costs: Costs, rate: float, count: int, *, batch: bool) -> Result:
    """One group for as long as interactive requests come."""
    policy, result = AdmissionPolicy(QueueLimits(max_wait_s=1e9)), Result()
    coming, draw = arrivals(rate, count), random.Random(11)
    by_request: dict[int, Sequence] = {}
    waiting: list[Sequence] = []
    seated: list[Sequence] = []
    order = iter(range(10**9))
    now_s = 0.0

    def enqueue(tenant: Tenant, prompt: int, output: int, at_s: float) -> None:
        request = QueuedRequest(tenant=tenant, num_prompt=prompt, max_output=output)
        policy.enqueue(request, at_s)
        rank = (tenant.priority, next(order))
        by_request[id(request)] = Sequence(request, rank, prompt, output, at_s)

    def refill() -> None:
        while batch and policy.waiting_by_tenant().get(BATCH.name, 0) < 32:
            enqueue(BATCH, draw.randint(32, 400), draw.randint(16, 100), now_s)

    def start() -> None:
        waiting.extend(by_request[id(request)] for request in policy.start_next(ROOM, now_s))

    refill()
    while coming or any(not s.request.tenant.background for s in by_request.values()):
        start()
        waiting.sort(key=lambda sequence: sequence.order)
        while waiting and len(seated) < SEATS:
            seated.append(waiting.pop(0))
        if not seated:
            now_s = min(now_s + 0.25, coming[0][0] if coming else now_s + 0.25)
            while coming and coming[0][0] <= now_s:
                at_s, prompt, output = coming.pop(0)
                enqueue(INTERACTIVE, prompt, output, at_s)
            continue
        seated.sort(key=lambda sequence: sequence.order)
        hold = any(s.prefill and not s.request.tenant.background for s in seated)
        rows = [s for s in seated if not (hold and s.request.tenant.background)]
        decoding = [sequence for sequence in rows if not sequence.prefill]
        budget, chunks = BUDGET - len(decoding), 0
        finished = list(decoding)
        for sequence in rows:
            if sequence.prefill and budget > 0:
                most = BACKGROUND_CHUNK if sequence.request.tenant.background else budget
                taken = min(budget, most, sequence.prefill)
                sequence.prefill -= taken
                budget, chunks = budget - taken, chunks + taken
                if not sequence.prefill:
                    finished.append(sequence)
        end_s = now_s + costs.step_s + costs.decode_s * len(decoding) + costs.prompt_s * chunks
        while coming and coming[0][0] <= end_s:
            now_s, prompt, output = coming.pop(0)
            enqueue(INTERACTIVE, prompt, output, now_s)
            start()
        now_s = end_s
        for sequence in finished:
            background = sequence.request.tenant.background
            policy.count_output(sequence.request, 1, now_s)
            sequence.left -= 1
            if sequence.first_s is None:
                sequence.first_s = now_s
                if not background:
                    result.first_token_s.append(now_s - sequence.born_s)
            result.batch_tokens += background
            if not sequence.left:
                seated.remove(sequence)
                del by_request[id(sequence.request)]
                policy.release(sequence.request, now_s)
        refill()
    result.elapsed_s = now_s
    return result


def rates() -> Iterator[tuple[Costs, float]]:
    """Half of what the interactive requests alone would fill, and a tenth."""
    yield GPU, 10.0
    yield GPU, 30.0
    yield CPU, 0.5
    yield CPU, 2.0


@pytest.mark.parametrize(("costs", "rate"), list(rates()))
def test_first_tokens_beside_a_batch(costs: Costs, rate: float) -> None:
    alone = simulate(costs, rate, 400, batch=False)
    beside = simulate(costs, rate, 400, batch=True)
    assert beside.p99_s <= 1.15 * alone.p99_s
    assert beside.batch_tokens / beside.elapsed_s > 10
