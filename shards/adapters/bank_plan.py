"""The banks of a rank: which modules have memory for adapters, and how many bytes.

Knows modules and parts; knows nothing of tensors and of requests. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

from arriero.kernels.sizes import lora_bank_nbytes
from arriero.shards.checkpoint.formats.modules import Cut, Module
from arriero.shards.layout.parts import AnyPart

KINDS = ("attention", "mlp", "shared_expert", "router", "experts")
"""Kinds of modules that an adapter may change."""
EXPERTS = "experts"
"""The kind of fused routed experts, each of which has a matrix of its own in every slot."""
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


def slot_modules(modules: Iterable[Module], listed: Collection[str]) -> set[str]:
    """Names of the modules that a slot for any adapter covers.

    Routed experts take memory in proportion to their number, so a slot covers them only where an
    adapter of the group's list changes some.

    Args:
        modules: modules of the model.
        listed: names of the modules that the adapters of the list change.
    """
    modules = [module for module in modules if module.kind in KINDS]
    experts = any(module.kind == EXPERTS and module.name in listed for module in modules)
    return {module.name for module in modules if experts or module.kind != EXPERTS}


def planned_nbytes(
    plans: dict[int, list[BankPlan]], num_slots: int, max_rank: int, element_bytes: int
) -> int:
    """Bytes of the banks that `AdapterBanks` allocates."""
    return sum(
        lora_bank_nbytes(num_slots * plan.slots, max_rank, plan.ins, plan.outs, element_bytes)
        for layer_plans in plans.values()
        for plan in layer_plans
    )
