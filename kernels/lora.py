"""Low-rank adapters (LoRA, Hu 2021) of matrix products: matrices by slot, and the rows of a step.

Knows tensors and slots; knows nothing of adapter files, models and requests.

Shape legend: kernels/ops.py, and
    G  slots      R  largest rank of an adapter      I  inputs      O  outputs
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from arriero.kernels.sizes import LORA_PADDING

NO_ADAPTER = -1
"""Slot of a token that the base model alone computes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraBank:
    """The adapters of one matrix product: y += (x Aᵀ) B for the rows of a slot.

    A product of stacked matrices (q, k, v) has a bank for each matrix, with outputs from column
    `first` of y on. Memory is allocated once, for all slots at the largest rank.

    Attributes:
        a_GRI: A of each slot, padded; rows from the adapter's rank on are not read.
        b_GRO: B of each slot, transposed, times the adapter's scale, padded.
        rank_G: int32, rank of each slot's adapter; 0: the adapter leaves the product as it is.
        in_features, out_features: sizes without the padding.
        first: first column of y.
    """

    a_GRI: Tensor
    b_GRO: Tensor
    rank_G: Tensor
    in_features: int
    out_features: int
    first: int = 0

    @property
    def num_slots(self) -> int:
        """Slots for adapters."""
        return self.a_GRI.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of both matrices."""
        return self.a_GRI.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of both matrices and of the ranks."""
        return self.a_GRI.nbytes + self.b_GRO.nbytes + self.rank_G.nbytes

    def write(self, slot: int, a_RI: Tensor, b_RO: Tensor) -> None:
        """Put an adapter into a slot, in the order of the device's work; the host does not wait.

        Args:
            slot: the slot; no row of a running step has it.
            a_RI: [rank, I]; in page-locked memory where the bank is on a GPU, as `b_RO`.
            b_RO: [rank, O], times the scale.
        """
        rank = a_RI.shape[0]
        self.a_GRI[slot, :rank, : self.in_features].copy_(a_RI, non_blocking=True)
        self.b_GRO[slot, :rank, : self.out_features].copy_(b_RO, non_blocking=True)
        self.rank_G[slot].fill_(rank)

    def clear(self, slot: int) -> None:
        """Leave the product of a slot's rows to the base model."""
        self.rank_G[slot].fill_(0)


def make_bank(
    num_slots: int,
    max_rank: int,
    ins: int,
    outs: int,
    *,
    first: int = 0,
    dtype: torch.dtype,
    device: torch.device,
) -> LoraBank:
    """A bank of empty slots.

    Args:
        num_slots: slots.
        max_rank: largest rank of an adapter.
        ins: inputs of the product.
        outs: outputs of the product.
        first: first column of y.
        dtype: float32, or bfloat16 where the weights of the model have 16 bits.
        device: device of the model.
    """

    def zeros(size: int) -> Tensor:
        padded = -(-size // LORA_PADDING) * LORA_PADDING
        return torch.zeros(num_slots, max_rank, padded, dtype=dtype, device=device)

    return LoraBank(
        a_GRI=zeros(ins),
        b_GRO=zeros(outs),
        rank_G=torch.zeros(num_slots, dtype=torch.int32, device=device),
        in_features=ins,
        out_features=outs,
        first=first,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbeddingLora:
    """The adapters of an embedding table: y += A[:, token] B for the rows of a slot.

    A column of A, which the token chooses, takes the place of the sums x Aᵀ of a product. So the
    product with B is that of a bank whose A is the identity.

    Attributes:
        table_GVR: A of each slot, transposed; 0 from the adapter's rank on.
        bank: B of each slot, behind the identity.
        first_row: first row of the table on this rank.
    """

    table_GVR: Tensor
    bank: LoraBank
    first_row: int

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the matrices."""
        return self.table_GVR.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the tables and of the bank."""
        return self.table_GVR.nbytes + self.bank.nbytes

    def write(self, slot: int, a_VR: Tensor, b_RO: Tensor) -> None:
        """Put an adapter into a slot; see `LoraBank.write`. `a_VR` is A, transposed."""
        rank = a_VR.shape[1]
        self.table_GVR[slot, :, :rank].copy_(a_VR, non_blocking=True)
        self.table_GVR[slot, :, rank:].zero_()
        self.bank.b_GRO[slot, :rank, : self.bank.out_features].copy_(b_RO, non_blocking=True)
        self.bank.rank_G[slot].fill_(rank)

    def clear(self, slot: int) -> None:
        """Leave the embedding of a slot's tokens to the base model."""
        self.bank.clear(slot)

    def columns(self, tokens_T: Tensor, slot_T: Tensor) -> Tensor:
        """Columns of A of each token, float32 [T, R]; 0 for tokens of other ranks.

        Args:
            tokens_T: token ids.
            slot_T: slot of each token; `NO_ADAPTER` for the base model.
        """
        num_rows = self.table_GVR.shape[1]
        row_T = tokens_T.long() - self.first_row
        valid_T = (row_T >= 0) & (row_T < num_rows) & (slot_T >= 0)
        at_T = (slot_T.long() * num_rows + row_T).masked_fill(~valid_T, 0)
        sums_TR = self.table_GVR.flatten(0, 1).index_select(0, at_T).float()
        return sums_TR.masked_fill(~valid_T[:, None], 0.0)


def make_embedding_lora(
    num_slots: int,
    max_rank: int,
    rows: range,
    outs: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> EmbeddingLora:
    """Empty slots for the adapters of a table; see `make_bank`.

    Args:
        num_slots: slots.
        max_rank: largest rank of an adapter.
        rows: rows of the table on this rank.
        outs: columns of the table.
        dtype: as of `make_bank`.
        device: device of the model.
    """
    bank = make_bank(num_slots, max_rank, max_rank, outs, dtype=dtype, device=device)
    bank.a_GRI[:, :, :max_rank] = torch.eye(max_rank, dtype=dtype, device=device)
    return EmbeddingLora(
        table_GVR=torch.zeros(num_slots, len(rows), max_rank, dtype=dtype, device=device),
        bank=bank,
        first_row=rows.start,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterRows:
    """The rows of a step that have an adapter, by slot.

    Attributes:
        slot_T: int32 on the device, slot of each row; `NO_ADAPTER` for the base model.
        order_X: int32 on the host, rows with an adapter, by slot and then by row.
        runs_N3: int32 on the host, [N, 3]: slot, and its rows order[start] .. order[stop - 1].
    """

    slot_T: Tensor
    order_X: npt.NDArray[np.int32]
    runs_N3: npt.NDArray[np.int32]

    @classmethod
    def of(
        cls,
        slot_T: npt.NDArray[np.int32],
        to_device: Callable[[npt.NDArray[np.int32]], Tensor] = torch.from_numpy,
    ) -> AdapterRows | None:
        """The rows of a step; None if no row has an adapter.

        Args:
            slot_T: slot of each row.
            to_device: copies an array to the device of the model.
        """
        order_T = np.argsort(slot_T, kind="stable").astype(np.int32)
        order_X = order_T[np.count_nonzero(slot_T == NO_ADAPTER) :]
        if not len(order_X):
            return None
        slots_N, starts_N = np.unique(slot_T[order_X], return_index=True)
        stops_N = np.append(starts_N[1:], len(order_X))
        return cls(
            slot_T=to_device(slot_T),
            order_X=order_X,
            runs_N3=np.stack((slots_N, starts_N, stops_N), axis=1).astype(np.int32),
        )

    def of_rows(
        self,
        row_R: npt.NDArray[np.integer],
        to_device: Callable[[npt.NDArray[np.int32]], Tensor] | None = None,
    ) -> AdapterRows | None:
        """The adapters of some rows, in the order of `row_R`.

        Args:
            row_R: rows of the step.
            to_device: as of `of`; None for a copy for which the host waits.
        """
        slot_T = np.full(len(self.slot_T), NO_ADAPTER, np.int32)
        for slot, start, stop in self.runs_N3.tolist():
            slot_T[self.order_X[start:stop]] = slot
        return AdapterRows.of(slot_T[row_R], to_device or self._copy)

    def of_experts(
        self, token_X: npt.NDArray[np.int32], expert_X: npt.NDArray[np.int32], num_experts: int
    ) -> AdapterRows | None:
        """The adapters of rows that go to experts; a bank of experts has a slot for each of both.

        Args:
            token_X: token of each row.
            expert_X: expert of each row, from 0 on this rank.
            num_experts: experts of this rank.
        """
        slot_X = self.slot_T.cpu().numpy()[token_X]
        with_expert_X = np.where(slot_X < 0, NO_ADAPTER, slot_X * num_experts + expert_X)
        return AdapterRows.of(with_expert_X.astype(np.int32), self._copy)

    def _copy(self, array: npt.NDArray[np.int32]) -> Tensor:
        return torch.from_numpy(array).to(self.slot_T.device)


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerLora:
    """The banks of a decoder layer, by the field of `DenseLayer` or `MoELayer` that they adapt.

    Attributes:
        banks: banks of `qkv`, `o`, `gate_up`, `down`, `router`, `experts_gate_up` and
            `experts_down`; a bank of experts has slot * experts + expert for a slot.
    """

    banks: Mapping[str, Sequence[LoraBank]] = field(default_factory=dict)

    def of(self, name: str) -> Sequence[LoraBank]:
        """Banks of a product, one for each stacked matrix; empty where none is adapted."""
        return self.banks.get(name, ())

    @property
    def nbytes(self) -> int:
        """Bytes of all banks."""
        return sum(bank.nbytes for banks in self.banks.values() for bank in banks)


def add_lora(y_TO: Tensor, x_TI: Tensor, banks: Sequence[LoraBank], rows: AdapterRows) -> None:
    """The definition of `Ops.add_lora`: products and sums in float32."""
    for slot, start, stop in rows.runs_N3.tolist():
        row_X = torch.from_numpy(rows.order_X[start:stop]).to(y_TO.device)
        x_XI = x_TI.index_select(0, row_X).float()
        for bank in banks:
            rank = int(bank.rank_G[slot])
            if not rank:
                continue
            a_RI = bank.a_GRI[slot, :rank, : bank.in_features].float()
            b_RO = bank.b_GRO[slot, :rank, : bank.out_features].float()
            columns = slice(bank.first, bank.first + bank.out_features)
            y_TO[row_X.long(), columns] += ((x_XI @ a_RI.T) @ b_RO).to(y_TO.dtype)
