"""The sequence table with last tokens and counts for penalties on the device.

No method waits for a sampled token: a step gathers sampled tokens on the device. Knows plans and
slots; knows nothing of graphs or of the model.

Shape legend: T tokens, R rows sampled, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from arriero.kernels.flat_batch import FlatBatch
from arriero.kernels.lora import NO_ADAPTER
from arriero.shards.config.sampling_params import SamplingParams
from arriero.shards.protocol.step_plan import LAST_SAMPLED, Int32, NewSequence, StepPlan, int32
from arriero.shards.protocol.verification import drawn_rows
from arriero.shards.worker.cuda.block_table import DeviceBlockTable
from arriero.shards.worker.cuda.graphs import DecodeBatch, LocalDecode
from arriero.shards.worker.drawn_rows import DrawnRows, emitted_tokens, has_drafts
from arriero.shards.worker.grammar_masks import GrammarRows
from arriero.shards.worker.rope_table import Rope
from arriero.shards.worker.sequence_table import LocalTable, SequenceTable


@dataclass(frozen=True, slots=True)
class _PenaltyState:
    """Counts of a sequence with penalties, on the device."""

    params: SamplingParams
    counts_V: Tensor
    seen_V: Tensor


class DeviceSequenceTable(SequenceTable):
    """The slots of a slice on CUDA, with an additional slot for padding rows."""

    repeats_in_place = False

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
        super().__init__(
            max_sequences=max_sequences + 1,
            max_blocks=max_blocks,
            block_size=block_size,
            vocab_size=vocab_size,
            rope=rope,
            device=device,
            grammars=grammars,
            local=local,
        )
        self.rope, self.scratch_slot = rope, max_sequences
        self.last_S = torch.zeros(max_sequences + 1, dtype=torch.int32, device=device)
        self._penalized: dict[int, _PenaltyState] = {}
        self._max_blocks = max_blocks
        self._tables: DeviceBlockTable | None = None

    def keep_tables(self, scratch_block: int) -> None:
        """Keep block tables on the device; padding rows have only the block `scratch_block`."""
        num_slots = self.scratch_slot + 1
        self._tables = DeviceBlockTable(
            num_slots, self._max_blocks, self.scratch_slot, scratch_block, self._device
        )

    @property
    def tables(self) -> DeviceBlockTable:
        """The block tables on the device."""
        assert self._tables is not None, "`keep_tables` comes before the first plan"
        return self._tables

    def apply(self, plan: StepPlan) -> None:
        """Apply the changes of a plan; see `SequenceTable.apply`."""
        for slot in plan.freed.tolist():
            self._penalized.pop(slot, None)
        super().apply(plan)
        self.tables.apply(plan)

    def _table_rows(self, slots: Int32, num_blocks: int) -> Tensor:
        return self.tables.rows(self.on_device(slots), num_blocks)

    def batch(self, plan: StepPlan) -> tuple[Tensor, FlatBatch]:
        """As `SequenceTable.batch`, with the tokens that only the device has."""
        tokens_T, batch = super().batch(plan)
        if (plan.tokens == LAST_SAMPLED).any():
            slot_T = self.on_device(np.repeat(plan.slots, plan.counts))
            tokens_T = self.resolve(self.on_device(plan.tokens), slot_T)
        return tokens_T, batch

    def resolve(self, tokens_T: Tensor, slot_T: Tensor) -> Tensor:
        """Replace each `LAST_SAMPLED` by the last token of the slot."""
        last_T = self.last_S.index_select(0, slot_T)
        return torch.where(tokens_T == LAST_SAMPLED, last_T, tokens_T)

    def is_plain(self, plan: StepPlan) -> bool:
        """Whether a token is drawn after each token of the plan, with usual parameters.

        These are decodes, with or without drafted tokens.
        """
        slots = plan.slots
        if not len(slots) or plan.prompt_rows.any() or not plan.samples.all():
            return False
        if (plan.counts != plan.samples).any() or (self._logprobs[slots] >= 0).any():
            return False
        if (self._adapter[slots] != NO_ADAPTER).any():
            return False
        unusual = self._unusual.keys() | self._penalized.keys()
        return not unusual or unusual.isdisjoint(slots.tolist())

    def decode_batch(self, plan: StepPlan) -> DecodeBatch:
        """The inputs of a plain plan on the host: a row for each token.

        Tokens of the same sequence are rows with the same blocks and other positions. A layer
        writes the keys and values of all rows before any row reads them.
        """
        slots, positions = plan.slots, plan.starts
        if len(plan.tokens) > len(slots):
            counts = plan.counts
            first = np.cumsum(counts) - counts
            depths = np.arange(len(plan.tokens)) - np.repeat(first, counts)
            slots = np.repeat(slots, counts)
            positions = int32(np.repeat(positions, counts) + depths)
        blocks = int(positions.max()) // self._block_size + 1
        local = None
        if self._local is not None:
            base, table = self._local.frame(slots, positions, positions + 1)
            local = LocalDecode(positions=positions - base, table=table)
        return DecodeBatch(
            tokens=plan.tokens,
            slots=slots,
            positions=positions,
            table=self._blocks[slots, :blocks],
            temperature=self._temperature[slots],
            top_k=self._top_k[slots],
            top_p=self._top_p[slots],
            min_p=self._min_p[slots],
            seed=self._seed[slots],
            local=local,
        )

    @property
    def max_local_blocks(self) -> int:
        """Largest number of blocks of a chunk-local table; 0 without such layers."""
        return 0 if self._local is None else self._local.frame_blocks

    def record_on_device(self, plan: StepPlan, tokens_R: Tensor) -> None:
        """Record the drawn tokens of a step without a copy to the host."""
        slots = plan.slots[plan.samples > 0]
        if not has_drafts(plan):
            tokens_SD = tokens_R[:, None]
            last_S, counted_SD = tokens_R, None
        else:
            tokens_SD, counted_SD = self._emitted(plan, tokens_R)
            last_S = tokens_SD.gather(1, counted_SD.sum(1, keepdim=True) - 1)[:, 0]
        # -1 (no token was allowed) ends the request; the next step must not read -1 as a token
        self.last_S.index_copy_(0, self.on_device(slots).long(), last_S.clamp(min=0))
        if not self._penalized:
            return
        for row, slot in enumerate(slots.tolist()):
            state = self._penalized.get(slot)
            if state is not None:
                token_D = tokens_SD[row].clamp(min=0).long()
                once_D = torch.ones_like(token_D) if counted_SD is None else counted_SD[row].long()
                state.counts_V.index_add_(0, token_D, once_D.to(state.counts_V.dtype))
                state.seen_V.index_fill_(0, token_D.where(once_D > 0, token_D[0]), True)

    def _emitted(self, plan: StepPlan, tokens_R: Tensor) -> tuple[Tensor, Tensor]:
        """Draws of each drawn row, [S', D], and whether each counts; see `verification`."""
        samples = plan.samples[plan.samples > 0]
        most = int(samples.max())
        first = np.cumsum(samples) - samples
        place = np.arange(most)
        index = np.minimum(first[:, None] + place, first[:, None] + samples[:, None] - 1)
        # the drafted token after each draw; -2, which no draw equals, after the last
        drafted = np.full(index.shape, -2, np.int32)
        row_tokens = plan.tokens[drawn_rows(plan)]
        for row, count in enumerate(samples.tolist()):
            drafted[row, : count - 1] = row_tokens[first[row] + 1 : first[row] + count]
        tokens_SD = tokens_R[self.on_device(index.astype(np.int64))]
        right_SD = (tokens_SD == self.on_device(drafted)).int().cumprod(1)
        counted_SD = torch.ones_like(right_SD)
        counted_SD[:, 1:] = right_SD[:, :-1]
        return tokens_SD, counted_SD.long()

    def advance_grammars(self, plan: StepPlan, tokens: Callable[[], Int32]) -> None:
        """Advance the grammars of the step's sequences by the drawn tokens; see `GrammarRows`."""
        if self._grammars:
            slots = plan.slots[plan.samples > 0].tolist()
            self._grammars.advance(slots, lambda: emitted_tokens(plan, tokens()))

    def _enter(self, new: NewSequence) -> None:
        super()._enter(new)
        self._penalized.pop(new.slot, None)
        state = self._unusual.get(new.slot)
        if state is not None and state.counts_V is not None and state.seen_V is not None:
            self._penalized[new.slot] = _PenaltyState(
                state.params, self.on_device(state.counts_V), self.on_device(state.seen_V)
            )
            state.counts_V = state.seen_V = None

    def _unusual_rows(self, drawn: DrawnRows) -> dict[str, Any]:
        extra = super()._unusual_rows(drawn)
        slots = drawn.slots
        penalized = {
            row: self._penalized[slot]
            for row, slot in enumerate(slots.tolist())
            if slot in self._penalized
        }
        if not penalized:
            return extra
        num_rows, vocab = len(slots), self._vocab_size
        # rows begin at multiples of 16 bytes, which kernels are compiled for
        penalties = np.zeros((3, -(-num_rows // 4) * 4), np.float32)
        penalties[0] = 1
        counts = torch.zeros((num_rows, vocab), dtype=torch.int32, device=self._device)
        seen = torch.zeros((num_rows, vocab), dtype=torch.bool, device=self._device)
        for row, state in penalized.items():
            params = state.params
            penalties[:, row] = (
                params.repetition_penalty,
                params.presence_penalty,
                params.frequency_penalty,
            )
            counts[row], seen[row] = state.counts_V, state.seen_V
            drafted = drawn.drafted(row)
            if drafted:
                draft_D = self.on_device(np.asarray(drafted, np.int64))
                counts[row].index_add_(0, draft_D, torch.ones_like(draft_D, dtype=torch.int32))
                seen[row].index_fill_(0, draft_D, True)
        repetition, presence, frequency = self.on_device(penalties)[:, :num_rows]
        return extra | {
            "repetition_R": repetition,
            "presence_R": presence,
            "frequency_R": frequency,
            "seen_RV": seen,
            "counts_RV": counts,
        }
