"""Estimated speed of a group for `arriero plan`.

Knows the demand of a plan; knows nothing of how a step's time is estimated. Estimates, not
measurements: good for comparing layouts.
"""

from __future__ import annotations

from dataclasses import dataclass

from arriero.cluster.planner.group_plan import GroupPlan
from arriero.cluster.planner.step_model.account import account
from arriero.cluster.planner.step_model.estimate import StepTime, estimate
from arriero.cluster.planner.step_model.work import StepLoad


@dataclass(frozen=True, kw_only=True, slots=True)
class Speed:
    """Estimated tokens per second at the demand's context.

    Attributes:
        single: of a request alone on a group.
        full: of a group with as many sequences as it holds at once.
        prefill: prompt tokens of a group in steps of the largest size.
    """

    single: float
    full: float
    prefill: float


def speed(plan: GroupPlan, per_node: int) -> Speed | None:
    """The estimated speed of a group; None where no estimate is made.

    Args:
        plan: plan of the group.
        per_node: ranks on a machine.
    """
    layout, demand = plan.layout, plan.demand
    if plan.kernels != "triton" or not plan.device.matrix_rate:
        return None
    batch = min(plan.concurrency(demand.context), demand.max_sequences * layout.dp)
    if not batch:
        return None

    def step(sequences: int, new_tokens: int, context: int) -> StepTime:
        load = StepLoad(sequences=sequences, new_tokens=new_tokens, context=context)
        return estimate(account(plan, load, per_node))

    single = step(1, 1, demand.context)
    micro = -(-batch // layout.pp)  # there are as many micro-batches in flight as stages
    full = step(-(-micro // layout.dp), 1, demand.context)
    tokens = max(2, min(demand.max_batch_tokens, demand.context))
    prefill = step(1, tokens, tokens)
    return Speed(
        single=1 / single.estimate_s,
        full=micro / max(full.stages_s),
        prefill=tokens * layout.dp / max(prefill.stages_s),
    )
