"""How many tokens to draft: what a row costs, and how often drafts are right.

A drafted token is worth its row if it makes the batch faster: with N sequences, a step of
a + b * T microseconds for T rows gives N tokens, so a row must bring more than N * b / (a + b * T)
tokens. For one sequence, where a step mostly reads weights, that is a small probability; in a full
batch, where each row costs as much as it brings, it is near 1, and nothing is drafted.

Knows rows, times and counts; knows nothing of tokens.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence as Many

_FADE = 0.97
"""Weight of the past at each observed step."""
_PRIOR_SLOPE = 0.1
"""Cost of a row relative to that of a step, before any measurement."""
_PRIOR_WEIGHT = 4.0
_LEAST_SLOPE = 0.004
_OUTLIER = 3.0
_LEARNING = 0.12
_CLASSES = (2, 3, 5, 12)
"""Lengths of a match from which a proposal is of the next class."""
_PRIORS = (0.1, 0.15, 0.5, 0.75, 0.9)
"""Probability of a right token in each class, before any proposal.

After one or two tokens it is too small for a draft, until proposals that are not used were right.
"""
_CARRIED = 0.25
"""Weight of a sequence's rates in those with which the next sequence of its tenant starts."""


class StepCost:
    """Time of a decode step as a + b * rows, measured as the engine runs."""

    def __init__(self) -> None:
        self._draft_us = 0.0
        self._weight = self._rows = self._rows2 = self._us = self._rows_us = 0.0
        self._base, self._slope = 1.0, _PRIOR_SLOPE

    def observe(self, rows: int, elapsed_us: float) -> None:
        """Take the time of a step of `rows` decoded positions, without prompts."""
        if elapsed_us <= 0:
            return
        if self._weight > 10:  # other processes delay single steps by a multiple
            elapsed_us = min(elapsed_us, _OUTLIER * (self._base + self._slope * rows))
        self._weight = _FADE * self._weight + 1
        self._rows = _FADE * self._rows + rows
        self._rows2 = _FADE * self._rows2 + rows * rows
        self._us = _FADE * self._us + elapsed_us
        self._rows_us = _FADE * self._rows_us + rows * elapsed_us
        mean_rows, mean_us = self._rows / self._weight, self._us / self._weight
        variance = self._rows2 / self._weight - mean_rows**2
        covariance = self._rows_us / self._weight - mean_rows * mean_us
        prior = _PRIOR_SLOPE * mean_us / (1 + _PRIOR_SLOPE * mean_rows)
        prior_weight = _PRIOR_WEIGHT / self._weight
        slope = (covariance + prior_weight * prior) / (variance + prior_weight)
        self._slope = min(max(slope, _LEAST_SLOPE * mean_us / mean_rows), mean_us / mean_rows)
        self._base = max(mean_us - self._slope * mean_rows, 0.0)

    def observe_draft(self, length: int, elapsed_us: float) -> None:
        """Take the time in which the slices drafted `length` tokens for all sequences together."""
        each_us = elapsed_us / length
        self._draft_us += 0.1 * (each_us - self._draft_us) if self._draft_us else each_us

    def share(self, tokens: float, rows: float, drafting: int = 0) -> float:
        """Tokens that a further row must bring, where a step of `rows` gives `tokens`.

        If the row's token is yet to be drafted by the slices, `drafting` sequences share the time
        of their drafts.
        """
        row_us = self._slope + (self._draft_us / drafting if drafting else 0.0)
        return tokens * row_us / (self._base + self._slope * rows)


def choose_lengths(
    probabilities: Many[float],
    num_rows: int,
    most: int,
    cost: StepCost,
    *,
    in_slices: bool = False,
) -> list[int]:
    """Number of tokens to draft for each sequence.

    Args:
        probabilities: for each sequence, the probability that a drafted token is right if all
            before it are.
        num_rows: rows of the step without drafts, these sequences included.
        most: most drafted tokens of a sequence.
        cost: time of steps.
        in_slices: whether the slices are yet to draft, which takes time too.
    """
    lengths = [0] * len(probabilities)
    tokens = rows = float(num_rows)
    for _ in range(2):  # drafts themselves make later rows dearer
        least = cost.share(tokens, rows, len(probabilities) if in_slices else 0)
        lengths = [_length(p, least, most) for p in probabilities]
        tokens = num_rows + sum(map(_expected, probabilities, lengths))
        rows = float(num_rows + sum(lengths))
    return lengths


def _length(p: float, least: float, most: int) -> int:
    """Largest k with p**k >= `least`."""
    if p < least:
        return 0
    return most if p >= 1 or least <= 0 else min(most, int(math.log(least) / math.log(p)))


def _expected(p: float, length: int) -> float:
    """Expected number of right tokens of a draft."""
    return length if p >= 1 else p * (1 - p**length) / (1 - p)


class Acceptance:
    """How often proposals of a sequence are right, by the strength of their match."""

    __slots__ = ("_rates",)

    def __init__(self, start: Acceptance | None = None) -> None:
        """Start from the rates of others, or from what is usual."""
        self._rates: list[float] = list(_PRIORS if start is None else start._rates)

    def rate(self, matched: int) -> float:
        """Probability that the next proposed token is right."""
        return self._rates[bisect_right(_CLASSES, matched)]

    def note(self, matched: int, right: int, wrong: int) -> None:
        """Count right tokens of a proposal, and after them 1 or 0 wrong ones."""
        for strength in range(matched, matched + right):
            kind = bisect_right(_CLASSES, strength)
            self._rates[kind] += _LEARNING * (0.99 - self._rates[kind])
        if wrong:
            kind = bisect_right(_CLASSES, matched + right)
            self._rates[kind] -= _LEARNING * (self._rates[kind] - 0.01)

    def learn(self, other: Acceptance) -> None:
        """Take a part of the rates of an ended sequence."""
        pairs = zip(self._rates, other._rates, strict=True)
        self._rates = [own + _CARRIED * (new - own) for own, new in pairs]
