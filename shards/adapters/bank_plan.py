"""The banks of a rank: which modules have memory for adapters, and how many bytes.

Knows modules and parts; knows nothing of tensors and of requests. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from itertools import chain
from typing import Final

from arriero.kernels.sizes import embedding_lora_nbytes, lora_bank_nbytes
from arriero.shards.checkpoint.formats.modules import Cut, Module
from arriero.shards.layout.parts import AnyPart

KINDS = ("attention", "mlp", "shared_expert", "router", "experts", "embeddings", "head")
"""Kinds of modules that an adapter may change."""
EMBEDDINGS: Final = "embeddings"
HEAD: Final = "head"
"""The kinds of modules outside of the layers."""
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
    "embed_tokens": "embedding",
    "lm_head": "head",
}
"""Field of `DenseLayer`, `MoELayer` or the slice with a module, by the end of the module's name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BankPlan:
    """The bank of a module on a rank.

    Attributes:
        module: the module.
        field: field of the layer.
        rows, columns: indices of the rank's outputs and inputs; None for all. The inputs of an
            embedding are the tokens.
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


def adapted_modules(modules: Iterable[Module]) -> list[Module]:
    """The modules that an adapter may change, with embedding and head apart where they are tied.

    peft computes the adapter of a tied embedding where tokens are embedded, and that of a tied head
    where logits are computed: neither changes the other.
    """
    changeable = [module for module in modules if module.kind in KINDS]
    if any(module.kind == HEAD for module in changeable):
        return changeable
    apart = []
    for module in changeable:
        if module.kind == EMBEDDINGS:
            prefix = module.name.removesuffix("model.embed_tokens")
            head = replace(module, name=f"{prefix}lm_head", kind=HEAD, place="last", product=True)
            apart += [replace(module, place="first"), head]
        else:
            apart.append(module)
    return apart


def plan_banks(
    modules: Iterable[Module], part: AnyPart, changed: Collection[str]
) -> dict[int | None, list[BankPlan]]:
    """The banks of a rank, by layer; those of embedding and head under None.

    Args:
        modules: modules that an adapter may change; see `adapted_modules`.
        part: part of the rank.
        changed: names of the modules that some adapter changes.
    """
    plans: dict[int | None, list[BankPlan]] = {}
    first: dict[tuple[int | None, str], int] = {}
    for module in modules:
        layer = module.layer
        if not _is_on(module, part):
            continue
        plan = _plan(module, part)
        at = first.get((layer, plan.field), 0)
        first[layer, plan.field] = at + plan.outs
        if module.name in changed:
            plans.setdefault(layer, []).append(replace(plan, first=at))
    return plans


def _is_on(module: Module, part: AnyPart) -> bool:
    """Whether the stage of a rank has a module."""
    if module.layer is not None:
        return part.layers.start <= module.layer < part.layers.stop
    return part.first_stage if module.kind == EMBEDDINGS else part.last_stage


def _plan(module: Module, part: AnyPart) -> BankPlan:
    end = (
        ".".join(module.name.split(".")[-2:]) if module.experts else module.name.rpartition(".")[2]
    )
    outs, ins = module.shape
    rows = _indices(module.rows, part)
    columns = _indices(module.columns, part)
    if module.kind == EMBEDDINGS:
        outs, ins, rows, columns = ins, outs, columns, rows
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
        modules: modules that an adapter may change; see `adapted_modules`.
        listed: names of the modules that the adapters of the list change.
    """
    modules = tuple(modules)
    experts = any(module.kind == EXPERTS and module.name in listed for module in modules)
    return {module.name for module in modules if experts or module.kind != EXPERTS}


def planned_nbytes(
    plans: dict[int | None, list[BankPlan]], num_slots: int, max_rank: int, element_bytes: int
) -> int:
    """Bytes of the banks that `AdapterBanks` allocates."""
    total = 0
    for plan in chain.from_iterable(plans.values()):
        sizes = (max_rank, plan.ins, plan.outs, element_bytes)
        if plan.module.kind == EMBEDDINGS:
            total += embedding_lora_nbytes(num_slots, *sizes)
        else:
            total += lora_bank_nbytes(num_slots * plan.slots, *sizes)
    return total
