"""A layer's routed experts where each rank of a stage holds some, and has tokens of its own.

Each row goes, already multiplied by its score, to the rank that holds its expert, and comes back as
that expert's output; the shared expert is computed meanwhile. Ranks without tokens take part. Of
ranks that share their tokens (tensor parallelism) each sends its share of the rows.

Knows routing and ranks; each op comes from `Ops`, each exchange from `Exchange`.

Shape legend: kernels/moe.py, and R ranks of the stage, S slots (places for an expert on a rank; one
an expert, or more where hot experts are held twice), n rows of the token's own share.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from arriero.kernels.moe import Routing
from arriero.kernels.ops import MoELayer, Ops
from arriero.shards.exchange import Counts
from arriero.shards.mesh import Mesh
from arriero.shards.placement import Placement

Loads = npt.NDArray[np.int64]
"""[E]: tokens that each expert was sent."""
Wire = Literal["float32", "bfloat16", "fp8"]
_FP8_MAX = 448.0


class _Table:
    """A placement on the device: from experts to slots."""

    def __init__(self, placement: Placement, device: torch.device) -> None:
        slots_EA, copies_E = placement.slots_EA()
        self.expert_S, self.num_experts = placement.expert_S, len(copies_E)
        self._slots_EA = torch.from_numpy(slots_EA).to(device)
        self._copies_E = torch.from_numpy(copies_E).to(device)

    def to_slots(self, routing: Routing) -> Routing:
        """Experts as slots; the copies of one take turns, token by token."""
        experts_TA = routing.experts_TA.long()
        turn_T1 = torch.arange(experts_TA.shape[0], device=experts_TA.device)[:, None]
        copy_TA = turn_T1 % self._copies_E[experts_TA]
        return Routing(
            experts_TA=self._slots_EA[experts_TA, copy_TA].int(), scores_TA=routing.scores_TA
        )


class ExpertParallel:
    """What `Ops.decoder` calls for the layers with experts.

    Args:
        mesh: of the group.
        ops: the kernels.
        placement: of the experts.
        wire: how rows travel; outputs of experts go back in bfloat16 where rows go in fp8.
    """

    def __init__(self, mesh: Mesh, ops: Ops, placement: Placement, wire: Wire) -> None:
        self._mesh, self._ops = mesh, ops
        self._loads: dict[int, Loads] = {}
        self._wire: Wire = wire
        self._back: Wire = "bfloat16" if wire == "fp8" else wire
        self._starts = placement.start_R1
        self._num_slots = int(placement.start_R1[-1])
        self._first = _Table(placement, mesh.device)
        self._tables: dict[int, _Table] = {}

    def place(self, layer: int, placement: Placement) -> None:
        """Follow another placement in one layer from the next call on; slots stay as many."""
        self._tables[layer] = _Table(placement, self._mesh.device)

    def take_loads(self) -> dict[int, Loads]:
        """Tokens that each expert of each layer was sent since the last call, all ranks' together.

        Every rank of a stage counts the same.
        """
        taken, self._loads = self._loads, {}
        return taken

    def __call__(self, x_TH: Tensor, layer: MoELayer) -> Tensor:
        """As `Ops.moe_block`: a partial [T, H] to be summed over the tensor-parallel ranks."""
        ops, mesh = self._ops, self._mesh
        h_TH = ops.rms_norm(x_TH, layer.mlp_norm_H, layer.eps)
        own = _share(h_TH.shape[0], mesh.part.tp_rank, mesh.tp)
        h_nH = h_TH[own]
        table = self._tables.get(layer.index, self._first)
        routing = table.to_slots(ops.moe_route(h_nH, layer.router, layer.top_k))
        order = ops.moe_permute(routing, 0, self._num_slots)
        rows_XH = h_nH[order.token_X.long()] * order.score_X[:, None].to(h_nH.dtype)
        counts_RS = self._gather_counts(order.starts_E1)
        self._count(layer.index, table, counts_RS)
        counts_RR = np.add.reduceat(counts_RS, self._starts[:-1], axis=1)
        with mesh.watchdog.watch("dispatch to experts"):
            receive = mesh.exchange.begin(encode(rows_XH, self._wire), counts_RR)
        gate_up = ops.linear(h_TH, layer.gate_up)
        shared_TH = ops.linear(ops.silu_mul(gate_up), layer.down)
        with mesh.watchdog.watch("dispatch to experts"):
            got_YB = receive()
        y_YH = self._experts(decode(got_YB, self._wire, h_TH), layer, counts_RS)
        with mesh.watchdog.watch("results of experts"):
            back_XB = mesh.exchange.begin(encode(y_YH, self._back), counts_RR.T.copy())()
        shared_TH[own] += ops.moe_combine(decode(back_XB, self._back, h_TH), order)
        return shared_TH

    def _count(self, layer: int, table: _Table, counts_RS: Counts) -> None:
        loads_E = self._loads.get(layer)
        if loads_E is None:
            loads_E = self._loads[layer] = np.zeros(table.num_experts, dtype=np.int64)
        np.add.at(loads_E, table.expert_S, counts_RS.sum(0))

    def _gather_counts(self, starts_S1: Tensor) -> Counts:
        """Rows of every rank for every slot, [R, S]."""
        counts_S = starts_S1.diff().int()
        found = counts_S.new_empty(self._mesh.stage_size * self._num_slots)
        with self._mesh.watchdog.watch("counts of routed tokens"):
            dist.all_gather_into_tensor(found, counts_S, group=self._mesh.stage_group)
        return found.cpu().numpy().astype(np.int64).reshape(-1, self._num_slots)

    def _experts(self, x_YH: Tensor, layer: MoELayer, counts_RS: Counts) -> Tensor:
        """The experts held here, over rows that come source by source and then slot by slot."""
        ops, rank = self._ops, self._mesh.stage_rank
        mine_RS = counts_RS[:, self._starts[rank] : self._starts[rank + 1]]
        slot_Y = np.repeat(np.tile(np.arange(mine_RS.shape[1]), len(mine_RS)), mine_RS.reshape(-1))
        order_Y = np.argsort(slot_Y, kind="stable")
        to_Y = torch.from_numpy(order_Y).to(x_YH.device)
        starts = np.concatenate(([0], np.cumsum(mine_RS.sum(0))))
        starts_E1 = torch.from_numpy(starts.astype(np.int32)).to(x_YH.device)
        y_YF2 = ops.grouped_linear(x_YH[to_Y], layer.experts_gate_up, starts_E1)
        y_YH = ops.grouped_linear(ops.silu_mul(y_YF2), layer.experts_down, starts_E1)
        out_YH = torch.empty_like(y_YH)
        out_YH[to_Y] = y_YH
        return out_YH


def _share(num_tokens: int, rank: int, ranks: int) -> slice:
    """The rows that one of several ranks with the same tokens sends."""
    return slice(num_tokens * rank // ranks, num_tokens * (rank + 1) // ranks)


def encode(rows_XH: Tensor, wire: Wire) -> Tensor:
    """Rows as bytes, uint8 [X, B]; fp8: e4m3 by a scale of each row, float32, which comes last."""
    if wire == "fp8":
        rows_XH = rows_XH.float()
        scale_X1 = rows_XH.abs().amax(dim=-1, keepdim=True).clamp_(min=1e-12) / _FP8_MAX
        levels = (rows_XH / scale_X1).to(torch.float8_e4m3fn).view(torch.uint8)
        scale_X4 = scale_X1.flatten().view(torch.uint8).view(-1, 4)
        return torch.cat((levels, scale_X4), dim=1)
    return rows_XH.to(getattr(torch, wire)).contiguous().view(torch.uint8)


def decode(rows_XB: Tensor, wire: Wire, like: Tensor) -> Tensor:
    """Undo `encode`: [X, H], in the dtype of `like`."""
    if wire == "fp8":
        levels, scale_X4 = rows_XB[:, :-4], rows_XB[:, -4:].contiguous()
        found = levels.contiguous().view(torch.float8_e4m3fn).float() * scale_X4.view(torch.float32)
        return found.to(like.dtype)
    return rows_XB.view(getattr(torch, wire)).to(like.dtype)
