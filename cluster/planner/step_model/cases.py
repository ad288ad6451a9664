"""The cases of `make gpu-account`: large models on two machines or one, at four loads.

Knows names, meshes and loads; knows nothing of how a step is accounted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from arriero.cluster.planner.catalog import Device, device, find_model
from arriero.cluster.planner.demand import KvDemand
from arriero.cluster.planner.memory import plan_group
from arriero.cluster.planner.step_model.account import Account, account
from arriero.cluster.planner.step_model.constants import CONSTANTS, Constant
from arriero.cluster.planner.step_model.estimate import StepTime, estimate
from arriero.cluster.planner.step_model.work import StepLoad
from arriero.cluster.planner.weight_forms import Dtype, weights_as
from arriero.shards.config.parallel import ParallelConfig

GPUS = ("h200-141g", "h100-80g")
PER_NODE = 8
CONTEXT, PROMPT = 1024, 8192
"""Tokens of a sequence after a decode step; of a prompt, in a single step."""
BATCHES = (1, 64, 256)


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A model in a form on a mesh.

    Attributes:
        model: name of the catalogue.
        dtype: form of the weights.
        layout: mesh of the group.
    """

    model: str
    dtype: Dtype
    layout: ParallelConfig

    @property
    def name(self) -> str:
        """Model, mesh and form of the weights."""
        return f"{self.model} {self.layout} {self.dtype}"


CASES = (
    Case(model="llama-3.1-405b", dtype="bfloat16", layout=ParallelConfig(tp=8, pp=2)),
    Case(model="llama-3.1-405b", dtype="fp8", layout=ParallelConfig(tp=8, pp=2)),
    Case(model="llama-3.1-405b", dtype="fp8", layout=ParallelConfig(tp=8)),
    Case(model="llama-4-maverick", dtype="fp8", layout=ParallelConfig(tp=8, ep=8)),
    Case(model="llama-4-maverick", dtype="fp8", layout=ParallelConfig(tp=8, ep=1)),
    Case(model="llama-4-maverick", dtype="fp8", layout=ParallelConfig(dp=8, ep=8)),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class CaseStep:
    """A case at a load on a device.

    Attributes:
        case: the case.
        gpu: name of the device.
        load: "batch 1", "batch 64", "batch 256" or "prefill 8k"; a batch is of the whole group.
        step: the work.
        time: floor and estimate.
    """

    case: Case
    gpu: str
    load: str
    step: Account
    time: StepTime


def case_steps(
    gpus: tuple[str, ...] = GPUS, constants: Mapping[str, Constant] = CONSTANTS
) -> Iterator[CaseStep]:
    """All cases at all loads on the devices.

    Args:
        gpus: names of the catalogue.
        constants: efficiencies and latencies.
    """
    for case in CASES:
        for gpu in gpus:
            for load, sizes in _loads(case.layout.dp).items():
                step = _account(case, device(gpu, None, PER_NODE), sizes)
                time = estimate(step, constants)
                yield CaseStep(case=case, gpu=gpu, load=load, step=step, time=time)


def _loads(dp: int) -> dict[str, StepLoad]:
    """Loads by name; a batch with less than a sequence for each dp rank is left out."""
    loads = {
        f"batch {batch}": StepLoad(sequences=batch // dp, context=CONTEXT)
        for batch in BATCHES
        if batch >= dp
    }
    if dp == 1:
        loads["prefill 8k"] = StepLoad(sequences=1, new_tokens=PROMPT, context=PROMPT)
    return loads


def _account(case: Case, gpu: Device, load: StepLoad) -> Account:
    model = find_model(case.model)
    demand = KvDemand(context=PROMPT, max_batch_tokens=PROMPT)
    weights = weights_as(model.config, model.scheme, case.dtype)
    plan = plan_group(model, weights, case.layout, demand, gpu, "triton")
    return account(plan, load, PER_NODE)
