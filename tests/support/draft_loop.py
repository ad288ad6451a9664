"""A target and its drafter in one process, a plan at a time, without an engine.

Knows plans and draws; knows nothing of scheduling. The draws do not depend on the drafts.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import numpy as np
import torch

from arriero.kernels.ops import Ops
from arriero.kernels.sampling_rows import SamplingRows
from arriero.shards.checkpoint.reader import Checkpoint
from arriero.shards.collectives.mesh import Mesh
from arriero.shards.config.group import GroupConfig
from arriero.shards.config.sampling_params import SamplingParams
from arriero.shards.config.speculation import DraftKind, SpeculationConfig
from arriero.shards.layout.families import parts_of
from arriero.shards.models.model_slice import SliceSettings, load_slice
from arriero.shards.protocol.step_plan import NewSequence, StepPlan, int32
from arriero.shards.worker.rope_table import Rope
from arriero.shards.worker.sequence_table import SequenceTable
from arriero.shards.worker.speculation.drafter import DraftInputs
from arriero.shards.worker.speculation.sources import Target, draft_source
from support.slices import BLOCK, CPU, ThreadMesh

CONTEXT = 1024


class LoneMesh(ThreadMesh):
    """The mesh of a single rank, with what a drafter asks of it."""

    def __init__(self, part: object) -> None:
        super().__init__(1, 0, [None], threading.Barrier(1))
        self.part, self.pp = part, 1

    def gather_logits(self, logits: torch.Tensor, sizes: list[int]) -> torch.Tensor:
        assert logits.shape[1] == sum(sizes)
        return logits

    def share_drafts(self, tokens: torch.Tensor) -> None:
        """Nobody else is there."""


@dataclass
class Text:
    """A sequence: its tokens, how many the target has read, and the drafts of each step."""

    slot: int
    params: SamplingParams
    tokens: list[int]
    num_prompt: int
    computed: int = 0
    drafts: list[int] = field(default_factory=list)
    emitted: list[int] = field(default_factory=list)
    drafted: list[tuple[int, list[int]]] = field(default_factory=list)

    @property
    def mean_emitted(self) -> float:
        """Mean number of tokens of a verified step."""
        return sum(self.emitted) / max(1, len(self.emitted))


class DraftLoop:
    """Steps of a target with a drafter."""

    def __init__(
        self,
        target: Path,
        kind: DraftKind,
        drafter: Path,
        ops: Ops,
        *,
        sequences: int = 4,
        dtype: str = "float32",
        taps: tuple[int, ...] | None = None,
    ) -> None:
        """Load both; `taps` replaces the layers of an EAGLE-3 head's taps."""
        torch.set_grad_enabled(False)
        self.config = GroupConfig(
            model_path=str(target),
            dtype=dtype,
            max_sequences=sequences,
            max_model_len=CONTEXT,
            num_blocks=sequences * CONTEXT // BLOCK,
            speculation=SpeculationConfig(kind=kind, model_path=str(drafter)),
        )
        checkpoint = Checkpoint.open(target)
        self.model_config = checkpoint.config
        parts = parts_of(checkpoint.config, self.config)
        mesh = cast(Mesh, LoneMesh(parts[0]))
        source = draft_source(self.config, checkpoint.config)
        assert source is not None and self.config.num_blocks is not None
        if taps is not None:
            source.taps = taps
        self.ops = ops
        self.model = load_slice(
            checkpoint,
            parts[0],
            mesh,
            ops,
            SliceSettings(
                dtype=getattr(torch, dtype),
                num_blocks=self.config.num_blocks,
                block_size=BLOCK,
                taps=source.taps,
            ),
        )
        self.drafter = source.load(
            Target(
                checkpoint=checkpoint,
                model=self.model,
                parts=parts,
                mesh=mesh,
                ops=ops,
                num_blocks=self.config.num_blocks,
            )
        )
        self.table = SequenceTable(
            max_sequences=sequences,
            max_blocks=CONTEXT // BLOCK,
            block_size=BLOCK,
            vocab_size=checkpoint.config.vocab_size,
            rope=Rope(checkpoint.config.inv_freq(), CONTEXT, CPU),
            device=CPU,
        )
        self.texts: dict[int, Text] = {}
        self._new: list[Text] = []
        self._blocks = [0] * sequences
        self._steps = 0

    def enter(self, slot: int, prompt: Sequence[int], params: SamplingParams) -> Text:
        """A sequence enters a slot with the next step."""
        text = Text(slot, params, list(prompt), len(prompt))
        self.texts[slot] = text
        self._new.append(text)
        self._blocks[slot] = 0
        return text

    def step(
        self,
        slots: Sequence[int],
        length: int | Callable[[int], int] = 0,
        *,
        chunk: int = CONTEXT,
        ahead: int = 0,
    ) -> None:
        """One step of some sequences: a chunk of the prompt, or last token and drafts.

        Args:
            slots: the sequences.
            length: tokens to draft after the step, for each slot.
            chunk: most tokens of a prompt in the step.
            ahead: positions after the row for which blocks are given in advance.
        """
        texts = [self.texts[slot] for slot in slots]
        rows, samples = [], []
        for text in texts:
            left = len(text.tokens) - text.computed
            if left > chunk:
                rows.append(text.tokens[text.computed : text.computed + chunk])
                samples.append(0)
            else:
                rows.append([*text.tokens[text.computed :], *text.drafts])
                samples.append(1 + len(text.drafts))
        plan = self._plan(texts, rows, samples, length, ahead)
        drawn, emitted, inputs = self._target(plan)
        drafts = self.drafter.propose(inputs(emitted))
        at = drafted_row = 0
        for text, row, draws in zip(texts, rows, samples, strict=True):
            if not draws:
                text.computed += len(row)
                continue
            count = int(emitted[texts.index(text)])
            if text.drafts:
                text.emitted.append(count)
            text.computed += len(row) - (draws - count)
            text.tokens += drawn[at : at + count].tolist()
            at += draws
            text.drafts = [token for token in drafts[drafted_row].tolist() if token >= 0]
            text.drafted.append((len(text.tokens), list(text.drafts)))
            drafted_row += 1

    def compare(self, slot: int, position: int, logits: torch.Tensor, token: int) -> None:
        """Called for each draw that counts; for those who measure."""

    def _plan(
        self,
        texts: list[Text],
        rows: list[list[int]],
        samples: list[int],
        length: int | Callable[[int], int],
        ahead: int,
    ) -> StepPlan:
        block_slots, block_index, block_ids = [], [], []
        for text, row in zip(texts, rows, strict=True):
            needed = -(-(text.computed + len(row) + ahead) // BLOCK)
            for index in range(self._blocks[text.slot], needed):
                block_slots.append(text.slot)
                block_index.append(index)
                # neighbours in the table are far apart in the pool
                block_ids.append(index * self.config.max_sequences + text.slot)
            self._blocks[text.slot] = max(self._blocks[text.slot], needed)
        new = [
            NewSequence(slot=text.slot, params=text.params, num_prompt=text.num_prompt)
            for text in self._new
        ]
        self._new = []
        self._steps += 1
        slots = [text.slot for text in texts]
        lengths = [length(slot) if callable(length) else length for slot in slots]
        return StepPlan(
            step=self._steps,
            freed=int32(),
            new=new,
            block_slots=int32(block_slots),
            block_index=int32(block_index),
            block_ids=int32(block_ids),
            slots=int32(slots),
            starts=int32([text.computed for text in texts]),
            counts=int32([len(row) for row in rows]),
            tokens=int32([token for row in rows for token in row]),
            samples=int32(samples),
            draft_lengths=int32(lengths),
        )

    def _target(
        self, plan: StepPlan
    ) -> tuple[np.ndarray, np.ndarray, Callable[[np.ndarray], DraftInputs]]:
        self.table.apply(plan)
        self.drafter.apply(plan)
        tokens, batch = self.table.batch(plan)
        x = self.model.decoder(self.model.embed(tokens), batch)
        ends = np.cumsum(plan.counts)
        last, slots, positions = [], [], []
        for row, draws in enumerate(plan.samples.tolist()):
            for i in range(draws):
                back = draws - 1 - i
                last.append(int(ends[row]) - 1 - back)
                slots.append(int(plan.slots[row]))
                positions.append(int(plan.starts[row] + plan.counts[row]) - back)
        drawn, logits = np.empty(0, np.int32), torch.empty(0)
        if last:
            logits = self.model.logits(x.index_select(0, torch.tensor(last)))
            drawn = self.ops.sample(
                logits.clone(), self._sampling(slots, positions)
            ).tokens_R.numpy()
        emitted = self._emitted(plan, drawn)
        at = 0
        for count, draws in zip(emitted.tolist(), plan.samples.tolist(), strict=True):
            for i in range(at, at + count):
                self.compare(slots[i], positions[i], logits[i], int(drawn[i]))
            at += draws

        def inputs(emitted: np.ndarray) -> DraftInputs:
            return DraftInputs(
                plan=plan,
                tokens_T=tokens,
                batch=batch,
                hidden_TH=x,
                taps=self.model.taps.kept(len(tokens)),
                drawn_R=drawn,
                emitted_S=emitted,
            )

        return drawn, emitted, inputs

    def _sampling(self, slots: list[int], positions: list[int]) -> SamplingRows:
        params = [self.texts[slot].params for slot in slots]
        return SamplingRows(
            temperature_R=torch.tensor([p.temperature for p in params]),
            top_k_R=torch.tensor([p.top_k for p in params], dtype=torch.int32),
            top_p_R=torch.tensor([p.top_p for p in params]),
            min_p_R=torch.tensor([p.min_p for p in params]),
            seed_R=torch.tensor([p.seed or 0 for p in params]),
            position_R=torch.tensor(positions),
        )

    @staticmethod
    def _emitted(plan: StepPlan, drawn: np.ndarray) -> np.ndarray:
        emitted, at = [], 0
        ends = np.cumsum(plan.counts)
        for row, draws in enumerate(plan.samples.tolist()):
            count = min(1, draws)
            drafts = plan.tokens[ends[row] - (draws - 1) : ends[row]].tolist() if draws > 1 else []
            for i, token in enumerate(drafts):
                if drawn[at + i] != token:
                    break
                count += 1
            emitted.append(count)
            at += draws
        return int32(emitted)
