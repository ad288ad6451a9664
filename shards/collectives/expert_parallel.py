"""Routed experts of a layer whose experts and tokens are spread over the ranks of a stage.

Each row goes, already multiplied by its score, to the rank of its expert, and returns as the
expert's output; the shared expert is computed while rows are on their way to the experts. Ranks
without tokens take part. Ranks with the same tokens (tensor parallelism) each send a share of the
rows.

Rows travel by exact counts, for which the host waits in each layer; or, in steps of few tokens, in
blocks of a fixed size (`padded_rows`), without a wait, so that a CUDA graph can hold the layer. The
same rows meet the same experts in the same order either way. The blocks have not run over NCCL yet.

Knows routing and ranks; the ops come from `Ops`, the exchange from `Exchange`.

Shape legend: kernels/moe.py, and R ranks of the stage, S expert slots on all ranks (one for each
expert, or more with copies of hot experts), n rows of the rank's own share of the tokens, Y rows
received, B bytes of a row, P rows of a message of blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from arriero.kernels import adapted
from arriero.kernels.expert_rows import RowFormat, row_bytes
from arriero.kernels.layers import MoELayer
from arriero.kernels.lora import AdapterRows
from arriero.kernels.moe import Permutation, Routing
from arriero.kernels.ops import Ops
from arriero.kernels.rounded_rows import unrounded
from arriero.shards.collectives.all_to_all import Counts
from arriero.shards.collectives.beside import Pending
from arriero.shards.collectives.device_loads import DeviceLoads
from arriero.shards.collectives.host_copy import to_device
from arriero.shards.collectives.mesh import Mesh, all_gather
from arriero.shards.collectives.padded_rows import PaddedRows, room_of
from arriero.shards.layout.expert_placement import ExpertPlacement

Loads = npt.NDArray[np.int64]
"""[E]: tokens sent to each expert."""


class _Table:
    """A placement on the device: a map from experts to slots, at addresses that stay."""

    def __init__(self, placement: ExpertPlacement, device: torch.device) -> None:
        self.num_experts = int(placement.expert_S.max()) + 1
        most_copies = len(placement.expert_S) - self.num_experts + 1
        self._slots_EA = torch.zeros(
            (self.num_experts, most_copies), dtype=torch.int64, device=device
        )
        self._copies_E = torch.zeros_like(self._slots_EA[:, 0])
        self.expert_of_S = torch.zeros(len(placement.expert_S), dtype=torch.int64, device=device)
        self.place(placement)

    def place(self, placement: ExpertPlacement) -> None:
        """Use another placement of the same experts in the same slots."""
        device, self.expert_S = self._slots_EA.device, placement.expert_S
        slots_EA, copies_E = placement.slots_EA()
        self._slots_EA[:, : slots_EA.shape[1]].copy_(to_device(slots_EA, device))
        self._copies_E.copy_(to_device(copies_E, device))
        self.expert_of_S.copy_(to_device(placement.expert_S.astype(np.int64), device))

    def to_slots(self, routing: Routing) -> Routing:
        """Replace experts by slots; the copies of an expert take turns, token by token."""
        experts_TA = routing.experts_TA.long()
        turn_T1 = torch.arange(experts_TA.shape[0], device=experts_TA.device)[:, None]
        copy_TA = turn_T1 % self._copies_E[experts_TA]
        return Routing(
            experts_TA=self._slots_EA[experts_TA, copy_TA].int(), scores_TA=routing.scores_TA
        )


@dataclass(frozen=True, slots=True)
class _Blocks:
    """Rows on their way to the experts, in blocks of a fixed size.

    Attributes:
        places: places of the rows.
        first_R: first row for each rank.
        dispatched: rows from every rank to every slot, int32 [R * S], and the received message,
            uint8 [P, B].
    """

    places: PaddedRows
    first_R: Tensor
    dispatched: Pending[tuple[Tensor, Tensor]]


class ExpertParallel:
    """Expert block that `Ops.decoder` calls for layers with experts.

    Args:
        mesh: mesh of the group.
        ops: the kernels.
        placement: placement of the experts.
        wire: format of sent rows; outputs of experts return in bfloat16 where rows go in fp8.
        layers: layers with experts, whose tables and counts must exist before a graph is captured.

    Attributes:
        padded_tokens: most tokens of a data-parallel rank in the next calls, the same number on
            all ranks of the stage: rows travel in blocks of a fixed size. 0: by exact counts.
    """

    def __init__(
        self,
        mesh: Mesh,
        ops: Ops,
        placement: ExpertPlacement,
        wire: RowFormat,
        layers: Sequence[int] = (),
    ) -> None:
        self._mesh, self._ops = mesh, ops
        self._loads: dict[int, Loads] = {}
        self._wire: RowFormat = wire
        self._back: RowFormat = "bfloat16" if wire == "fp8" else wire
        self._starts = placement.start_R1
        self._num_slots = int(placement.start_R1[-1])
        self._placement = placement
        self._tables: dict[int, _Table] = {}
        self.padded_tokens = 0
        self._padded: dict[int, PaddedRows] = {}
        self._device_loads = DeviceLoads(int(placement.expert_S.max()) + 1, mesh.device)
        for layer in layers:
            self._table(layer)
            self._device_loads.of(layer)

    def _table(self, layer: int) -> _Table:
        table = self._tables.get(layer)
        if table is None:
            table = self._tables[layer] = _Table(self._placement, self._mesh.device)
        return table

    def place(self, layer: int, placement: ExpertPlacement) -> None:
        """Use another placement for a layer from the next call on; the slots stay the same."""
        self._table(layer).place(placement)

    def take_loads(self) -> dict[int, Loads]:
        """Tokens sent to each expert since the last call, by layer, over all ranks.

        Every rank of a stage has the same counts. Padding rows of graphs count too, since their
        experts compute them. Counts of steps without a wait come in a later call; see
        `DeviceLoads`.
        """
        loads, self._loads = self._loads, {}
        for layer, counts_E in self._device_loads.take().items():
            loads[layer] = loads.get(layer, 0) + counts_E
        return loads

    def __call__(
        self, x_TH: Tensor, layer: MoELayer, adapters: AdapterRows | None = None
    ) -> Tensor:
        """Same as `Ops.moe_block`: a partial [T, H], to be summed over tensor-parallel ranks.

        Adapters of routed experts do not travel with the rows; a group that exchanges rows refuses
        such adapters when it loads them.
        """
        ops, mesh = self._ops, self._mesh
        h = ops.mlp_rows(x_TH, layer)
        h_TH = unrounded(h)
        own = _share(h_TH.shape[0], mesh.part.tp_rank, mesh.tp)
        h_nH = h_TH[own]
        table = self._table(layer.index)
        own_adapters = None
        if adapters is not None:
            row_R = np.arange(h_TH.shape[0], dtype=np.int32)[own]
            own_adapters = adapters.of_rows(row_R)
        routing = table.to_slots(adapted.route(ops, h_nH, layer, own_adapters))
        order = ops.moe_permute_all(routing, self._num_slots)
        if self.padded_tokens:
            blocks = self._dispatch_blocks(h_nH, layer, order)
            shared_TH = ops.gated_mlp(h, layer, adapters)
            shared_TH[own].add_(self._from_blocks(blocks, h_nH, layer, routing, order))
            return shared_TH
        counts_RS = self._counts_on_host(order.starts_E1)
        self._count(layer.index, table, counts_RS)
        counts_RR = np.add.reduceat(counts_RS, self._starts[:-1], axis=1)
        with mesh.watchdog.watch("dispatch to experts"):
            rows_XB = ops.pack_rows(h_nH, order.token_X, order.score_X, self._wire)
            receive = mesh.exchange.begin(rows_XB, counts_RR)
        shared_TH = ops.gated_mlp(h, layer, adapters)
        with mesh.watchdog.watch("dispatch to experts"):
            received_YB = receive()
        results_YB = self._experts(received_YB, layer, counts_RS, h_TH.dtype)
        with mesh.watchdog.watch("results of experts"):
            returned_XB = mesh.exchange.begin(results_YB, counts_RR.T.copy())()
        row_X = torch.arange(returned_XB.shape[0], dtype=torch.int32, device=returned_XB.device)
        y_XH = ops.unpack_rows(returned_XB, row_X, h_TH.shape[1], self._back, h_TH.dtype)
        shared_TH[own].add_(ops.moe_combine(y_XH, order))
        return shared_TH

    def _count(self, layer: int, table: _Table, counts_RS: Counts) -> None:
        loads_E = self._loads.get(layer)
        if loads_E is None:
            loads_E = self._loads[layer] = np.zeros(table.num_experts, dtype=np.int64)
        np.add.at(loads_E, table.expert_S, counts_RS.sum(0))

    def _gather_counts(self, starts_S1: Tensor) -> Tensor:
        """Rows from every rank to every slot, int32 [R * S]."""
        counts_S = starts_S1.diff().int()
        counts_RS = counts_S.new_empty(self._mesh.stage_size * self._num_slots)
        with self._mesh.watchdog.watch("counts of routed tokens"):
            all_gather(counts_RS, counts_S, self._mesh.stage_group)
        return counts_RS

    def _counts_on_host(self, starts_S1: Tensor) -> Counts:
        """Rows from every rank to every slot, [R, S]; waits for the device."""
        counts_RS = self._gather_counts(starts_S1)
        return counts_RS.cpu().numpy().astype(np.int64).reshape(-1, self._num_slots)

    def _dispatch_blocks(self, h_nH: Tensor, layer: MoELayer, order: Permutation) -> _Blocks:
        """Start to send rows in blocks of a fixed size."""
        ops, mesh = self._ops, self._mesh
        places = self._places(layer.top_k)
        num_rows = order.row_TA.numel()
        first_R = places.first_rows(order.starts_E1)
        if num_rows:
            row_P = places.sent(first_R, num_rows)
            token_P, score_P = (of.index_select(0, row_P) for of in (order.token_X, order.score_X))
            rows_PB = ops.pack_rows(h_nH, token_P, score_P, self._wire)
        else:
            rows_PB = _no_rows(places.num_rows, h_nH.shape[1], self._wire, h_nH.device)

        def exchange() -> tuple[Tensor, Tensor]:
            counts_RS = self._gather_counts(order.starts_E1)
            with mesh.watchdog.watch("dispatch to experts"):
                return counts_RS, mesh.exchange.swap(rows_PB)

        return _Blocks(places, first_R, mesh.beside.begin(exchange))

    def _from_blocks(
        self, blocks: _Blocks, h_nH: Tensor, layer: MoELayer, routing: Routing, order: Permutation
    ) -> Tensor:
        """Sums of the experts' outputs [n, H], after `_dispatch_blocks`."""
        ops, mesh, hidden = self._ops, self._mesh, h_nH.shape[1]
        places, num_rows = blocks.places, order.row_TA.numel()
        counts_RS, received_PB = blocks.dispatched.wait()
        loads_E = self._device_loads.of(layer.index)
        counts_S = counts_RS.view(-1, self._num_slots).sum(0)
        loads_E.index_add_(0, self._table(layer.index).expert_of_S, counts_S)
        slots = places.slots(counts_RS)
        results_PB = self._experts_of_blocks(received_PB, layer, places, slots, h_nH.dtype)
        with mesh.watchdog.watch("results of experts"):
            returned_PB = mesh.exchange.swap(results_PB)
        place_X = places.returned(
            blocks.first_R, routing.experts_TA.reshape(-1), order.row_TA.reshape(-1)
        )
        y_XH = ops.unpack_rows(returned_PB, place_X, hidden, self._back, h_nH.dtype)
        row_X = torch.arange(num_rows, dtype=torch.int32, device=h_nH.device)
        return ops.moe_combine(y_XH, replace(order, row_TA=row_X.view_as(order.row_TA)))

    def _experts_of_blocks(
        self,
        rows_PB: Tensor,
        layer: MoELayer,
        places: PaddedRows,
        slot_P: Tensor,
        dtype: torch.dtype,
    ) -> Tensor:
        """Outputs of the rank's experts, each in the place of its row; anything at padding."""
        ops, hidden = self._ops, layer.gate_up.in_features
        of_places = Routing(experts_TA=slot_P[:, None], scores_TA=places.no_scores_P1)
        order = ops.moe_permute_all(of_places, len(layer.experts_down))
        # the tail of token_X is arbitrary, but must stay within the rows
        place_Y = order.token_X.clamp(0, places.num_rows - 1)
        x_YH = ops.unpack_rows(rows_PB, place_Y, hidden, self._wire, dtype)
        y_YH = ops.expert_mlp(x_YH, layer, order.starts_E1)
        if not len(y_YH):
            return _no_rows(places.num_rows, hidden, self._back, rows_PB.device)
        row_P = order.row_TA.view(-1).clamp(min=0)
        return ops.pack_rows(y_YH, row_P, None, self._back)

    def _places(self, top_k: int) -> PaddedRows:
        mesh = self._mesh
        room = room_of(self.padded_tokens, top_k, mesh.tp, self._starts)
        places = self._padded.get(room)
        if places is None:
            places = PaddedRows(self._starts, mesh.stage_rank, room, mesh.device)
            self._padded[room] = places
        return places

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
        y_YH = ops.expert_mlp(x_YH, layer, starts_E1)
        return ops.pack_rows(y_YH, in_order, None, self._back)


def _no_rows(num_rows: int, hidden: int, format: RowFormat, device: torch.device) -> Tensor:
    """A message of padding alone."""
    size = row_bytes(hidden, format)
    return torch.zeros((num_rows, size), dtype=torch.uint8, device=device)


def _share(num_tokens: int, rank: int, ranks: int) -> slice:
    """Rows that a rank sends, of several ranks with the same tokens."""
    return slice(num_tokens * rank // ranks, num_tokens * (rank + 1) // ranks)
