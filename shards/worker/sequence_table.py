"""The state of a slice's sequences between steps, in slots, and the batch of each step.

Each rank stores block tables and last tokens; the rank that samples also stores sampling parameters
and counts. The state lies in arrays over slots, so that a step takes a few gathers and no Python
code per sequence; only sequences with unusual parameters (penalties, bias, allowed sets) cost more.

Knows plans and the inputs of ops; knows nothing of requests or text.

Shape legend: T tokens, S sequences, B blocks of a table, R rows sampled, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from arriero.kernels.flat_batch import FlatBatch
from arriero.kernels.lora import NO_ADAPTER, AdapterRows
from arriero.kernels.sampling_rows import SamplingRows
from arriero.kernels.sizes import num_mask_words
from arriero.shards.collectives.host_copy import to_device
from arriero.shards.config.sampling_params import SamplingParams
from arriero.shards.kv.paging import cache_slots
from arriero.shards.protocol.step_plan import LAST_SAMPLED, Int32, NewSequence, StepPlan
from arriero.shards.worker.drawn_rows import (
    DrawnRows,
    drafts_by_slot,
    emitted_tokens,
    has_drafts,
)
from arriero.shards.worker.grammar_masks import GrammarRows, mask_of
from arriero.shards.worker.repeat_batch import RepeatBatch
from arriero.shards.worker.rope_table import Rope


@dataclass(slots=True)
class _UnusualState:
    """State of a sequence with parameters that most sequences do not use."""

    params: SamplingParams
    stop_tokens: tuple[int, ...]
    num_prompt: int
    allowed_W: Int32 | None = None
    counts_V: npt.NDArray[np.int32] | None = None
    seen_V: npt.NDArray[np.bool_] | None = None


_FRAME = 4096
"""Chunk-local attention counts positions from common multiples of this and the chunk, so that the
kernels' division of long contexts among threads does not depend on the chunks of a prefill."""


class LocalTable:
    """Block tables of layers with chunk-local attention: a ring of blocks per slot.

    Args:
        max_sequences: number of slots.
        chunk: tokens of a chunk; a multiple of `block_size`.
        max_batch_tokens: largest number of tokens of a step, which may reach past a chunk.
        block_size: tokens in a block.
    """

    def __init__(
        self, *, max_sequences: int, chunk: int, max_batch_tokens: int, block_size: int
    ) -> None:
        self._size = block_size
        self._frame = math.lcm(chunk, _FRAME)
        self._ring = (chunk + max_batch_tokens) // block_size + 2
        self._blocks = np.zeros((max_sequences, self._ring), np.int32)

    @property
    def frame_blocks(self) -> int:
        """Largest number of blocks in the table of a token."""
        return self._frame // self._size

    def apply(self, plan: StepPlan) -> None:
        """Add the new blocks of a plan."""
        self._blocks[plan.local_slots, plan.local_index % self._ring] = plan.local_ids

    def frame(self, slots: Int32, starts: Int32, contexts: Int32) -> tuple[Int32, Int32]:
        """Start of each sequence's frame, to subtract from positions, [S], and tables, [S, B]."""
        base = starts // self._frame * self._frame
        columns = -(-int((contexts - base).max()) // self._size)
        index = (base // self._size)[:, None] + np.arange(columns, dtype=np.int32)
        return base, self._blocks[slots[:, None], index % self._ring]


class SequenceTable:
    """The slots of a slice."""

    repeats_in_place = True
    """Whether a step ends before the next batch is made, so that batches may share memory."""

    def __init__(
        self,
        *,
        max_sequences: int,
        max_blocks: int,
        block_size: int,
        vocab_size: int,
        rope: Rope,
        device: torch.device,
        grammars: GrammarRows | None = None,
        local: LocalTable | None = None,
    ) -> None:
        self._local = local
        self._block_size, self._vocab_size = block_size, vocab_size
        self._rope, self._device = rope, device
        self._blocks = np.zeros((max_sequences, max_blocks), np.int32)
        self._last = np.zeros(max_sequences, np.int32)
        self._temperature = np.zeros(max_sequences, np.float32)
        self._top_k = np.zeros(max_sequences, np.int32)
        self._top_p = np.ones(max_sequences, np.float32)
        self._min_p = np.zeros(max_sequences, np.float32)
        self._seed = np.zeros(max_sequences, np.int64)
        self._logprobs = np.full(max_sequences, -1, np.int32)
        self._prompt_logprobs = np.full(max_sequences, -1, np.int32)
        self._adapter = np.full(max_sequences, NO_ADAPTER, np.int32)
        self._unusual: dict[int, _UnusualState] = {}
        self._grammars = grammars  # of the rank that samples
        self._repeat_batch: RepeatBatch | None = None

    def apply(self, plan: StepPlan) -> None:
        """Apply the changes of a plan: freed slots, new sequences, new blocks."""
        if self._unusual:
            for slot in plan.freed.tolist():
                self._forget(slot)
        for new in plan.new:
            self._enter(new)
        self._blocks[plan.block_slots, plan.block_index] = plan.block_ids
        if self._local is not None:
            self._local.apply(plan)
        if self._grammars:
            self._grammars.draft(drafts_by_slot(plan))

    def batch(self, plan: StepPlan) -> tuple[Tensor, FlatBatch]:
        """The step's tokens, int32 [T], and their batch; valid until the next plan is applied."""
        repeated = self._repeat_batch
        if plan.same_rows and repeated is not None:
            repeated.advance(self._blocks, changed=len(plan.block_ids) > 0)
            return repeated.tokens_T, repeated.batch
        if repeated is not None:
            self._last[repeated.slots] = repeated.tokens
            self._repeat_batch = None
        tokens_T, batch = self._new_batch(plan)
        if plan.same_rows and self.repeats_in_place and batch.local is None:
            self._repeat_batch = RepeatBatch(
                plan.slots, tokens_T, batch, self._block_size, self._rope
            )
        return tokens_T, batch

    def _new_batch(self, plan: StepPlan) -> tuple[Tensor, FlatBatch]:
        slots, starts, counts = plan.slots, plan.starts, plan.counts
        num_sequences = len(slots)
        contexts = starts + counts
        query_start = np.zeros(num_sequences + 1, np.int32)
        np.cumsum(counts, out=query_start[1:])
        total = int(query_start[-1])
        max_query, max_context = int(counts.max()), int(contexts.max())
        num_blocks = -(-max_context // self._block_size)
        table = self._blocks[slots, :num_blocks]
        if max_query == 1:
            owner, positions = np.arange(num_sequences, dtype=np.int32), starts.copy()
        else:
            owner = np.repeat(np.arange(num_sequences, dtype=np.int32), counts)
            positions = np.arange(total, dtype=np.int32) + (starts - query_start[:-1])[owner]
        tokens = plan.tokens
        sampled_before = tokens == LAST_SAMPLED
        if sampled_before.any():
            tokens = np.where(sampled_before, self._last[slots[owner]], tokens)
        positions_T = self.on_device(positions)
        cos_TD, sin_TD = self._rope.at(positions_T)
        query_start_S1 = self.on_device(query_start)
        adapters = self._adapter_rows(slots[owner])
        local = None
        if self._local is not None:
            base, local_table = self._local.frame(slots, starts, contexts)
            inside = positions - base[owner]
            local = FlatBatch(
                positions_T=self.on_device(inside),
                query_start_S1=query_start_S1,
                context_S=self.on_device(contexts - base),
                block_table_SB=self.on_device(local_table),
                slots_T=self.on_device(cache_slots(local_table, owner, inside, self._block_size)),
                cos_TD=cos_TD,
                sin_TD=sin_TD,
                max_query=max_query,
                max_context=int((contexts - base).max()),
                adapters=adapters,
            )
        return self.on_device(tokens), FlatBatch(
            positions_T=positions_T,
            query_start_S1=query_start_S1,
            context_S=self.on_device(contexts),
            block_table_SB=self._table_rows(slots, num_blocks),
            slots_T=self.on_device(cache_slots(table, owner, positions, self._block_size)),
            cos_TD=cos_TD,
            sin_TD=sin_TD,
            max_query=max_query,
            max_context=max_context,
            local=local,
            adapters=adapters,
        )

    def _adapter_rows(self, slot_T: Int32) -> AdapterRows | None:
        """The tokens with an adapter, from the slot of each token's sequence."""
        adapter_T = self._adapter[slot_T]
        if (adapter_T == NO_ADAPTER).all():
            return None
        return AdapterRows.of(adapter_T, self.on_device)

    def _table_rows(self, slots: Int32, num_blocks: int) -> Tensor:
        """The first blocks of slots, int32 [S, B], on the device."""
        return self.on_device(self._blocks[slots, :num_blocks])

    def sampling_rows(self, plan: StepPlan) -> SamplingRows:
        """Sampling parameters of the positions that draw a token in this step."""
        repeated = self._repeat_batch
        if repeated is not None and repeated.rows is not None:
            return repeated.rows
        drawn = DrawnRows.of(plan)
        slots = drawn.slots
        temperature = self._temperature[slots]
        extra: dict[str, Any] = {}
        if self._unusual:
            extra = self._unusual_rows(drawn)
        rows = SamplingRows(
            temperature_R=self.on_device(temperature),
            top_k_R=self.on_device(self._top_k[slots]),
            top_p_R=self.on_device(self._top_p[slots]),
            min_p_R=self.on_device(self._min_p[slots]),
            seed_R=self.on_device(self._seed[slots]),
            position_R=self.on_device(drawn.positions.astype(np.int64)),
            num_logprobs=int(self._logprobs[slots].max(initial=-1)),
            all_greedy=not temperature.any(),
            **extra,
        )
        if repeated is not None and not self._unusual:
            repeated.rows = rows
        return rows

    def num_prompt_logprobs(self, plan: StepPlan) -> int:
        """The largest number of alternatives that a prompt row of this step needs."""
        return int(self._prompt_logprobs[plan.slots[plan.prompt_rows.astype(bool)]].max(initial=0))

    def record(self, plan: StepPlan, tokens: Int32) -> None:
        """Record the drawn tokens of a step, without those after a wrong drafted token."""
        slots = plan.slots
        emitted: list[list[int]] | None = None
        if self._repeat_batch is not None:
            self._repeat_batch.tokens[:] = tokens
        else:
            slots = slots[plan.samples > 0]
            if has_drafts(plan):
                emitted = emitted_tokens(plan, tokens)
                self._last[slots] = [row[-1] for row in emitted]
            else:
                self._last[slots] = tokens
        if self._unusual:
            rows = emitted_tokens(plan, tokens) if emitted is None else emitted
            if self._grammars:
                self._grammars.advance(slots.tolist(), lambda: rows)
            for slot, row in zip(slots.tolist(), rows, strict=True):
                state = self._unusual.get(slot)
                if state is not None:
                    for token in row:
                        _count(state, token)

    def _enter(self, new: NewSequence) -> None:
        slot, params = new.slot, new.params
        self._forget(slot)
        self._temperature[slot] = params.temperature
        self._top_k[slot] = params.top_k
        self._top_p[slot] = params.top_p
        self._min_p[slot] = params.min_p
        self._seed[slot] = params.seed or 0
        self._logprobs[slot] = -1 if params.logprobs is None else params.logprobs
        self._prompt_logprobs[slot] = params.prompt_logprobs or 0
        self._adapter[slot] = new.adapter
        penalized = params.has_penalties
        biased = params.logit_bias or params.banned_token_ids or params.allowed_token_ids
        if not (penalized or biased or params.grammar or (params.min_tokens and new.stop_tokens)):
            return
        state = _UnusualState(params, tuple(new.stop_tokens), new.num_prompt)
        if params.allowed_token_ids is not None:
            state.allowed_W = mask_of(params.allowed_token_ids, self._vocab_size)
        if penalized:
            state.counts_V = np.zeros(self._vocab_size, np.int32)
            state.seen_V = np.zeros(self._vocab_size, np.bool_)
            state.seen_V[new.prompt] = True
            for token in new.output.tolist():
                _count(state, token)
        if params.grammar and self._grammars is not None:
            self._grammars.enter(slot, params.grammar, new.output.tolist(), new.stop_tokens)
        self._unusual[slot] = state

    def check_ready(self) -> None:
        """Wait until grammars are available.

        Raises:
            CheckpointError: grammars cannot use the checkpoint's tokenizer.
        """
        if self._grammars is not None:
            self._grammars.check_warm()

    def close(self) -> None:
        """Stop the thread for grammars."""
        if self._grammars is not None:
            self._grammars.close()

    def _forget(self, slot: int) -> None:
        self._unusual.pop(slot, None)
        if self._grammars is not None:
            self._grammars.leave(slot)

    def _unusual_rows(self, drawn: DrawnRows) -> dict[str, Any]:
        slots = drawn.slots
        states = {
            row: self._unusual[slot]
            for row, slot in enumerate(slots.tolist())
            if slot in self._unusual
        }
        extra: dict[str, Any] = {}
        num_rows, vocab = len(slots), self._vocab_size
        penalized = {row: state for row, state in states.items() if state.counts_V is not None}
        if penalized:
            repetition = np.ones(num_rows, np.float32)
            presence, frequency = np.zeros(num_rows, np.float32), np.zeros(num_rows, np.float32)
            seen = np.zeros((num_rows, vocab), np.bool_)
            counts = np.zeros((num_rows, vocab), np.int32)
            for row, state in penalized.items():
                repetition[row] = state.params.repetition_penalty
                presence[row] = state.params.presence_penalty
                frequency[row] = state.params.frequency_penalty
                assert state.seen_V is not None and state.counts_V is not None, "set together"
                seen[row], counts[row] = state.seen_V, state.counts_V
                for token in drawn.drafted(row):
                    seen[row, token] = True
                    counts[row, token] += 1
            extra |= {
                "repetition_R": self.on_device(repetition),
                "presence_R": self.on_device(presence),
                "frequency_R": self.on_device(frequency),
                "seen_RV": self.on_device(seen),
                "counts_RV": self.on_device(counts),
            }
        has_grammar = self._grammars is not None and any(
            slot in self._grammars for slot in slots.tolist()
        )
        if has_grammar or any(state.allowed_W is not None for state in states.values()):
            allowed = np.full((num_rows, num_mask_words(vocab)), -1, np.int32)
            for row, state in states.items():
                if state.allowed_W is not None:
                    allowed[row] = state.allowed_W
            if has_grammar and self._grammars is not None:
                self._grammars.allow(slots.tolist(), allowed, drawn.depths.tolist())
            extra["allowed_RW"] = self.on_device(allowed)
        bias = [
            (row, token, value)
            for row, state in states.items()
            for token, value in _biases(state, int(drawn.positions[row]))
        ]
        if bias:
            bias_rows, tokens, values = zip(*bias, strict=True)
            extra["bias"] = (
                self.on_device(np.asarray(bias_rows, np.int64)),
                self.on_device(np.asarray(tokens, np.int64)),
                self.on_device(np.asarray(values, np.float32)),
            )
        return extra

    def on_device(self, array: npt.NDArray[Any]) -> Tensor:
        """A copy of a host array on the slice's device; does not wait for the copy."""
        return to_device(array, self._device)


def _count(state: _UnusualState, token: int) -> None:
    if state.counts_V is not None and state.seen_V is not None:
        state.counts_V[token] += 1
        state.seen_V[token] = True


def _biases(state: _UnusualState, position: int) -> list[tuple[int, float]]:
    """Pairs of token and bias for the token at `position`."""
    ban = float("-inf")
    biases = [(token, value) for token, value in state.params.logit_bias.items()]
    biases += [(token, ban) for token in state.params.banned_token_ids]
    if position - state.num_prompt < state.params.min_tokens:
        biases += [(token, ban) for token in state.stop_tokens]
    return biases
