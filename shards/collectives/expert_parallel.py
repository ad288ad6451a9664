"""Routed experts of a layer whose experts and tokens are spread over the ranks of a stage.

Each row goes, already multiplied by its score, to the rank of its expert, and returns as the
expert's output; the shared expert is computed meanwhile. Ranks without tokens take part. Ranks with
the same tokens (tensor parallelism) each send a share of the rows.

Knows routing and ranks; the ops come from `Ops`, the exchange from `Exchange`.

Shape legend: kernels/moe.py, and R ranks of the stage, S expert slots on all ranks (one for each
expert, or more with copies of hot experts), n rows of the rank's own share of the tokens, Y rows
received, B bytes of a row.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from arriero.kernels import adapted
from arriero.kernels.expert_rows import RowFormat
from arriero.kernels.layers import MoELayer
from arriero.kernels.lora import AdapterRows
from arriero.kernels.moe import Routing
from arriero.kernels.ops import Ops
from arriero.shards.collectives.all_to_all import Counts
from arriero.shards.collectives.host_copy import to_device
from arriero.shards.collectives.mesh import Mesh, all_gather
from arriero.shards.layout.expert_placement import ExpertPlacement

Loads = npt.NDArray[np.int64]
"""[E]: tokens sent to each expert."""


class _Table:
    """A placement on the device: a map from experts to slots."""

    def __init__(self, placement: ExpertPlacement, device: torch.device) -> None:
        slots_EA, copies_E = placement.slots_EA()
        self.expert_S, self.num_experts = placement.expert_S, len(copies_E)
        self._slots_EA = to_device(slots_EA, device)
        self._copies_E = to_device(copies_E, device)

    def to_slots(self, routing: Routing) -> Routing:
        """Replace experts by slots; the copies of an expert take turns, token by token."""
        experts_TA = routing.experts_TA.long()
        turn_T1 = torch.arange(experts_TA.shape[0], device=experts_TA.device)[:, None]
        copy_TA = turn_T1 % self._copies_E[experts_TA]
        return Routing(
            experts_TA=self._slots_EA[experts_TA, copy_TA].int(), scores_TA=routing.scores_TA
        )


class ExpertParallel:
    """Expert block that `Ops.decoder` calls for layers with experts.

    Args:
        mesh: mesh of the group.
        ops: the kernels.
        placement: placement of the experts.
        wire: format of sent rows; outputs of experts return in bfloat16 where rows go in fp8.
    """

    def __init__(self, mesh: Mesh, ops: Ops, placement: ExpertPlacement, wire: RowFormat) -> None:
        self._mesh, self._ops = mesh, ops
        self._loads: dict[int, Loads] = {}
        self._wire: RowFormat = wire
        self._back: RowFormat = "bfloat16" if wire == "fp8" else wire
        self._starts = placement.start_R1
        self._num_slots = int(placement.start_R1[-1])
        self._first = _Table(placement, mesh.device)
        self._tables: dict[int, _Table] = {}

    def place(self, layer: int, placement: ExpertPlacement) -> None:
        """Use another placement for a layer from the next call on; the slots stay the same."""
        self._tables[layer] = _Table(placement, self._mesh.device)

    def take_loads(self) -> dict[int, Loads]:
        """Tokens sent to each expert since the last call, by layer, over all ranks.

        Every rank of a stage has the same counts.
        """
        loads, self._loads = self._loads, {}
        return loads

    def __call__(
        self, x_TH: Tensor, layer: MoELayer, adapters: AdapterRows | None = None
    ) -> Tensor:
        """Same as `Ops.moe_block`: a partial [T, H], to be summed over tensor-parallel ranks.

        Adapters of routed experts do not travel with the rows; a group that exchanges rows refuses
        such adapters when it loads them.
        """
        ops, mesh = self._ops, self._mesh
        h_TH = ops.rms_norm(x_TH, layer.mlp_norm_H, layer.eps)
        own = _share(h_TH.shape[0], mesh.part.tp_rank, mesh.tp)
        h_nH = h_TH[own]
        table = self._tables.get(layer.index, self._first)
        own_adapters = None
        if adapters is not None:
            row_R = np.arange(h_TH.shape[0], dtype=np.int32)[own]
            own_adapters = adapters.of_rows(row_R)
        routing = table.to_slots(adapted.route(ops, h_nH, layer, own_adapters))
        order = ops.moe_permute_all(routing, self._num_slots)
        counts_RS = self._gather_counts(order.starts_E1)
        self._count(layer.index, table, counts_RS)
        counts_RR = np.add.reduceat(counts_RS, self._starts[:-1], axis=1)
        with mesh.watchdog.watch("dispatch to experts"):
            rows_XB = ops.pack_rows(h_nH, order.token_X, order.score_X, self._wire)
            receive = mesh.exchange.begin(rows_XB, counts_RR)
        shared_TH = adapted.gated_mlp(ops, h_TH, layer, adapters)
        with mesh.watchdog.watch("dispatch to experts"):
            received_YB = receive()
        results_YB = self._experts(received_YB, layer, counts_RS, h_TH.dtype)
        with mesh.watchdog.watch("results of experts"):
            returned_XB = mesh.exchange.begin(results_YB, counts_RR.T.copy())()
        row_X = torch.arange(returned_XB.shape[0], dtype=torch.int32, device=returned_XB.device)
        y_XH = ops.unpack_rows(returned_XB, row_X, h_TH.shape[1], self._back, h_TH.dtype)
        shared_TH[own] += ops.moe_combine(y_XH, order)
        return shared_TH

    def _count(self, layer: int, table: _Table, counts_RS: Counts) -> None:
        loads_E = self._loads.get(layer)
        if loads_E is None:
            loads_E = self._loads[layer] = np.zeros(table.num_experts, dtype=np.int64)
        np.add.at(loads_E, table.expert_S, counts_RS.sum(0))

    def _gather_counts(self, starts_S1: Tensor) -> Counts:
        """Rows from every rank to every slot, [R, S]; waits for the device."""
        counts_S = starts_S1.diff().int()
        counts_RS = counts_S.new_empty(self._mesh.stage_size * self._num_slots)
        with self._mesh.watchdog.watch("counts of routed tokens"):
            all_gather(counts_RS, counts_S, self._mesh.stage_group)
        return counts_RS.cpu().numpy().astype(np.int64).reshape(-1, self._num_slots)

    def _experts(
        self, rows_YB: Tensor, layer: MoELayer, counts_RS: Counts, dtype: torch.dtype
    ) -> Tensor:
        """Outputs of the rank's experts, for rows sorted by source and then by slot.

        The outputs return in the order of the rows.
        """
        ops, rank, size = self._ops, self._mesh.stage_rank, layer.gate_up.in_features
        own_RS = counts_RS[:, self._starts[rank] : self._starts[rank + 1]]
        slot_Y = np.repeat(np.tile(np.arange(own_RS.shape[1]), len(own_RS)), own_RS.reshape(-1))
        by_slot_Y = np.argsort(slot_Y, kind="stable").astype(np.int32)
        in_order_Y = np.argsort(by_slot_Y).astype(np.int32)
        starts = np.concatenate(([0], np.cumsum(own_RS.sum(0)))).astype(np.int32)
        device = rows_YB.device
        starts_E1 = to_device(starts, device)
        by_slot, in_order = (to_device(order_Y, device) for order_Y in (by_slot_Y, in_order_Y))
        x_YH = ops.unpack_rows(rows_YB, by_slot, size, self._wire, dtype)
        y_YF2 = ops.grouped_linear(x_YH, layer.experts_gate_up, starts_E1)
        y_YH = ops.grouped_linear(ops.silu_mul(y_YF2), layer.experts_down, starts_E1)
        return ops.pack_rows(y_YH, in_order, None, self._back)


def _share(num_tokens: int, rank: int, ranks: int) -> slice:
    """Rows that a rank sends, of several ranks with the same tokens."""
    return slice(num_tokens * rank // ranks, num_tokens * (rank + 1) // ranks)
