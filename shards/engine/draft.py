"""The next plan while it is put together, and what is remembered of it until its result is in.

Knows how a `StepPlan` is laid out: decode rows first, then prefill chunks. Decides nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Many
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from arriero.shards.engine.sequence import Sequence
from arriero.shards.protocol.step_plan import LAST_SAMPLED, Int32, NewSequence, StepPlan, int32

_EMPTY = int32()


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens start .. end - 1 of a sequence; `final` when a token is drawn after the last."""

    sequence: Sequence
    start: int
    end: int
    final: bool


@dataclass(frozen=True, slots=True)
class PromptRows:
    """Rows of a plan whose prompt log-probabilities are wanted, for one sequence."""

    sequence: Sequence
    slot: int
    generation: int
    following: list[int]


@dataclass(frozen=True, slots=True)
class InFlight:
    """What the result of a plan is for.

    Attributes:
        step: of the plan.
        slots: [R] int32, where each sampled token belongs.
        generation: [R] int64, of the slot's occupant at the time.
        prompt_rows: whom the rows of `StepResult.prompt_logprobs` belong to, in order.
    """

    step: int
    slots: Int32
    generation: npt.NDArray[np.int64]
    prompt_rows: list[PromptRows]


class PlanDraft:
    """Gathers changes of slots and block tables; `build` adds the rows and starts afresh.

    Args:
        max_rows: most decode rows of a plan.
    """

    def __init__(self, max_rows: int) -> None:
        self._ones = np.ones(max_rows, dtype=np.int32)
        self._last_sampled = np.full(max_rows, LAST_SAMPLED, dtype=np.int32)
        for constant in (self._ones, self._last_sampled):
            constant.flags.writeable = False  # every plan shares them
        self._freed: list[int] = []
        self._new: list[NewSequence] = []
        self._block_slots: list[int] = []
        self._block_index: list[int] = []
        self._block_ids: list[int] = []
        self._local_slots: list[int] = []
        self._local_index: list[int] = []
        self._local_ids: list[int] = []

    def free(self, slot: int) -> None:
        """The slot is free from the next plan on."""
        self._freed.append(slot)

    def enter(self, new: NewSequence, blocks: Many[int]) -> None:
        """A sequence enters a slot with these blocks."""
        self._new.append(new)
        self._block_slots.extend([new.slot] * len(blocks))
        self._block_index.extend(range(len(blocks)))
        self._block_ids.extend(blocks)

    def add_blocks(self, slot: int, blocks: Iterable[tuple[int, int]]) -> None:
        """The slot's table gets these blocks: index and id of each."""
        for index, block in blocks:
            self._block_slots.append(slot)
            self._block_index.append(index)
            self._block_ids.append(block)

    def add_local(self, slot: int, blocks: Iterable[tuple[int, int]]) -> None:
        """The slot's chunk-local table gets these blocks, likewise."""
        for index, block in blocks:
            self._local_slots.append(slot)
            self._local_index.append(index)
            self._local_ids.append(block)

    def build(
        self, step: int, slots: Int32, starts: Int32, tokens: Int32 | None, chunks: list[Chunk]
    ) -> StepPlan:
        """The plan of these rows.

        Args:
            step: its number.
            slots: [D] slots that decode.
            starts: [D] position of each one's token.
            tokens: [D] the tokens, or None where the slices hold them.
            chunks: prefill chunks.
        """
        ones = self._ones[: len(slots)]
        plan = StepPlan(
            step=step,
            freed=_taken(self._freed),
            new=self._new,
            block_slots=_taken(self._block_slots),
            block_index=_taken(self._block_index),
            block_ids=_taken(self._block_ids),
            slots=slots,
            starts=starts,
            counts=ones,
            tokens=self._last_sampled[: len(slots)] if tokens is None else tokens,
            samples=ones,
            local_slots=_taken(self._local_slots),
            local_index=_taken(self._local_index),
            local_ids=_taken(self._local_ids),
        )
        self._new = []
        if chunks:
            _add_chunks(plan, chunks)
        return plan


def _taken(values: list[int]) -> Int32:
    if not values:
        return _EMPTY
    array = int32(values)
    values.clear()
    return array


def _add_chunks(plan: StepPlan, chunks: list[Chunk]) -> None:
    counts = int32([chunk.end - chunk.start for chunk in chunks])
    windows = [chunk.sequence.window(chunk.start, chunk.end) for chunk in chunks]
    wanted = [_wants_rows(chunk) for chunk in chunks]
    if any(wanted):
        plan.prompt_rows = np.concatenate((np.zeros_like(plan.slots), int32(wanted)))
        plan.prompt_next = np.concatenate(
            [
                chunk.sequence.prompt_next(chunk.start, chunk.end)
                for chunk, rows in zip(chunks, wanted, strict=True)
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


def _wants_rows(chunk: Chunk) -> bool:
    return chunk.sequence.wants_prompt_rows and chunk.start < chunk.sequence.num_prompt


def in_flight(
    plan: StepPlan, decoding: Int32, chunks: list[Chunk], generation: npt.NDArray[np.int64]
) -> InFlight:
    """What to remember of a plan of these decode rows and chunks.

    Args:
        plan: as built.
        decoding: [D] slots of its decode rows.
        chunks: its prefill chunks.
        generation: [slots] of every slot now.
    """
    slots = decoding
    if chunks:
        final = int32([chunk.sequence.slot for chunk in chunks if chunk.final])
        slots = np.concatenate((decoding, final))
    rows = [
        PromptRows(
            chunk.sequence,
            chunk.sequence.slot,
            int(generation[chunk.sequence.slot]),
            chunk.sequence.prompt_next(chunk.start, chunk.end).tolist(),
        )
        for chunk in chunks
        if _wants_rows(chunk)
    ]
    return InFlight(plan.step, slots, generation[slots], rows)
