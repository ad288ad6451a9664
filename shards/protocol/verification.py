"""Which draws of a step count: leader and slices compare drafted and drawn tokens alike.

A row of a plan is [last token, d1 .. dn], and the target draws t0 .. tn, each after the tokens
before it. d1 is right if it equals t0, and so on; the draws up to the first that differs from its
drafted token are the next tokens of the sequence, exactly those without speculation.

Knows rows and tokens; knows nothing of how either came about.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from arriero.shards.protocol.step_plan import Int32, StepPlan, int32


def drawn_rows(plan: StepPlan) -> Int32:
    """Index into the plan's tokens of each drawn position, [R]."""
    return ranges(np.cumsum(plan.counts) - plan.samples, plan.samples)


def ranges(firsts: npt.NDArray[np.integer], counts: npt.NDArray[np.integer]) -> Int32:
    """Numbers `firsts[i]` .. `firsts[i] + counts[i] - 1` of each i, one after another."""
    if len(counts) and counts.min() == counts.max() == 1:
        return int32(firsts)
    before = np.cumsum(counts) - counts
    total = int(counts.sum())
    return int32(np.repeat(firsts - before, counts) + np.arange(total))


def num_emitted(samples: Int32, tokens: Int32, drawn: Int32) -> Int32:
    """Number of draws of each row that count, [S]; 0 for rows without draws.

    Args:
        samples: [S] number of draws of each row.
        tokens: [R] token of the row at each drawn position: the last known token, then the
            drafted tokens. The first of each row is not read.
        drawn: [R] drawn tokens.
    """
    emitted = np.minimum(samples, 1)
    ends = np.cumsum(samples)
    for row in np.flatnonzero(samples > 1).tolist():
        end = int(ends[row])
        start = end - int(samples[row])
        wrong = np.flatnonzero(tokens[start + 1 : end] != drawn[start : end - 1])
        emitted[row] = int(wrong[0]) + 1 if len(wrong) else end - start
    return emitted


def emitted_rows(samples: Int32, emitted: Int32) -> Int32:
    """Index into the draws of each draw that counts, rows one after another."""
    return ranges(np.cumsum(samples) - samples, emitted)
