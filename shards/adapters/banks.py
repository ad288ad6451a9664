"""The adapters of a rank: memory for every slot, and the part of an adapter that the rank holds.

Adapters are cut as the base model is: a column-parallel matrix keeps A whole and takes its rows of
B; a row-parallel matrix takes its columns of A and keeps B whole, and the ranks' sums meet in the
base model's own sum. Knows modules and parts; knows nothing of requests.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from arriero.kernels.lora import (
    EmbeddingLora,
    LayerLora,
    LoraBank,
    make_bank,
    make_embedding_lora,
)
from arriero.shards.adapters.adapter import Adapter, Matrices
from arriero.shards.adapters.bank_plan import (
    EMBEDDINGS,
    HEAD,
    BankPlan,
    adapted_modules,
    plan_banks,
    slot_modules,
)
from arriero.shards.checkpoint.formats.modules import Module
from arriero.shards.config.adapters import AdapterSlots
from arriero.shards.layout.parts import AnyPart


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterCut:
    """A rank's cut of an adapter in host memory, in the dtype of the banks.

    Attributes:
        matrices: for each bank the matrices of its slots, A of the embedding transposed; None where
            the adapter changes nothing.
    """

    matrices: Sequence[Sequence[Matrices] | None]


class AdapterBanks:
    """Memory of a rank for the adapters in slots.

    Args:
        plans: banks by layer; see `plan_banks`.
        num_slots: slots for adapters.
        max_rank: largest rank of an adapter.
        dtype: dtype of the model's weights.
        device: device of the model.

    Attributes:
        embedding: adapters of the embedding; None where no adapter changes it, or on other stages.
        head: adapters of the head; empty where no adapter changes it, or on other stages.
    """

    def __init__(
        self,
        plans: dict[int | None, list[BankPlan]],
        *,
        num_slots: int,
        max_rank: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._banks: list[tuple[BankPlan, LoraBank | EmbeddingLora]] = []
        self._layers: dict[int | None, LayerLora] = {}
        self.embedding: EmbeddingLora | None = None
        dtype = bank_dtype(dtype)
        for layer, layer_plans in plans.items():
            fields: dict[str, list[LoraBank]] = {}
            for plan in layer_plans:
                if plan.module.kind == EMBEDDINGS:
                    self.embedding = _make_embedding(plan, num_slots, max_rank, dtype, device)
                    self._banks.append((plan, self.embedding))
                    continue
                bank = make_bank(
                    num_slots * plan.slots,
                    max_rank,
                    plan.ins,
                    plan.outs,
                    first=plan.first,
                    dtype=dtype,
                    device=device,
                )
                self._banks.append((plan, bank))
                fields.setdefault(plan.field, []).append(bank)
            self._layers[layer] = LayerLora(banks=fields)
        self.head = self._layers.pop(None, LayerLora()).of(HEAD)

    def layer(self, index: int) -> LayerLora | None:
        """The banks of a layer; None where no adapter changes it. `index` is global."""
        return self._layers.get(index)

    @property
    def nbytes(self) -> int:
        """Bytes of all banks."""
        return sum(bank.nbytes for _, bank in self._banks)

    def cut(self, adapter: Adapter, *, pinned: bool = False) -> AdapterCut:
        """Read the rank's cut of an adapter into host memory; safe beside a running step.

        Args:
            adapter: of at most the largest rank.
            pinned: whether the memory is page-locked, for fast copies to a GPU.

        Raises:
            CheckpointError: a number of the adapter is not finite.
        """
        matrices: list[Sequence[Matrices] | None] = []
        for plan, bank in self._banks:
            if plan.module.name not in adapter.names:
                matrices.append(None)
                continue
            whole = _cut(adapter.matrices(plan.module.name), plan)
            matrices.append([_stored(each, bank.dtype, pinned) for each in _each(whole, plan)])
        return AdapterCut(matrices=matrices)

    def write(self, slot: int, cut: AdapterCut) -> None:
        """Put an adapter into a slot that no running step uses."""
        for (plan, bank), matrices in zip(self._banks, cut.matrices, strict=True):
            for at in range(plan.slots):
                index = slot * plan.slots + at
                if matrices is None:
                    bank.clear(index)
                else:
                    bank.write(index, matrices[at].a, matrices[at].b)


def load_banks(
    modules: Sequence[Module],
    part: AnyPart,
    adapters: Sequence[Adapter],
    slots: AdapterSlots | None,
    dtype: torch.dtype,
    device: torch.device,
) -> AdapterBanks | None:
    """The banks of a rank; None in a group without adapters.

    Args:
        modules: modules of the model.
        part: part of the rank.
        adapters: the listed adapters of the group.
        slots: slots for any adapters, empty at first; None for a slot for each listed adapter, with
            the adapter in it.
        dtype: dtype of the model's weights.
        device: device of the model.

    Raises:
        CheckpointError: a number of an adapter is not finite.
    """
    modules = adapted_modules(modules)
    listed = {name for adapter in adapters for name in adapter.names}
    if slots is not None:
        return AdapterBanks(
            plan_banks(modules, part, slot_modules(modules, listed)),
            num_slots=slots.device,
            max_rank=slots.max_rank,
            dtype=dtype,
            device=device,
        )
    if not adapters:
        return None
    banks = AdapterBanks(
        plan_banks(modules, part, listed),
        num_slots=len(adapters),
        max_rank=max(adapter.rank for adapter in adapters),
        dtype=dtype,
        device=device,
    )
    for slot, adapter in enumerate(adapters):
        banks.write(slot, banks.cut(adapter))
    return banks


def _make_embedding(
    plan: BankPlan, num_slots: int, max_rank: int, dtype: torch.dtype, device: torch.device
) -> EmbeddingLora:
    rows = range(plan.ins) if plan.columns is None else plan.columns
    return make_embedding_lora(num_slots, max_rank, rows, plan.outs, dtype=dtype, device=device)


def _cut(whole: Matrices, plan: BankPlan) -> Matrices:
    """The rank's part of a module's matrices."""
    a, b = whole.a, whole.b
    if plan.experts is not None:
        a, b = a[plan.experts.start : plan.experts.stop], b[plan.experts.start : plan.experts.stop]
    if plan.columns is not None:
        a = a[..., plan.columns.start : plan.columns.stop]
    if plan.rows is not None:
        b = b[..., list(plan.rows)]
    return Matrices(a=a.T if plan.module.kind == EMBEDDINGS else a, b=b)


def _each(matrices: Matrices, plan: BankPlan) -> Iterator[Matrices]:
    """The matrices of each slot of a bank that an adapter fills."""
    if plan.experts is None:
        yield matrices
    else:
        for a, b in zip(matrices.a, matrices.b, strict=True):
            yield Matrices(a=a, b=b)


def _stored(matrices: Matrices, dtype: torch.dtype, pinned: bool) -> Matrices:
    """Copies in the dtype of a bank, which do not refer to the mapped file."""

    def copy(source: Tensor) -> Tensor:
        stored = torch.empty(source.shape, dtype=dtype, pin_memory=pinned)
        return stored.copy_(source)

    return Matrices(a=copy(matrices.a), b=copy(matrices.b))


def bank_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of banks: bfloat16 where the weights have it, else float32."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
