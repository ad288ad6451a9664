"""The floor of a step and an estimate of its time.

The floor of an item is the largest of three times: bytes over the memory's rate, operations over
the matrix rate, received bytes over the link's rate. The estimate divides the floor by an
efficiency, and adds the least time of each kernel, of each message and of each meeting of ranks; an
item outside of graphs takes at least the time of its launches. Sums of a step in two halves count
with the time that products of the other half do not hide. Knows work, devices and constants; knows
nothing of models.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from arriero.cluster.planner.catalog import Device
from arriero.cluster.planner.step_model.account import Account
from arriero.cluster.planner.step_model.constants import CONSTANTS, Constant
from arriero.cluster.planner.step_model.work import ITEMS, Item, Work

ATTENTION: tuple[Item, ...] = ("q, k, v product", "RoPE, cache write", "attention", "o product")
MLP: tuple[Item, ...] = ("MLP", "router", "dispatch, combine", "experts", "shared expert")
"""Items of the two blocks of a layer, each with a sum after it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ItemTime:
    """Work and times of an item, over all stages.

    Attributes:
        item: part of the step.
        nbytes, operations, launches, link_bytes, messages: sums of `Work`.
        floor_s: seconds that the device's rates allow; of sums, those that no product hides.
        estimate_s: estimated seconds, likewise.
    """

    item: Item
    nbytes: float
    operations: float
    launches: float
    link_bytes: float
    messages: float
    floor_s: float
    estimate_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTime:
    """Times of a step.

    Attributes:
        items: items with work, in the order of `ITEMS`, over all stages one after the other.
        stages_s: estimated seconds of each stage.
        outside: launches outside of graphs.
    """

    items: tuple[ItemTime, ...]
    stages_s: tuple[float, ...]
    outside: float

    @property
    def floor_s(self) -> float:
        """Floor of the step, through all stages."""
        return sum(item.floor_s for item in self.items)

    @property
    def estimate_s(self) -> float:
        """Estimated seconds of the step, through all stages."""
        return sum(self.stages_s)


def estimate(step: Account, constants: Mapping[str, Constant] = CONSTANTS) -> StepTime:
    """Floor and estimate of a step.

    Args:
        step: the work.
        constants: efficiencies and latencies.
    """
    device = step.plan.device

    def seconds(work: Work) -> float:
        return estimate_s(work, device, constants)

    items = []
    for name in ITEMS:
        works = [work for work in step.works if work.item == name]
        if works:
            items.append(_item(name, works, device, constants))
    overlaps_s = [overlap_s(stage, seconds) for stage in step.stages]
    if any(overlaps_s):
        floors_s = [overlap_floor_s(stage, device) for stage in step.stages]
        items = [_without(item, sum(floors_s), sum(overlaps_s)) for item in items]
    return StepTime(
        items=tuple(items),
        stages_s=tuple(
            sum(map(seconds, stage)) - hidden_s
            for stage, hidden_s in zip(step.stages, overlaps_s, strict=True)
        ),
        outside=sum(work.num_launches for work in step.works if not work.captured),
    )


def _item(
    name: Item, works: Sequence[Work], device: Device, constants: Mapping[str, Constant]
) -> ItemTime:
    return ItemTime(
        item=name,
        nbytes=sum(work.nbytes for work in works),
        operations=sum(work.operations for work in works),
        launches=sum(work.num_launches for work in works),
        link_bytes=sum(work.link_bytes for work in works),
        messages=sum(work.num_messages for work in works),
        floor_s=sum(floor_s(work, device) for work in works),
        estimate_s=sum(estimate_s(work, device, constants) for work in works),
    )


def _without(item: ItemTime, hidden_floor_s: float, hidden_s: float) -> ItemTime:
    """The item; sums without the time that products hide."""
    if item.item != "TP sums":
        return item
    return replace(
        item, floor_s=item.floor_s - hidden_floor_s, estimate_s=item.estimate_s - hidden_s
    )


def overlap_s(stage: Sequence[Work], seconds: Callable[[Work], float]) -> float:
    """Seconds of a stage in which sums of a half run beside products of the other half.

    The halves take turns: beside each sum runs a block of the other half, attention or MLP. The
    first block of a stage and its last sum have nothing beside them. Layers count as equal.

    Args:
        stage: work of the stage.
        seconds: time of a work.
    """
    sums = sum(work.beside for work in stage)
    if not sums:
        return 0.0
    sum_s = sum(seconds(work) for work in stage if work.beside) / sums
    norms = _of(stage, ("norms, residual",), seconds) / 2
    pairs = sums / 2
    attention_s = (_of(stage, ATTENTION, seconds) + norms) / pairs
    mlp_s = (_of(stage, MLP, seconds) + norms) / pairs
    return (pairs - 1) * min(attention_s, sum_s) + pairs * min(mlp_s, sum_s)


def overlap_floor_s(stage: Sequence[Work], device: Device) -> float:
    """Seconds of sums that a perfect overlap would hide."""

    def seconds(work: Work) -> float:
        return floor_s(work, device)

    sums_s = sum(seconds(work) for work in stage if work.beside)
    blocks = (*ATTENTION, *MLP, "norms, residual")
    return min(sums_s, _of(stage, blocks, seconds))


def _of(stage: Sequence[Work], items: Sequence[str], seconds: Callable[[Work], float]) -> float:
    return sum(seconds(work) for work in stage if work.item in items)


def floor_s(work: Work, device: Device) -> float:
    """Seconds that the device's rates allow for a work."""
    return max(_bounds(work, device))


def estimate_s(work: Work, device: Device, constants: Mapping[str, Constant]) -> float:
    """Estimated seconds of a work."""

    def value(name: str) -> float:
        return constants[name].value

    memory, matrix, link = _bounds(work, device)
    seconds = max(
        memory / value(f"{work.kind}, memory"), matrix / value(f"{work.kind}, matrix")
    )  # the adds after a gather wait for the gather: the link's time comes on top
    seconds += link / value("network" if work.network else "link")
    seconds += sum(value(name) * count for name, count in work.messages.items())
    seconds += value("meeting") * work.meetings
    if work.network:
        seconds += value("message across machines") * work.num_messages
    seconds += value(f"{work.kind}, kernel") * sum(work.launches.values())
    if work.captured:
        return seconds
    launches_s = value("launch outside graphs") * work.num_launches
    return max(seconds, launches_s) + value("wait of the host") * work.host_waits


def _bounds(work: Work, device: Device) -> tuple[float, float, float]:
    """Seconds by memory, by products and by the link."""
    rate = device.network_rate if work.network else device.link_rate
    float8 = work.kind == "float8 product"  # at twice the rate, on all devices that have it
    return (
        work.nbytes / device.bandwidth,
        work.operations / (device.matrix_rate * (2 if float8 else 1)),
        work.link_bytes / rate,
    )
