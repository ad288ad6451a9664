"""The next plan in the making, and the record of a plan until its result arrives.

Knows the layout of a `StepPlan`: decode rows first, each with its drafted tokens, then prefill
chunks. Decides nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Many
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from arriero.shards.engine.sequence import Sequence
from arriero.shards.protocol.step_plan import LAST_SAMPLED, Int32, NewSequence, StepPlan, int32
from arriero.shards.protocol.verification import drawn_rows

_EMPTY = int32()


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens start .. end - 1 of a sequence; `final` means sampling after the last token."""

    sequence: Sequence
    start: int
    end: int
    final: bool


@dataclass(frozen=True, slots=True)
class DecodeRows:
    """The decodes of a step.

    Attributes:
        slots: [D] slots.
        starts: [D] position of each slot's last known token, or of the one in flight.
        drafts: drafted tokens of rows that have any.
        requests: tokens that the slices shall draft after rows, for the next step.
    """

    slots: Int32
    starts: Int32
    drafts: dict[int, list[int]]
    requests: dict[int, int] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        """Number of tokens, drafted ones included."""
        return len(self.slots) + sum(map(len, self.drafts.values()))


@dataclass(frozen=True, slots=True)
class PromptRows:
    """Rows of a plan with prompt log-probabilities, for one sequence."""

    sequence: Sequence
    slot: int
    generation: int
    following: list[int]


@dataclass(frozen=True, slots=True)
class InFlight:
    """Record of a plan, to match its result to sequences.

    Attributes:
        step: number of the step.
        slots: [S'] int32, slot of each row with draws.
        generation: [S'] int64, generation of the slot at the time of the plan.
        prompt_rows: sequences of the rows of `StepResult.prompt_logprobs`, in order.
        samples: [S'] number of draws of each row; None if all have one.
        tokens: [R] token at each drawn position; empty if `samples` is None.
        num_decoded: tokens of a step of decodes alone; 0 for a step with prompts.
    """

    step: int
    slots: Int32
    generation: npt.NDArray[np.int64]
    prompt_rows: list[PromptRows]
    samples: Int32 | None = None
    tokens: Int32 = field(default_factory=int32)
    num_decoded: int = 0


class PlanDraft:
    """Gathers changes of slots and block tables; `build` adds the rows and starts a new draft.

    Args:
        max_rows: most decode rows of a plan.
    """

    def __init__(self, max_rows: int) -> None:
        self._ones = np.ones(max_rows, dtype=np.int32)
        self._last_sampled = np.full(max_rows, LAST_SAMPLED, dtype=np.int32)
        for constant in (self._ones, self._last_sampled):
            constant.flags.writeable = False  # shared by all plans
        self._freed: list[int] = []
        self._new: list[NewSequence] = []
        self._block_slots: list[int] = []
        self._block_index: list[int] = []
        self._block_ids: list[int] = []
        self._local_slots: list[int] = []
        self._local_index: list[int] = []
        self._local_ids: list[int] = []

    def free(self, slot: int) -> None:
        """Free a slot from the next plan on."""
        self._freed.append(slot)

    def enter(self, new: NewSequence, blocks: Many[int]) -> None:
        """Enter a sequence into a slot with these blocks."""
        self._new.append(new)
        self._block_slots.extend([new.slot] * len(blocks))
        self._block_index.extend(range(len(blocks)))
        self._block_ids.extend(blocks)

    def add_blocks(self, slot: int, blocks: Iterable[tuple[int, int]]) -> None:
        """Add blocks to a slot's table, as pairs of index and block id."""
        for index, block in blocks:
            self._block_slots.append(slot)
            self._block_index.append(index)
            self._block_ids.append(block)

    def add_local(self, slot: int, blocks: Iterable[tuple[int, int]]) -> None:
        """Add blocks to a slot's chunk-local table, as pairs of index and block id."""
        for index, block in blocks:
            self._local_slots.append(slot)
            self._local_index.append(index)
            self._local_ids.append(block)

    def build(
        self, step: int, rows: DecodeRows, tokens: Int32 | None, chunks: list[Chunk]
    ) -> StepPlan:
        """The plan of the given rows.

        Args:
            step: number of the step.
            rows: decodes.
            tokens: [D] last tokens, or None where only the slices know them.
            chunks: prefill chunks.
        """
        slots = rows.slots
        counts = self._ones[: len(slots)]
        tokens = self._last_sampled[: len(slots)] if tokens is None else tokens
        if rows.drafts:
            counts, tokens = _with_drafts(tokens, rows.drafts)
        plan = StepPlan(
            step=step,
            freed=_drain(self._freed),
            new=self._new,
            block_slots=_drain(self._block_slots),
            block_index=_drain(self._block_index),
            block_ids=_drain(self._block_ids),
            slots=slots,
            starts=rows.starts,
            counts=counts,
            tokens=tokens,
            samples=counts,
            local_slots=_drain(self._local_slots),
            local_index=_drain(self._local_index),
            local_ids=_drain(self._local_ids),
        )
        self._new = []
        if chunks:
            _add_chunks(plan, chunks)
        if rows.requests:
            plan.draft_lengths = np.zeros(len(plan.slots), dtype=np.int32)
            plan.draft_lengths[list(rows.requests)] = list(rows.requests.values())
        return plan


def _with_drafts(tokens: Int32, drafts: dict[int, list[int]]) -> tuple[Int32, Int32]:
    """Counts of the rows, and the last token of each row followed by its draft."""
    counts = np.ones(len(tokens), dtype=np.int32)
    parts: list[Int32] = []
    done = 0
    for row, draft in sorted(drafts.items()):
        counts[row] += len(draft)
        parts += (tokens[done : row + 1], int32(draft))
        done = row + 1
    parts.append(tokens[done:])
    return counts, np.concatenate(parts)


def _drain(values: list[int]) -> Int32:
    if not values:
        return _EMPTY
    array = int32(values)
    values.clear()
    return array


def _add_chunks(plan: StepPlan, chunks: list[Chunk]) -> None:
    counts = int32([chunk.end - chunk.start for chunk in chunks])
    windows = [chunk.sequence.window(chunk.start, chunk.end) for chunk in chunks]
    has_prompt_rows = [_wants_prompt_rows(chunk) for chunk in chunks]
    if any(has_prompt_rows):
        plan.prompt_rows = np.concatenate((np.zeros_like(plan.slots), int32(has_prompt_rows)))
        plan.prompt_next = np.concatenate(
            [
                chunk.sequence.prompt_next(chunk.start, chunk.end)
                for chunk, rows in zip(chunks, has_prompt_rows, strict=True)
                if rows
            ]
        )
    else:
        plan.prompt_rows = np.zeros(len(plan.slots) + len(chunks), dtype=np.int32)
    plan.slots = np.concatenate((plan.slots, int32([chunk.sequence.slot for chunk in chunks])))
    plan.starts = np.concatenate((plan.starts, int32([chunk.start for chunk in chunks])))
    plan.counts = np.concatenate((plan.counts, counts))
    plan.tokens = np.concatenate((plan.tokens, *windows))
    plan.samples = np.concatenate((plan.samples, int32([chunk.final for chunk in chunks])))


def _wants_prompt_rows(chunk: Chunk) -> bool:
    return chunk.sequence.wants_prompt_rows and chunk.start < chunk.sequence.num_prompt


def in_flight(
    plan: StepPlan, decodes: DecodeRows, chunks: list[Chunk], generation: npt.NDArray[np.int64]
) -> InFlight:
    """Record of a plan with these decode rows and chunks.

    Args:
        plan: plan as built.
        decodes: the plan's decode rows.
        chunks: prefill chunks of the plan.
        generation: [slots] current generation of every slot.
    """
    slots = decodes.slots
    if chunks:
        final = int32([chunk.sequence.slot for chunk in chunks if chunk.final])
        slots = np.concatenate((slots, final))
    samples, tokens = None, _EMPTY
    if decodes.drafts:
        samples = plan.samples[plan.samples > 0]
        tokens = plan.tokens[drawn_rows(plan)]
    rows = [
        PromptRows(
            chunk.sequence,
            chunk.sequence.slot,
            int(generation[chunk.sequence.slot]),
            chunk.sequence.prompt_next(chunk.start, chunk.end).tolist(),
        )
        for chunk in chunks
        if _wants_prompt_rows(chunk)
    ]
    num_decoded = 0 if chunks else len(plan.tokens)
    return InFlight(plan.step, slots, generation[slots], rows, samples, tokens, num_decoded)
