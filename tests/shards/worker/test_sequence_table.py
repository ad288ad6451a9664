"""The batch that stands while plans repeat: the same as one made anew, step by step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from arriero.kernels.flat_batch import FlatBatch
from arriero.kernels.sampling_rows import SamplingRows
from arriero.shards.config.sampling_params import SamplingParams
from arriero.shards.protocol.step_plan import LAST_SAMPLED, NewSequence, StepPlan, int32
from arriero.shards.worker.rope_table import Rope
from arriero.shards.worker.sequence_table import SequenceTable

BLOCK = 4
STARTS = (5, 8, 3, 7)


def _table() -> SequenceTable:
    rope = Rope(torch.tensor([1.0, 0.1]), 256, torch.device("cpu"))
    return SequenceTable(
        max_sequences=8,
        max_blocks=64,
        block_size=BLOCK,
        vocab_size=1000,
        rope=rope,
        device=torch.device("cpu"),
    )


def _plans(steps: int) -> Iterator[StepPlan]:
    """Prefills of four sequences in slots 6, 1, 3 and 0, decodes of all, then of three."""
    slots, known, held, block = [6, 1, 3, 0], list(STARTS), [0, 0, 0, 0], 0
    for step in range(steps):
        if step == steps - 5:
            slots, known, held = slots[1:], known[1:], held[1:]
        added = []
        for row, slot in enumerate(slots):
            while held[row] * BLOCK <= known[row]:
                added.append((slot, held[row], block))
                held[row], block = held[row] + 1, block + 1
        first = step == 0
        counts = known if first else [1] * len(slots)
        yield StepPlan(
            step=step,
            freed=int32(),
            new=[_new(slot, n) for slot, n in zip(slots, known, strict=True)] if first else [],
            block_slots=int32([a[0] for a in added]),
            block_index=int32([a[1] for a in added]),
            block_ids=int32([a[2] for a in added]),
            slots=int32(slots),
            starts=int32([0] * len(slots) if first else known),
            counts=int32(counts),
            tokens=int32(range(sum(known))) if first else int32([LAST_SAMPLED] * len(slots)),
            samples=int32([1] * len(slots)),
            same_rows=step not in (0, 1, steps - 5),
        )
        if not first:
            known = [n + 1 for n in known]


def _new(slot: int, num_prompt: int) -> NewSequence:
    params = SamplingParams(temperature=0.5 * (slot % 2), top_k=slot, seed=slot)
    return NewSequence(slot=slot, params=params.to_wire(), num_prompt=num_prompt)


@pytest.mark.parametrize("over_wire", [False, True])
def test_a_standing_batch_is_the_same_as_a_new_one(over_wire: bool) -> None:
    standing, anew = _table(), _table()
    assert sum(plan.same_rows for plan in _plans(40)) == 37
    for plan in _plans(40):
        if over_wire:
            plan = StepPlan.from_bytes(plan.to_bytes())
        seen = []
        for table, one in ((standing, plan), (anew, replace(plan, same_rows=False))):
            table.apply(one)
            tokens, batch = table.batch(one)
            seen.append((tokens, batch, table.sampling_rows(one)))
        _check_same(seen[0], seen[1])
        drawn = int32([(plan.step * 31 + slot) % 1000 for slot in plan.slots.tolist()])
        standing.record(plan, drawn)
        anew.record(plan, drawn)


def _check_same(
    a: tuple[torch.Tensor, FlatBatch, SamplingRows], b: tuple[torch.Tensor, FlatBatch, SamplingRows]
) -> None:
    assert a[0].tolist() == b[0].tolist()
    columns = b[1].block_table_SB.shape[1]
    ours = replace(a[1], block_table_SB=a[1].block_table_SB[:, :columns])
    for got, wanted in ((ours, b[1]), (a[2], b[2])):
        for field in fields(wanted):
            left, right = getattr(got, field.name), getattr(wanted, field.name)
            if isinstance(right, torch.Tensor):
                np.testing.assert_array_equal(left, right, err_msg=field.name)
            else:
                assert left == right, field.name
