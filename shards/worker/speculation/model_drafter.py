"""Drafts chains of tokens with a network of its own: a smaller model, or an EAGLE-3 head.

After each step the network computes the rows of the tokens that the step made certain, then one row
for each drafted token, over all sequences together. It draws with the sampling parameters, the seed
and the position of the target's own draw, which makes both likely to agree; the output depends on
the target's draws alone.

The network is cut over the tensor-parallel ranks of the last stage as the target is: a rank holds
its share of bytes, where a whole network on each rank, or on one, would take memory from the KV
cache of all. Cached blocks carry the network's keys and values; blocks that come back from a tier
below or from another group do not, and neither does the last row of a cached prefix for a head that
reads the token after it: drafts are then worse for some tokens, never wrong.

Knows plans, rows and draws; knows nothing of the network's layers.

Shape legend: T tokens, H hidden size of the network, R rows that draft, K most drafted tokens, S
rows of the plan.
"""

from __future__ import annotations

from collections.abc import Sequence as Many

import numpy as np
import torch
from torch import Tensor

from arriero.kernels.ops import Ops
from arriero.kernels.sampling_rows import SamplingRows
from arriero.shards.collectives.host_copy import to_device
from arriero.shards.collectives.mesh import Mesh
from arriero.shards.protocol.step_plan import Int32, StepPlan
from arriero.shards.worker.speculation.drafter import DraftInputs
from arriero.shards.worker.speculation.networks import DraftNetwork
from arriero.shards.worker.speculation.paged_rows import PagedRows
from arriero.shards.worker.speculation.unread_rows import UnreadRows

WAITING_ROWS = 16
"""Rows of a sequence that wait before the network computes them without a draft: the multi-row
kernels of a CPU compute 16 rows at the cost of about two."""


class ModelDrafter:
    """A `Drafter` with a network."""

    def __init__(
        self, network: DraftNetwork, rows: PagedRows, mesh: Mesh, ops: Ops, max_sequences: int
    ) -> None:
        """Draft with a loaded network.

        Args:
            network: the network.
            rows: block tables, with the network's rotary table.
            mesh: ranks of the group.
            ops: kernels that draw.
            max_sequences: number of slots.
        """
        self.taps = network.taps
        self._network, self._rows, self._mesh, self._ops = network, rows, mesh, ops
        self._unread: dict[int, UnreadRows] = {}
        self._temperature = np.zeros(max_sequences, np.float32)
        self._top_k = np.zeros(max_sequences, np.int32)
        self._top_p = np.ones(max_sequences, np.float32)
        self._min_p = np.zeros(max_sequences, np.float32)
        self._seed = np.zeros(max_sequences, np.int64)

    @property
    def weights_nbytes(self) -> int:
        """Bytes of the network's weights on this rank."""
        return self._network.weights_nbytes

    @property
    def kv_nbytes(self) -> int:
        """Bytes of the network's KV cache on this rank."""
        return self._network.kv_nbytes

    def warm_up(self, sizes: Many[int], hidden_size: int, dtype: torch.dtype) -> None:
        """Compile all kernels; see `Drafter`. The rows' keys and values go to the first block."""
        device, network = self._mesh.device, self._network
        y_TH = None
        num_rows = {min(size, self._rows.num_positions) for size in sizes}
        paddings = [*map(self._rows.padding, num_rows), self._rows.last_rows()]
        for slots, starts, counts in paddings:
            size = int(counts.sum())
            features_TH = None
            if network.reads_target:
                tap_TH = torch.zeros(size, hidden_size, dtype=dtype, device=device)
                features_TH = network.features([tap_TH] * len(network.taps))
            tokens_T = torch.zeros(size, dtype=torch.int32, device=device)
            y_TH = network.forward(tokens_T, features_TH, self._rows.batch(slots, starts, counts))
        assert y_TH is not None, "at least one size"
        slot, position = np.zeros(1, np.int32), np.zeros(1, np.int32)
        token_R = torch.zeros(1, dtype=torch.int32, device=device)
        batch = self._rows.batch(slot, position, np.ones(1, np.int32))
        y_RH = network.forward(token_R, network.next_features(y_TH[:1]), batch)
        for temperature in (1.0, 0.0):  # draws, and the greatest logit
            self._temperature[0] = temperature
            self._draw(network.logits(y_RH), slot, position)

    def apply(self, plan: StepPlan) -> None:
        """Apply the changes of a plan: freed slots, new sequences, new blocks."""
        for slot in plan.freed.tolist():
            self._unread.pop(slot, None)
        for new in plan.new:
            slot, params = new.slot, new.params
            self._unread[slot] = UnreadRows(self._network.shift, self._network.reads_target)
            self._temperature[slot] = params.temperature
            self._top_k[slot] = params.top_k
            self._top_p[slot] = params.top_p
            self._min_p[slot] = params.min_p
            self._seed[slot] = params.seed or 0
        self._rows.apply(plan)

    def propose(self, step: DraftInputs) -> Int32:
        """Draft the tokens after the last emitted token of each drawn row; see `Drafter`."""
        self._add(step)
        plan = step.plan
        drawn = np.flatnonzero(plan.samples)
        wanted = np.zeros(len(plan.slots), np.int32)
        if len(plan.draft_lengths):
            wanted[:] = np.where(step.emitted_S > 0, plan.draft_lengths, 0)
        slots, starts, counts, lengths = self._choose(plan.slots, wanted)
        drafts = np.full((len(drawn), max(lengths, default=0)), -1, np.int32)
        if not len(slots):
            return drafts
        outputs_TH = self._read(slots, starts, counts)
        lengths_R = np.asarray(lengths, np.int32)
        drafting = np.flatnonzero(lengths_R)
        if not len(drafting):
            return drafts
        last_R = (np.cumsum(counts, dtype=np.int32) - 1)[drafting]
        y_RH = outputs_TH.index_select(0, to_device(last_R, self._mesh.device))
        chains = self._chain(
            y_RH, slots[drafting], (starts + counts - 1)[drafting], lengths_R[drafting]
        )
        row_of = {int(plan.slots[row]): at for at, row in enumerate(drawn.tolist())}
        for slot, length, chain in zip(
            slots[drafting].tolist(), lengths_R[drafting].tolist(), chains, strict=True
        ):
            drafts[row_of[slot], :length] = chain[:length]
            if not self._network.reads_target:
                self._unread[slot].drafted = chain[: length - 1].tolist()
        return drafts

    def _add(self, step: DraftInputs) -> None:
        """Note the tokens that a step made certain, and their features."""
        plan, tokens = step.plan, step.tokens_T.tolist()
        features_TH = self._network.features(step.taps) if self._network.reads_target else None
        at_token = at_draw = 0
        for slot, start, count, samples, emitted in zip(
            plan.slots.tolist(),
            plan.starts.tolist(),
            plan.counts.tolist(),
            plan.samples.tolist(),
            step.emitted_S.tolist(),
            strict=True,
        ):
            certain = count - max(0, samples - max(1, emitted))
            row = tokens[at_token : at_token + certain]
            if emitted:
                row.append(int(step.drawn_R[at_draw + emitted - 1]))
            piece_TH = None
            if features_TH is not None:
                piece_TH = features_TH[at_token : at_token + certain]
            self._unread[slot].add(start, row, piece_TH)
            at_token += count
            at_draw += samples

    def _choose(self, slots: Int32, wanted: Int32) -> tuple[Int32, Int32, Int32, list[int]]:
        """The rows to compute now: (slots, starts, counts, lengths of the drafts after them).

        A row needs a block at its position. Where the scheduler has not given the blocks of a
        draft's rows yet, the draft is shorter.
        """
        chosen: list[tuple[int, int, int, int]] = []
        for slot, length in zip(slots.tolist(), wanted.tolist(), strict=True):
            unread = self._unread[slot]
            room = self._rows.room(slot) - unread.start
            count = min(unread.ready, room)
            length = min(length, 1 + room - count) if count == unread.ready else 0
            if count > 0 and (length > 0 or count >= WAITING_ROWS):
                chosen.append((slot, unread.start, count, max(0, length)))
            else:
                unread.own_memory()
        columns = np.asarray(chosen, np.int32).reshape(-1, 4)
        return columns[:, 0], columns[:, 1], columns[:, 2], columns[:, 3].tolist()

    def _read(self, slots: Int32, starts: Int32, counts: Int32) -> Tensor:
        """Compute waiting rows; gives their outputs [T, H]."""
        tokens: list[int] = []
        features: list[Tensor] = []
        for slot, count in zip(slots.tolist(), counts.tolist(), strict=True):
            row, piece_TH = self._unread[slot].take(count)
            tokens += row
            if piece_TH is not None:
                features.append(piece_TH)
            self._unread[slot].own_memory()
        tokens_T = to_device(np.asarray(tokens, np.int32), self._mesh.device)
        features_TH = torch.cat(features) if features else None
        return self._network.forward(tokens_T, features_TH, self._rows.batch(slots, starts, counts))

    def _chain(self, y_RH: Tensor, slots: Int32, positions: Int32, lengths: Int32) -> Int32:
        """Draft after rows with outputs y: int32 [R, K], -1 after the end of a chain.

        Args:
            y_RH: outputs of the last rows.
            slots: slot of each row.
            positions: position of each row.
            lengths: tokens to draft after each row, at least 1.
        """
        device, network = self._mesh.device, self._network
        order = np.argsort(-lengths, kind="stable")  # chains that end leave from the end
        y_RH = y_RH.index_select(0, to_device(order.astype(np.int32), device))
        slots, positions, lengths = slots[order], positions[order], lengths[order]
        columns: list[Tensor] = []
        for step in range(int(lengths[0])):
            active = int((lengths > step).sum())
            if step:
                batch = self._rows.batch(
                    slots[:active], positions[:active] + step, np.ones(active, np.int32)
                )
                features_RH = network.next_features(y_RH[:active])
                y_RH = network.forward(columns[-1][:active], features_RH, batch)
            at = positions[:active] + network.shift + step + 1
            columns.append(self._draw(network.logits(y_RH), slots[:active], at))
        chains = np.full((len(slots), len(columns)), -1, np.int32)
        for step, tokens_R in enumerate(columns):
            chains[order[: len(tokens_R)], step] = tokens_R.cpu().numpy()
        return chains

    def _draw(self, logits_RV: Tensor | None, slots: Int32, positions: Int32) -> Tensor:
        """Draw a token of the target for each row, int32 [R], the same on all ranks.

        The draw has the noise of the target's at the same position, token by token: the least time
        of the target's race is likely the least of the network's, the more so the more alike both
        distributions are.
        """
        device, ids_V = self._mesh.device, self._network.token_ids_V
        if logits_RV is None:
            tokens_R = torch.empty(len(slots), dtype=torch.int32, device=device)
        else:
            temperature = self._temperature[slots]
            rows = SamplingRows(
                temperature_R=to_device(temperature, device),
                top_k_R=to_device(self._top_k[slots], device),
                top_p_R=to_device(self._top_p[slots], device),
                min_p_R=to_device(self._min_p[slots], device),
                seed_R=to_device(self._seed[slots], device),
                position_R=to_device(positions.astype(np.int64), device),
                token_ids_V=ids_V,
                all_greedy=not temperature.any(),
            )
            tokens_R = self._ops.sample(logits_RV, rows).tokens_R.clamp(min=0)
            if ids_V is not None:
                tokens_R = ids_V.index_select(0, tokens_R)
        self._mesh.share_drafts(tokens_R)
        return tokens_R
