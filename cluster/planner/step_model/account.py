"""The account of a step: the work of a rank of each stage, by item.

Knows how a step is composed of layers, ends and collectives; knows nothing of time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

from arriero.cluster.planner.group_plan import GroupPlan, RankPlan
from arriero.cluster.planner.packed_stack import PackedStack
from arriero.cluster.planner.rank_weights import rank_stacks
from arriero.cluster.planner.step_model.collectives import collectives, half_sums
from arriero.cluster.planner.step_model.ends import ends
from arriero.cluster.planner.step_model.layers import RankStep, layers
from arriero.cluster.planner.step_model.products import Products
from arriero.cluster.planner.step_model.work import StepLoad, Work
from arriero.cluster.planner.weight_forms import Weights
from arriero.kernels.registry import Kernels
from arriero.shards.errors import SpecError
from arriero.shards.layout.parts import AnyModel, AnyPart

MOST_PADDED = 256
"""Most tokens of a data-parallel rank in a graph; `MOST_PADDED` of `shards/worker/cuda/runner.py`,
which needs torch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Account:
    """The work of a step.

    Attributes:
        plan: plan of the group.
        load: sequences of the step, on each data-parallel rank.
        stages: work of a rank of each stage: the rank that samples, on the last stage.
    """

    plan: GroupPlan
    load: StepLoad
    stages: tuple[tuple[Work, ...], ...]

    @property
    def works(self) -> tuple[Work, ...]:
        """Work of all stages."""
        return tuple(work for stage in self.stages for work in stage)


def account(plan: GroupPlan, load: StepLoad, per_node: int) -> Account:
    """The work of a step of a group on GPUs.

    A step of a prompt is not captured, nor is a step with data-parallel attention beyond
    `MOST_PADDED` tokens of a rank.

    Args:
        plan: plan of the group.
        load: sequences of the step, on each data-parallel rank.
        per_node: ranks on a machine.

    Raises:
        SpecError: the plan is for another backend than triton.
    """
    if plan.kernels != "triton" or not plan.device.cuda:
        raise SpecError(
            f"`kernels`={plan.kernels} on {plan.device.name}: the account of GPU work counts "
            "launches of the triton backend; use `kernels`=triton on a GPU"
        )
    firsts: dict[int, RankPlan] = {}
    for rank in plan.ranks:
        firsts.setdefault(rank.part.stage, rank)
    stages = []
    for rank in firsts.values():
        step = RankStep(
            plan=plan,
            rank=rank,
            stacks=_stacks(plan.model.config, rank.part, plan.weights, plan.kernels),
            products=Products(plan.weights),
            load=load,
            captured=load.decodes and (plan.layout.dp == 1 or load.tokens <= MOST_PADDED),
            per_node=per_node,
        )
        stages.append((*ends(step), *_layers(step), *collectives(step)))
    return Account(plan=plan, load=load, stages=tuple(stages))


def _layers(step: RankStep) -> Iterator[Work]:
    """Work of the layers: of a whole step, or of its two halves with their sums."""
    if not step.first_half:
        yield from layers(step)
        return
    for load in step.load.halves(step.first_half):
        half = replace(step, load=load, halved=True)
        yield from layers(half)
        yield half_sums(half)


@lru_cache(maxsize=128)
def _stacks(
    model: AnyModel, part: AnyPart, weights: Weights, kernels: Kernels
) -> tuple[PackedStack, ...]:
    return tuple(rank_stacks(model, part, weights, kernels))
