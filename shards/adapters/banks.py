"""The adapters of a rank: memory for every slot, and the part of an adapter that the rank holds.

Adapters are cut as the base model is: a column-parallel matrix keeps A whole and takes its rows of
B; a row-parallel matrix takes its columns of A and keeps B whole, and the ranks' sums meet in the
base model's own sum. Knows modules and parts; knows nothing of requests.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from arriero.kernels.lora import LayerLora, LoraBank, bank_nbytes, make_bank
from arriero.shards.adapters.adapter import KINDS, Adapter, Matrices
from arriero.shards.checkpoint.formats.modules import Cut, Module
from arriero.shards.layout.parts import AnyPart

FIELDS = {
    "q_proj": "qkv",
    "k_proj": "qkv",
    "v_proj": "qkv",
    "o_proj": "o",
    "gate_proj": "gate_up",
    "up_proj": "gate_up",
    "down_proj": "down",
    "router": "router",
    "experts.gate_up_proj": "experts_gate_up",
    "experts.down_proj": "experts_down",
}
"""Field of `DenseLayer` or `MoELayer` that holds a module, by the end of the module's name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BankPlan:
    """The bank of a module on a rank.

    Attributes:
        module: the module.
        field: field of the layer.
        rows, columns: indices of the rank's outputs and inputs; None for all.
        experts: experts of the rank, or None.
        ins, outs: inputs and outputs of the rank.
        first: first output column in the stacked product.
    """

    module: Module
    field: str
    rows: tuple[int, ...] | range | None
    columns: range | None
    experts: range | None
    ins: int
    outs: int
    first: int = 0

    @property
    def slots(self) -> int:
        """Slots of the bank for each adapter."""
        return 1 if self.experts is None else len(self.experts)


def plan_banks(
    modules: Iterable[Module], part: AnyPart, changed: Collection[str]
) -> dict[int, list[BankPlan]]:
    """The banks of a rank, by layer.

    Args:
        modules: modules of the model.
        part: part of the rank.
        changed: names of the modules that some adapter changes.
    """
    plans: dict[int, list[BankPlan]] = {}
    first: dict[tuple[int, str], int] = {}
    for module in modules:
        layer = module.layer
        if module.kind not in KINDS or layer is None:
            continue
        if not part.layers.start <= layer < part.layers.stop:
            continue
        plan = _plan(module, part)
        at = first.get((layer, plan.field), 0)
        first[layer, plan.field] = at + plan.outs
        if module.name in changed:
            plans.setdefault(layer, []).append(replace(plan, first=at))
    return plans


def _plan(module: Module, part: AnyPart) -> BankPlan:
    end = (
        ".".join(module.name.split(".")[-2:]) if module.experts else module.name.rpartition(".")[2]
    )
    outs, ins = module.shape
    rows = _indices(module.rows, part)
    columns = _indices(module.columns, part)
    every: tuple[int, ...] | range | None = rows
    if rows is not None and module.stacked > 1:
        each = outs // module.stacked
        every = tuple(each * i + row for i in range(module.stacked) for row in rows)
    experts = None
    if module.experts:
        span = part.experts  # type: ignore[union-attr]  # only models with experts have such modules
        experts = range(span.start, span.stop)
    return BankPlan(
        module=module,
        field=FIELDS[end],
        rows=every,
        columns=columns,
        experts=experts,
        ins=ins if columns is None else len(columns),
        outs=outs if every is None else len(every),
    )


def _indices(cut: Cut | None, part: AnyPart) -> range | None:
    if cut is None:
        return None
    span = getattr(part, cut.axis)
    return range(span.start * cut.per, span.stop * cut.per)


class AdapterBanks:
    """Memory of a rank for the adapters in slots.

    Args:
        plans: banks by layer; see `plan_banks`.
        num_slots: slots for adapters.
        max_rank: largest rank of an adapter.
        dtype: dtype of the model's weights.
        device: device of the model.
    """

    def __init__(
        self,
        plans: dict[int, list[BankPlan]],
        *,
        num_slots: int,
        max_rank: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._num_slots = num_slots
        self._banks: list[tuple[BankPlan, LoraBank]] = []
        self._layers: dict[int, LayerLora] = {}
        for layer, layer_plans in plans.items():
            fields: dict[str, list[LoraBank]] = {}
            for plan in layer_plans:
                bank = make_bank(
                    num_slots * plan.slots,
                    max_rank,
                    plan.ins,
                    plan.outs,
                    first=plan.first,
                    dtype=bank_dtype(dtype),
                    device=device,
                )
                self._banks.append((plan, bank))
                fields.setdefault(plan.field, []).append(bank)
            self._layers[layer] = LayerLora(banks=fields)

    def layer(self, index: int) -> LayerLora | None:
        """The banks of a layer; None where no adapter changes it. `index` is global."""
        return self._layers.get(index)

    @property
    def nbytes(self) -> int:
        """Bytes of all banks."""
        return sum(bank.nbytes for _, bank in self._banks)

    def write(self, slot: int, adapter: Adapter) -> None:
        """Put an adapter into a slot that no running step uses.

        Raises:
            CheckpointError: a number of the adapter is not finite.
        """
        for plan, bank in self._banks:
            matrices = None
            if plan.module.name in adapter.names:
                matrices = _cut(adapter.matrices(plan.module.name), plan)
            for at, (a_RI, b_RO) in enumerate(_each(matrices, plan)):
                index = slot * plan.slots + at
                if a_RI is None or b_RO is None:
                    bank.clear(index)
                else:
                    bank.write(index, a_RI, b_RO)


def load_banks(
    modules: Sequence[Module],
    part: AnyPart,
    adapters: Sequence[Adapter],
    dtype: torch.dtype,
    device: torch.device,
) -> AdapterBanks | None:
    """The banks of a rank, with each adapter in its slot; None without adapters.

    Args:
        modules: modules of the model.
        part: part of the rank.
        adapters: adapters of the group, in order of their slots.
        dtype: dtype of the model's weights.
        device: device of the model.

    Raises:
        CheckpointError: a number of an adapter is not finite.
    """
    if not adapters:
        return None
    changed = {name for adapter in adapters for name in adapter.names}
    banks = AdapterBanks(
        plan_banks(modules, part, changed),
        num_slots=len(adapters),
        max_rank=max(adapter.rank for adapter in adapters),
        dtype=dtype,
        device=device,
    )
    for slot, adapter in enumerate(adapters):
        banks.write(slot, adapter)
    return banks


def _cut(whole: Matrices, plan: BankPlan) -> Matrices:
    """The rank's part of a module's matrices."""
    a, b = whole.a, whole.b
    if plan.experts is not None:
        a, b = a[plan.experts.start : plan.experts.stop], b[plan.experts.start : plan.experts.stop]
    if plan.columns is not None:
        a = a[..., plan.columns.start : plan.columns.stop]
    if plan.rows is not None:
        b = b[..., list(plan.rows)]
    return Matrices(a=a, b=b)


def _each(
    matrices: Matrices | None, plan: BankPlan
) -> Iterator[tuple[Tensor | None, Tensor | None]]:
    """The matrices of each slot of a bank that an adapter fills."""
    if matrices is None:
        yield from [(None, None)] * plan.slots
    elif plan.experts is None:
        yield matrices.a, matrices.b
    else:
        yield from zip(matrices.a, matrices.b, strict=True)


def bank_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of banks: bfloat16 where the weights have it, else float32."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def planned_nbytes(
    plans: dict[int, list[BankPlan]], num_slots: int, max_rank: int, element_bytes: int
) -> int:
    """Bytes of the banks that `AdapterBanks` allocates."""
    return sum(
        bank_nbytes(num_slots * plan.slots, max_rank, plan.ins, plan.outs, element_bytes)
        for layer_plans in plans.values()
        for plan in layer_plans
    )
