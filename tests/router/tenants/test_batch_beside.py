"""First tokens of interactive requests beside a batch, with the real policy in virtual time.

A group is a cost model: a step takes a fixed time, a time for each sequence that decodes and a time
for each prompt token; sequences go by priority, then by arrival, and background sequences wait for
interactive prompts, as the scheduler has them.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from arriero.router.tenants.admission_policy import AdmissionPolicy, QueuedRequest
from arriero.router.tenants.tenant import QueueLimits, Tenant
from arriero.shards.config.priorities import BACKGROUND_CHUNK

SEATS, ROOM, BUDGET = 32, 36, 512
DEPTH = 2
"""Steps that the engine plans ahead of results: a new request waits for these steps."""
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
    rank: tuple[int, int]
    prefill: int
    unplanned: int
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


class Simulation:
    """One group for as long as interactive requests come; up to `DEPTH` steps are planned ahead."""

    def __init__(self, costs: Costs, rate: float, count: int, *, batch: bool) -> None:
        self.costs, self.batch = costs, batch
        self.coming, self.draw = deque(arrivals(rate, count)), random.Random(11)
        self.policy, self.result = AdmissionPolicy(QueueLimits(max_wait_s=1e9)), Result()
        self.by_request: dict[int, Sequence] = {}
        self.waiting: list[Sequence] = []
        self.seated: list[Sequence] = []
        self.planned: deque[tuple[list[Sequence], float]] = deque()
        self.num_arrived, self.now_s = 0, 0.0

    def run(self) -> Result:
        while self.coming or any(not is_background(s) for s in self.by_request.values()):
            self.refill()
            self.plan()
            if self.planned:
                self.step()
            else:
                wait_s = self.coming[0][0] - self.now_s if self.coming else 0.25
                self.arrive(self.now_s + min(0.25, wait_s))
        self.result.elapsed_s = self.now_s
        return self.result

    def enqueue(self, tenant: Tenant, prompt: int, output: int) -> None:
        request = QueuedRequest(tenant=tenant, num_prompt=prompt, max_output=output)
        self.policy.enqueue(request, self.now_s)
        self.num_arrived += 1
        rank = (tenant.priority, self.num_arrived)
        sequence = Sequence(request, rank, prompt, output, output, self.now_s)
        self.by_request[id(request)] = sequence

    def refill(self) -> None:
        while self.batch and self.policy.waiting_by_tenant().get(BATCH.name, 0) < 32:
            self.enqueue(BATCH, self.draw.randint(32, 400), self.draw.randint(16, 100))

    def arrive(self, until_s: float) -> None:
        """Requests that come up to a moment; the group plans as soon as a request is there."""
        while self.coming and self.coming[0][0] <= until_s:
            self.now_s, prompt, output = self.coming.popleft()
            self.enqueue(INTERACTIVE, prompt, output)
            self.plan()
        self.now_s = until_s

    def plan(self) -> None:
        started = self.policy.start_next(ROOM, self.now_s)
        self.waiting += [self.by_request[id(request)] for request in started]
        while len(self.planned) < DEPTH and (step := self.next_step()):
            self.planned.append(step)

    def next_step(self) -> tuple[list[Sequence], float] | None:
        """The sequences that get a token in a step, and its seconds."""
        self.waiting.sort(key=lambda sequence: sequence.rank)
        while self.waiting and len(self.seated) < SEATS:
            self.seated.append(self.waiting.pop(0))
        self.seated.sort(key=lambda sequence: sequence.rank)
        hold = any(s.prefill and not is_background(s) for s in self.seated)
        rows = [s for s in self.seated if not (hold and is_background(s))]
        sampled = [s for s in rows if not s.prefill and s.unplanned]
        step_s = self.costs.step_s + self.costs.decode_s * len(sampled)
        budget = BUDGET - len(sampled)
        for sequence in rows:
            most = BACKGROUND_CHUNK if is_background(sequence) else budget
            chunk = min(budget, most, sequence.prefill)
            if chunk:
                sequence.prefill -= chunk
                budget -= chunk
                step_s += self.costs.prompt_s * chunk
                if not sequence.prefill:
                    sampled.append(sequence)
        for sequence in sampled:
            sequence.unplanned -= 1
        return (sampled, step_s) if sampled or budget < BUDGET else None

    def step(self) -> None:
        """Run the oldest planned step."""
        sampled, step_s = self.planned[0]
        self.arrive(self.now_s + step_s)
        self.planned.popleft()
        for sequence in sampled:
            request, background = sequence.request, is_background(sequence)
            self.policy.count_output(request, 1, self.now_s)
            sequence.left -= 1
            if sequence.first_s is None:
                sequence.first_s = self.now_s
                if not background:
                    self.result.first_token_s.append(self.now_s - sequence.born_s)
            self.result.batch_tokens += background
            if not sequence.left:
                self.seated.remove(sequence)
                del self.by_request[id(request)]
                self.policy.release(request, self.now_s)


def is_background(sequence: Sequence) -> bool:
    return sequence.request.tenant.background


def rates() -> Iterator[tuple[Costs, float]]:
    """Half of what the interactive requests alone would fill, and a tenth."""
    yield GPU, 10.0
    yield GPU, 30.0
    yield CPU, 0.5
    yield CPU, 2.0


@pytest.mark.parametrize(("costs", "rate"), list(rates()))
def test_first_tokens_beside_a_batch(costs: Costs, rate: float) -> None:
    alone = Simulation(costs, rate, 400, batch=False).run()
    beside = Simulation(costs, rate, 400, batch=True).run()
    assert beside.p99_s <= 1.15 * alone.p99_s
    assert beside.batch_tokens / beside.elapsed_s > 10
