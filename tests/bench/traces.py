"""Request traces in the shape of Mooncake's, scaled to any size.

Shape, from Qin et al., "Mooncake: Trading More Storage for Less Computation" (FAST 2025) and its
published traces: conversations of a few turns, each prompt being all that was said before and a new
message; a small number of system prompts that very many sessions share, their popularity falling
as Zipf's law; lengths with a heavy tail (mean prompts of 12,000 tokens, some of 128,000; outputs of
350); about half of all prompt blocks seen before, most blocks never seen again. Arrivals are
Poisson and a turn follows the answer after some time for thought.

Knows lengths and times; what the tokens are means nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from heapq import heappop, heappush

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """Numbers of a trace.

    Attributes:
        sessions_per_s: rate at which conversations begin.
        num_sessions: how many there are.
        system_prompts: how many different ones.
        zipf: exponent of their popularity.
        mean_system, mean_message, mean_output: tokens.
        mean_turns: of a conversation.
        think_s: mean time from an answer's end to the next message.
        max_prompt: a conversation ends before its prompt exceeds this.
        token_s: time that the answer to a message is taken to last, of each token.
    """

    sessions_per_s: float = 1.0
    num_sessions: int = 500
    system_prompts: int = 12
    zipf: float = 1.1
    mean_system: int = 3000
    mean_message: int = 2500
    mean_output: int = 350
    mean_turns: float = 3.5
    think_s: float = 30.0
    max_prompt: int = 131_072
    token_s: float = 0.03

    def scaled(self, factor: float) -> Shape:
        """All lengths times `factor`."""
        return Shape(
            sessions_per_s=self.sessions_per_s,
            num_sessions=self.num_sessions,
            system_prompts=self.system_prompts,
            zipf=self.zipf,
            mean_system=max(1, int(self.mean_system * factor)),
            mean_message=max(1, int(self.mean_message * factor)),
            mean_output=max(1, int(self.mean_output * factor)),
            mean_turns=self.mean_turns,
            think_s=self.think_s,
            max_prompt=max(8, int(self.max_prompt * factor)),
            token_s=self.token_s,
        )


@dataclass(frozen=True, slots=True)
class Request:
    """One message of a conversation.

    Attributes:
        at_s: when it comes.
        session: of which conversation.
        prompt: int32 token ids, all that was said before among them.
        output: tokens of its answer.
    """

    at_s: float
    session: int
    prompt: npt.NDArray[np.int32]
    output: int


def trace(shape: Shape, seed: int = 0, vocab: int = 32_000) -> Iterator[Request]:
    """The requests, by time."""
    rng = np.random.default_rng(seed)
    systems = [
        rng.integers(0, vocab, _length(rng, shape.mean_system), dtype=np.int32)
        for _ in range(shape.system_prompts)
    ]
    weights = 1.0 / np.arange(1, shape.system_prompts + 1) ** shape.zipf
    weights /= weights.sum()
    starts = np.cumsum(rng.exponential(1 / shape.sessions_per_s, shape.num_sessions))
    due: list[tuple[float, int, npt.NDArray[np.int32], int]] = []
    for session, at_s in enumerate(starts.tolist()):
        turns = int(rng.geometric(1 / shape.mean_turns))
        system = systems[int(rng.choice(shape.system_prompts, p=weights))]
        heappush(due, (at_s, session, system, turns))
    while due:
        at_s, session, said, turns = heappop(due)
        message = rng.integers(0, vocab, _length(rng, shape.mean_message), dtype=np.int32)
        prompt = np.concatenate((said, message))
        if len(prompt) > shape.max_prompt:
            continue
        output = _length(rng, shape.mean_output)
        yield Request(at_s, session, prompt, output)
        if turns > 1:
            answer = rng.integers(0, vocab, output, dtype=np.int32)
            next_s = at_s + output * shape.token_s + float(rng.exponential(shape.think_s))
            heappush(due, (next_s, session, np.concatenate((prompt, answer)), turns - 1))


def _length(rng: np.random.Generator, mean: int) -> int:
    """A length with a heavy tail: log-normal, sigma 1."""
    return max(1, int(rng.lognormal(np.log(mean) - 0.5, 1.0)))
