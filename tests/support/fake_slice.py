"""A slice whose model is a hash: the next token is a function of every token that it can read.

It keeps slots and KV blocks as a slice does, and stores token ids in the blocks, so a wrong block
table, a block reused too early or a false prefix hit changes the tokens. `answer` computes the
same function straight from the definition.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from arriero.shards.config.sampling_params import SamplingParams
from arriero.shards.engine.sequence import sample_seed
from arriero.shards.engine.types import EngineConfig, EngineRequest
from arriero.shards.kv.transfers import TransferBatch, TransferResult
from arriero.shards.protocol import wire
from arriero.shards.protocol.step_plan import (
    LAST_SAMPLED,
    Logprobs,
    NewSequence,
    StepPlan,
    StepResult,
    int32,
)

NOTHING = (-1, -1)


def sight(config: EngineConfig, tokens: list[int]) -> list[int]:
    """The tokens that the last of them sees."""
    window, sinks = config.attention_window, config.attention_sinks
    if not window:
        return tokens
    first = max(0, len(tokens) - window)
    return tokens[: min(sinks, first)] + tokens[first:]


def draw(tokens: list[int], seed: int, banned: tuple[int, ...], vocab_size: int) -> int:
    """The token after `tokens`."""
    data = array("I", tokens).tobytes() + seed.to_bytes(8, "little")
    token = int.from_bytes(hashlib.blake2b(data, digest_size=4).digest(), "little") % vocab_size
    while token in banned:
        token = (token + 1) % vocab_size
    return token


def logprob(tokens: list[int], token: int) -> float:
    """A stand-in for the log-probability of `token` after `tokens`."""
    data = array("I", [*tokens, token]).tobytes()
    return -int.from_bytes(hashlib.blake2b(data, digest_size=2).digest(), "little") / 65536


@dataclass
class Answer:
    tokens: list[int]
    finish_reason: str
    logprobs: list[float]
    prompt_logprobs: list[float]


def answer(config: EngineConfig, request: EngineRequest, index: int) -> Answer:
    """What sample `index` of a request must be."""
    params = request.params
    assert params.seed is not None and params.max_tokens is not None
    seed = sample_seed(params.seed, index)
    ends = () if params.ignore_eos else config.eos_token_ids
    stops = (*params.stop_token_ids, *ends)
    prompt = list(request.prompt)
    output = list(request.resumed)
    logprobs = []
    while True:
        banned = stops if len(output) < params.min_tokens else ()
        so_far = prompt + output
        seen = sight(config, so_far)
        token = draw(seen, seed, banned, config.vocab_size)
        logprobs.append(logprob(seen, token))
        output.append(token)
        if token in stops:
            reason = "stop"
        elif len(output) == params.max_tokens:
            reason = "length"
        else:
            continue
        rows = [logprob(sight(config, prompt[:i]), prompt[i]) for i in range(1, len(prompt))]
        return Answer(output[len(request.resumed) :], reason, logprobs, rows)


@dataclass
class _Occupant:
    new: NewSequence
    params: SamplingParams
    blocks: dict[int, int] = field(default_factory=dict)
    local: dict[int, int] = field(default_factory=dict)
    last: int | None = None


class FakeSlice:
    """Runs plans in order, checking each as it goes."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.kv = [[NOTHING] * config.block_size for _ in range(config.num_blocks)]
        self.local = [[NOTHING] * config.block_size for _ in range(config.num_local_blocks)]
        self.slots: dict[int, _Occupant] = {}
        self.step = 0
        self.repeats = 0
        self._next_rows: list[tuple[int, int]] = []

    def run(self, plan: StepPlan) -> StepResult:
        config = self.config
        assert plan.step == self.step
        self.step += 1
        assert len(plan.slots) == len(set(plan.slots.tolist())), "a sequence twice in a step"
        assert plan.counts.sum() <= config.max_batch_tokens
        assert plan.counts.min(initial=1) > 0
        assert len(plan.slots) or config.num_dp_ranks > 1, "a plan without rows"
        assert len(plan.tokens) == plan.counts.sum()
        if plan.same_rows:
            self.repeats += 1
            rows_now = list(zip(plan.slots.tolist(), plan.starts.tolist(), strict=True))
            assert rows_now == self._next_rows and not len(plan.freed) and not plan.new
            assert (plan.tokens == LAST_SAMPLED).all() and (plan.samples == 1).all()
        ended = (plan.starts + plan.counts).tolist()
        self._next_rows = list(zip(plan.slots.tolist(), ended, strict=True))
        for slot in plan.freed.tolist():
            del self.slots[slot]
        for new in plan.new:
            assert new.slot not in self.slots and 0 <= new.slot < config.max_sequences
            self.slots[new.slot] = _Occupant(new, new.params)
        for slot, index, block in zip(
            plan.block_slots.tolist(),
            plan.block_index.tolist(),
            plan.block_ids.tolist(),
            strict=True,
        ):
            gapless = index == len(self.slots[slot].blocks)
            assert gapless or config.attention_window, "a gap in a block table"
            self.slots[slot].blocks[index] = block
        for slot, index, block in zip(
            plan.local_slots.tolist(),
            plan.local_index.tolist(),
            plan.local_ids.tolist(),
            strict=True,
        ):
            self.slots[slot].local[index] = block

        ends = np.cumsum(plan.counts).tolist()
        prompt_rows = plan.prompt_rows.tolist() or [0] * len(plan.slots)
        tokens: dict[int, list[tuple[int, float]]] = {}
        rows: dict[int, list[float]] = {}
        any_logprobs = False
        # Backwards, so that a sequence which needs what an earlier row of the same step writes
        # reads the wrong thing.
        for row in reversed(range(len(plan.slots))):
            one = self.slots[int(plan.slots[row])]
            start, count = int(plan.starts[row]), int(plan.counts[row])
            ids = plan.tokens[ends[row] - count : ends[row]].tolist()
            for position, token in enumerate(ids, start):
                if token == LAST_SAMPLED:
                    assert config.num_stages == 1, "the first stage does not hold that token"
                    assert one.last is not None
                    token = one.last
                block, offset = divmod(position, config.block_size)
                self.kv[one.blocks[block]][offset] = (position, token)
                if config.attention_chunk:
                    self.local[one.local[block]][offset] = (position, token)
            seen = self._read(one, start, start + count)
            if config.attention_chunk:
                self._read_chunks(one, start, seen)
            if prompt_rows[row]:
                following = [
                    seen[p + 1] if p + 1 < len(seen) else None for p in range(start, start + count)
                ]
                rows[row] = [start, count, following, seen]  # type: ignore[list-item]
            num_draws = int(plan.samples[row])
            if num_draws:
                tokens[row] = self._draw(one, start + count - num_draws + 1, seen)
                any_logprobs |= one.params.logprobs is not None
        chosen = [pair for row in sorted(tokens) for pair in tokens[row]]
        return StepResult(
            step=plan.step,
            tokens=int32([token for token, _ in chosen]),
            logprobs=_logprobs(chosen) if any_logprobs else None,
            prompt_logprobs=self._prompt_logprobs(plan, rows) if rows else None,
            dp_rank=plan.dp_rank,
        )

    def _draw(self, one: _Occupant, first: int, seen: list[int]) -> list[tuple[int, float]]:
        """Draw after `first` tokens and each longer prefix of `seen`; keeps the last right draw."""
        rows: list[tuple[int, float]] = []
        right = True
        for length in range(first, len(seen) + 1):
            num_output = length - one.new.num_prompt
            assert num_output >= one.new.num_output
            banned = one.new.stop_tokens if num_output < one.params.min_tokens else ()
            assert one.params.seed is not None
            last = sight(self.config, seen[:length])
            if rows:
                right = right and rows[-1][0] == seen[length - 1]
            token = draw(last, one.params.seed, banned, self.config.vocab_size)
            rows.append((token, logprob(last, token)))
            if right:
                one.last = token
        return rows

    def _read(self, one: _Occupant, start: int, length: int) -> list[int]:
        """The tokens up to `length`, as far as those from `start` on see them; else -1."""
        seen = [-1] * length
        for position in sight(self.config, list(range(start + 1))) + list(range(start + 1, length)):
            block, offset = divmod(position, self.config.block_size)
            at, token = self.kv[one.blocks[block]][offset]
            assert at == position, f"position {position} reads what was written for {at}"
            seen[position] = token
        return seen

    def _read_chunks(self, one: _Occupant, start: int, seen: list[int]) -> None:
        """What the tokens from `start` on see of their chunks is what was written there."""
        chunk = self.config.attention_chunk
        for position in range(start // chunk * chunk, len(seen)):
            block, offset = divmod(position, self.config.block_size)
            found = self.local[one.local[block]][offset]
            assert found == (position, seen[position]), f"chunk-local position {position}: {found}"

    def _prompt_logprobs(self, plan: StepPlan, rows: dict[int, list]) -> Logprobs:  # type: ignore[type-arg]
        out = []
        following = iter(plan.prompt_next.tolist())
        for row in sorted(rows):
            start, count, inside, seen = rows[row]
            for i in range(count):
                token = next(following)
                assert inside[i] is None or token in (-1, inside[i])
                last = sight(self.config, seen[: start + i + 1])
                out.append((token, 0.0 if token < 0 else logprob(last, token)))
        assert next(following, None) is None
        return _logprobs(out)


def _logprobs(rows: list[tuple[int, float]]) -> Logprobs:
    tokens = int32([token for token, _ in rows]).reshape(-1, 1)
    values = np.asarray([value for _, value in rows], dtype=np.float32)
    return Logprobs(chosen=values, top_tokens=tokens, top=values.reshape(-1, 1))


class FakeExecutor:
    """Runs plans on a `FakeSlice`, through the wire's bytes; results wait to be collected."""

    def __init__(self, config: EngineConfig) -> None:
        self.slice = FakeSlice(config)
        self.results: deque[StepResult] = deque()
        self.closed = False
        self.transfer_results: list[TransferResult] = []

    def submit(self, plan: StepPlan) -> None:
        result = self.slice.run(wire.decode(wire.encode(plan), StepPlan))
        self.results.append(wire.decode(wire.encode(result), StepResult))

    def collect(self, timeout_s: float | None = None) -> StepResult | None:
        return self.results.popleft() if self.results else None

    def take_loads(self) -> dict[int, Any]:
        return {}

    def transfer(self, batch: TransferBatch) -> None:
        raise AssertionError("there are no tiers")

    def collect_transfers(self, timeout_s: float = 0.0) -> list[TransferResult]:
        transfer_results, self.transfer_results = self.transfer_results, []
        return transfer_results

    def close(self) -> None:
        self.closed = True
