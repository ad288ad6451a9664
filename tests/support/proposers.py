"""Adversarial sources of drafted tokens: always right, always wrong, or both at random."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from arriero.shards.engine.sequence import Sequence as EngineSequence
from arriero.shards.engine.speculation.proposer import ProposerFactory

Outputs = Callable[[EngineSequence], Sequence[int]]
"""The output tokens that a sequence is known to give."""
TokenAt = Callable[[EngineSequence, int], int]
"""The proposed token at a position; -1 for none."""


class Scripted:
    """A proposer whose every token comes from a function of the position."""

    def __init__(self, sequence: EngineSequence, token_at: TokenAt) -> None:
        self.sequence, self.token_at = sequence, token_at
        self.matched = 20

    @property
    def next(self) -> int:
        return self.token_at(self.sequence, len(self.sequence.tokens))

    def extend(self) -> None:
        pass

    def propose(self, most: int) -> list[int]:
        known = len(self.sequence.tokens)
        tokens = [self.token_at(self.sequence, known + i) for i in range(most)]
        return tokens[: tokens.index(-1)] if -1 in tokens else tokens


def right_token(outputs: Outputs) -> TokenAt:
    def token_at(sequence: EngineSequence, position: int) -> int:
        output = outputs(sequence)
        at = position - sequence.num_prompt
        return output[at] if at < len(output) else 5

    return token_at


def peeking(outputs: Outputs) -> ProposerFactory:
    """Always right."""
    right = right_token(outputs)
    return lambda sequence: Scripted(sequence, right)


def wrong(outputs: Outputs, vocab_size: int) -> ProposerFactory:
    """Never right."""
    right = right_token(outputs)
    return lambda sequence: Scripted(sequence, lambda s, at: (right(s, at) + 1) % vocab_size)


def sometimes(outputs: Outputs, vocab_size: int, seed: int) -> ProposerFactory:
    """Right, wrong and silent at random; some sequences have no proposer."""
    right, rng = right_token(outputs), random.Random(seed)

    def make(sequence: EngineSequence) -> Scripted | None:
        if rng.random() < 0.1:
            return None
        bad = rng.choice([0.0, 0.1, 0.5])

        def token_at(sequence: EngineSequence, at: int) -> int:
            fate = random.Random(f"{seed} {sequence.owner} {at}").random()
            if fate < bad:
                return int(fate * 1000) % vocab_size
            return -1 if fate > 0.97 else right(sequence, at)

        return Scripted(sequence, token_at)

    return make


def wrong_at_every(outputs: Outputs, vocab_size: int, period: int) -> ProposerFactory:
    """Right, except at each position that `period` divides; the drafts go on after it."""
    right = right_token(outputs)

    def token_at(sequence: EngineSequence, position: int) -> int:
        token = right(sequence, position)
        return (token + 1) % vocab_size if position % period == 0 else token

    return lambda sequence: Scripted(sequence, token_at)
