"""What a slice keeps of each sequence between steps, in slots, and the batch made from it.

Every rank keeps block tables and last tokens; the rank that samples keeps sampling parameters and
counts too. Arrays over slots, so that a step is a handful of gathers and no per-sequence Python;
sequences with unusual parameters (penalties, bias, allowed sets) pay for themselves alone.

Knows plans and ops' inputs; knows nothing of requests or text.

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

from arriero.kernels.ops import FlatBatch, SamplingRows
from arriero.shards.config.sampling_params import SamplingParams
from arriero.shards.kv.paging import cache_slots
from arriero.shards.protocol.step_plan import LAST_SAMPLED, Int32, NewSequence, StepPlan
from arriero.shards.worker.grammar_masks import GrammarRows
from arriero.shards.worker.repeat_batch import RepeatBatch
from arriero.shards.worker.rope_table import Rope


@dataclass(slots=True)
class _Unusual:
    """Parameters that most sequences do not use."""

    params: SamplingParams
    stop_tokens: tuple[int, ...]
    num_prompt: int
    counts_V: npt.NDArray[np.int32] | None = None
    seen_V: npt.NDArray[np.bool_] | None = None


_FRAME = 4096
"""Positions of chunk-local attention count from multiples of this and of the chunk, so that how
kernels cut long contexts for their threads does not depend on where a prefill was cut."""


class LocalTable:
    """Block tables of the layers that attend within their chunk: a ring of blocks for each slot.

    Args:
        max_sequences: slots.
        chunk: tokens of a chunk; a multiple of `block_size`.
        max_batch_tokens: most tokens of a step: they may reach past their chunk.
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
        """Blocks of the table of one token, at most."""
        return self._frame // self._size

    def apply(self, plan: StepPlan) -> None:
        """Take in the plan's new blocks."""
        self._blocks[plan.local_slots, plan.local_index % self._ring] = plan.local_ids

    def frame(self, slots: Int32, starts: Int32, contexts: Int32) -> tuple[Int32, Int32]:
        """What to subtract from each sequence's positions, [S], and its table then, [S, B]."""
        base = starts // self._frame * self._frame
        columns = -(-int((contexts - base).max()) // self._size)
        index = (base // self._size)[:, None] + np.arange(columns, dtype=np.int32)
        return base, self._blocks[slots[:, None], index % self._ring]


class SequenceTable:
    """The slots of one slice."""

    repeats_in_place = True
    """A step is over before the next one's batch is made, so that one may write over the other."""

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
        self._unusual: dict[int, _Unusual] = {}
        self._grammars = grammars  # of the rank that samples
        self._standing: RepeatBatch | None = None

    def apply(self, plan: StepPlan) -> None:
        """Take in what the plan changes: freed slots, new sequences, new blocks."""
        if self._unusual:
            for slot in plan.freed.tolist():
                self._forget(slot)
        for new in plan.new:
            self._enter(new)
        self._blocks[plan.block_slots, plan.block_index] = plan.block_ids
        if self._local is not None:
            self._local.apply(plan)

    def batch(self, plan: StepPlan) -> tuple[Tensor, FlatBatch]:
        """The step's tokens, int32 [T], and where they sit; void once the next plan is applied."""
        standing = self._standing
        if plan.same_rows and standing is not None:
            standing.advance(self._blocks, changed=len(plan.block_ids) > 0)
            return standing.tokens_T, standing.batch
        if standing is not None:
            self._last[standing.slots] = standing.tokens
            self._standing = None
        tokens_T, batch = self._new_batch(plan)
        if plan.same_rows and self.repeats_in_place and batch.local is None:
            self._standing = RepeatBatch(plan.slots, tokens_T, batch, self._block_size, self._rope)
        return tokens_T, batch

    def _new_batch(self, plan: StepPlan) -> tuple[Tensor, FlatBatch]:
        slots, starts, counts = plan.slots, plan.starts, plan.counts
        num_sequences = len(slots)
        contexts = starts + counts
        query_start = np.zeros(num_sequences + 1, np.int32)
        np.cumsum(counts, out=query_start[1:])
        total = int(query_start[-1])
        max_query, max_context = int(counts.max()), int(contexts.max())
        table = self._blocks[slots, : -(-max_context // self._block_size)]
        if max_query == 1:
            owner, positions = np.arange(num_sequences, dtype=np.int32), starts.copy()
        else:
            owner = np.repeat(np.arange(num_sequences, dtype=np.int32), counts)
            positions = np.arange(total, dtype=np.int32) + (starts - query_start[:-1])[owner]
        tokens = plan.tokens
        held = tokens == LAST_SAMPLED
        if held.any():
            tokens = np.where(held, self._last[slots[owner]], tokens)
        positions_T = self.on_device(positions)
        cos_TD, sin_TD = self._rope.at(positions_T)
        query_start_S1 = self.on_device(query_start)
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
            )
        return self.on_device(tokens), FlatBatch(
            positions_T=positions_T,
            query_start_S1=query_start_S1,
            context_S=self.on_device(contexts),
            block_table_SB=self.on_device(table),
            slots_T=self.on_device(cache_slots(table, owner, positions, self._block_size)),
            cos_TD=cos_TD,
            sin_TD=sin_TD,
            max_query=max_query,
            max_context=max_context,
            local=local,
        )

    def sampling_rows(self, plan: StepPlan) -> SamplingRows:
        """Sampling parameters of the sequences that draw a token in this step."""
        standing = self._standing
        if standing is not None and standing.rows is not None:
            return standing.rows
        drawn = plan.samples.astype(bool)
        slots, positions = plan.slots[drawn], (plan.starts + plan.counts)[drawn]
        temperature = self._temperature[slots]
        extra: dict[str, Any] = {}
        if self._unusual:
            extra = self._unusual_rows(slots, positions)
        rows = SamplingRows(
            temperature_R=self.on_device(temperature),
            top_k_R=self.on_device(self._top_k[slots]),
            top_p_R=self.on_device(self._top_p[slots]),
            min_p_R=self.on_device(self._min_p[slots]),
            seed_R=self.on_device(self._seed[slots]),
            position_R=self.on_device(positions.astype(np.int64)),
            num_logprobs=int(self._logprobs[slots].max(initial=-1)),
            all_greedy=not temperature.any(),
            **extra,
        )
        if standing is not None and not self._unusual:
            standing.rows = rows
        return rows

    def num_prompt_logprobs(self, plan: StepPlan) -> int:
        """The largest count of alternatives that a prompt row of this step asks for."""
        return int(self._prompt_logprobs[plan.slots[plan.prompt_rows.astype(bool)]].max(initial=0))

    def record(self, plan: StepPlan, tokens: Int32) -> None:
        """Keep the tokens that the step's sequences drew."""
        slots = plan.slots
        if self._standing is None:
            slots = slots[plan.samples.astype(bool)]
            self._last[slots] = tokens
        else:
            self._standing.tokens[:] = tokens
        if self._unusual:
            if self._grammars:
                self._grammars.take(slots.tolist(), lambda: tokens)
            for slot, token in zip(slots.tolist(), tokens.tolist(), strict=True):
                one = self._unusual.get(slot)
                if one is not None:
                    _count(one, token)

    def _enter(self, new: NewSequence) -> None:
        slot, params = new.slot, SamplingParams.from_wire(new.params)
        self._forget(slot)
        self._temperature[slot] = params.temperature
        self._top_k[slot] = params.top_k
        self._top_p[slot] = params.top_p
        self._min_p[slot] = params.min_p
        self._seed[slot] = params.seed or 0
        self._logprobs[slot] = -1 if params.logprobs is None else params.logprobs
        self._prompt_logprobs[slot] = params.prompt_logprobs or 0
        counted = params.has_penalties
        biased = params.logit_bias or params.banned_token_ids or params.allowed_token_ids
        if not (counted or biased or params.grammar or (params.min_tokens and new.stop_tokens)):
            return
        one = _Unusual(params, tuple(new.stop_tokens), new.num_prompt)
        if counted:
            one.counts_V = np.zeros(self._vocab_size, np.int32)
            one.seen_V = np.zeros(self._vocab_size, np.bool_)
            one.seen_V[new.prompt] = True
            for token in new.output.tolist():
                _count(one, token)
        if params.grammar and self._grammars is not None:
            self._grammars.enter(slot, params.grammar, new.output.tolist(), new.stop_tokens)
        self._unusual[slot] = one

    def check_ready(self) -> None:
        """Wait until grammars can be followed.

        Raises:
            CheckpointError: the checkpoint's tokenizer does not allow it.
        """
        if self._grammars is not None:
            self._grammars.check_warm()

    def close(self) -> None:
        """Stop the thread that follows grammars, where there is one."""
        if self._grammars is not None:
            self._grammars.close()

    def _forget(self, slot: int) -> None:
        self._unusual.pop(slot, None)
        if self._grammars is not None:
            self._grammars.leave(slot)

    def _unusual_rows(self, slots: Int32, positions: Int32) -> dict[str, Any]:
        rows = {
            row: self._unusual[slot]
            for row, slot in enumerate(slots.tolist())
            if slot in self._unusual
        }
        extra: dict[str, Any] = {}
        num_rows, vocab = len(slots), self._vocab_size
        counted = {row: one for row, one in rows.items() if one.counts_V is not None}
        if counted:
            repetition = np.ones(num_rows, np.float32)
            presence, frequency = np.zeros(num_rows, np.float32), np.zeros(num_rows, np.float32)
            seen = np.zeros((num_rows, vocab), np.bool_)
            counts = np.zeros((num_rows, vocab), np.int32)
            for row, one in counted.items():
                repetition[row] = one.params.repetition_penalty
                presence[row] = one.params.presence_penalty
                frequency[row] = one.params.frequency_penalty
                assert one.seen_V is not None and one.counts_V is not None, "kept together"
                seen[row], counts[row] = one.seen_V, one.counts_V
            extra |= {
                "repetition_R": self.on_device(repetition),
                "presence_R": self.on_device(presence),
                "frequency_R": self.on_device(frequency),
                "seen_RV": self.on_device(seen),
                "counts_RV": self.on_device(counts),
            }
        allowed_rows = {r: one.params.allowed_token_ids for r, one in rows.items()}
        governed = self._grammars is not None and any(r in self._grammars for r in slots.tolist())
        if governed or any(ids is not None for ids in allowed_rows.values()):
            allowed = np.ones((num_rows, vocab), np.bool_)
            for row, ids in allowed_rows.items():
                if ids is not None:
                    allowed[row] = False
                    allowed[row, list(ids)] = True
            if governed and self._grammars is not None:
                self._grammars.allow(slots.tolist(), allowed)
            extra["allowed_RV"] = self.on_device(allowed)
        bias = [
            (row, token, value)
            for row, one in rows.items()
            for token, value in _biases(one, int(positions[row]))
        ]
        if bias:
            at, tokens, values = zip(*bias, strict=True)
            extra["bias"] = (
                self.on_device(np.asarray(at, np.int64)),
                self.on_device(np.asarray(tokens, np.int64)),
                self.on_device(np.asarray(values, np.float32)),
            )
        return extra

    def on_device(self, array: npt.NDArray[Any]) -> Tensor:
        """A copy of the host's numbers where the slice computes; nothing waits for it."""
        # the copy of a read-only view of the wire is a few bytes; torch refuses such views
        if not array.flags.writeable:
            array = array.copy()
        return torch.from_numpy(array).to(self._device, non_blocking=True)


def _count(one: _Unusual, token: int) -> None:
    if one.counts_V is not None and one.seen_V is not None:
        one.counts_V[token] += 1
        one.seen_V[token] = True


def _biases(one: _Unusual, position: int) -> list[tuple[int, float]]:
    ban = float("-inf")
    out = [(token, value) for token, value in one.params.logit_bias.items()]
    out += [(token, ban) for token in one.params.banned_token_ids]
    if position - one.num_prompt < one.params.min_tokens:
        out += [(token, ban) for token in one.stop_tokens]
    return out
