"""The drawn positions of a plan as rows of the sampler, with the drafted tokens before each.

Knows plans; knows nothing of parameters or of models. Shape legend: S rows of the plan, R drawn
positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from arriero.shards.protocol.step_plan import Int32, StepPlan, int32
from arriero.shards.protocol.verification import drawn_rows, num_emitted


@dataclass(frozen=True, slots=True)
class DrawnRows:
    """Positions after which a token is drawn, row by row of the plan.

    Attributes:
        slots: [R] slot of each position.
        positions: [R] position of the token that is drawn.
        depths: [R] number of drafted tokens of the same plan row up to the position.
        index: [R] index of the position in the plan's tokens.
        tokens: tokens of the plan.
    """

    slots: Int32
    positions: Int32
    depths: Int32
    index: Int32
    tokens: Int32

    @classmethod
    def of(cls, plan: StepPlan) -> DrawnRows:
        """The drawn positions of a plan."""
        ends, samples = plan.starts + plan.counts, plan.samples
        index = drawn_rows(plan)
        if not has_drafts(plan):
            drawn = samples.astype(bool)
            return cls(
                plan.slots[drawn], ends[drawn], np.zeros(len(index), np.int32), index, plan.tokens
            )
        first = np.cumsum(samples) - samples
        depths = int32(np.arange(len(index)) - np.repeat(first, samples))
        positions = np.repeat(ends - samples + 1, samples) + depths
        return cls(np.repeat(plan.slots, samples), positions, depths, index, plan.tokens)

    def drafted(self, row: int) -> list[int]:
        """The drafted tokens of the plan row up to a position."""
        end = int(self.index[row]) + 1
        tokens: list[int] = self.tokens[end - int(self.depths[row]) : end].tolist()
        return tokens


def has_drafts(plan: StepPlan) -> bool:
    """Whether a plan has drafted tokens."""
    return len(plan.tokens) > len(plan.slots) and bool((plan.samples > 1).any())


def drafts_by_slot(plan: StepPlan) -> dict[int, list[int]]:
    """The drafted tokens of each slot that has any."""
    if not has_drafts(plan):
        return {}
    ends = np.cumsum(plan.counts)
    return {
        int(plan.slots[row]): plan.tokens[ends[row] - plan.samples[row] + 1 : ends[row]].tolist()
        for row in np.flatnonzero(plan.samples > 1)
    }


def emitted_counts(plan: StepPlan, drawn: Int32) -> Int32:
    """Number of drawn tokens that count, for each row of the plan; 0 for rows without draws."""
    if not has_drafts(plan):
        return np.minimum(plan.samples, 1)
    return num_emitted(plan.samples, plan.tokens[drawn_rows(plan)], drawn)


def emitted_tokens(plan: StepPlan, drawn: Int32) -> list[list[int]]:
    """The drawn tokens that count, for each row with draws."""
    tokens: list[int] = drawn.tolist()
    if not has_drafts(plan):
        return [[token] for token in tokens]
    samples = plan.samples[plan.samples > 0]
    emitted = num_emitted(samples, plan.tokens[drawn_rows(plan)], drawn)
    starts = np.cumsum(samples) - samples
    return [
        tokens[start : start + count]
        for start, count in zip(starts.tolist(), emitted.tolist(), strict=True)
    ]
