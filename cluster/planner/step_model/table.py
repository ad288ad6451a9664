"""The account as Markdown tables and as JSON.

Knows the names and units that users see; knows nothing of how an account is computed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from arriero.cluster.planner.step_model.cases import CaseStep
from arriero.cluster.planner.step_model.constants import Constant
from arriero.cluster.planner.step_model.estimate import ItemTime, StepTime
from arriero.cluster.planner.step_model.peer_figures import PEER_MS, SOURCE

_NUM_LARGEST = 3


def summary(steps: Sequence[CaseStep]) -> str:
    """A row for each step: floor, estimate, the peer's figure, launches, largest items."""
    columns = (
        "case",
        "GPU",
        "load",
        "floor, ms",
        "estimate, ms",
        f"{SOURCE}, ms",
        "launches",
        "outside graphs",
        "largest items: estimate (floor), ms",
    )
    rows = [
        (
            step.case.name,
            step.gpu,
            step.load,
            _ms(step.time.floor_s),
            _ms(step.time.estimate_s),
            _peer(step),
            f"{_launches(step.time):,.0f}",
            f"{step.time.outside:,.0f}",
            ", ".join(
                f"{item.item} {_ms(item.estimate_s)} ({_ms(item.floor_s)})"
                for item in largest(step.time)
            ),
        )
        for step in steps
    ]
    return _table(columns, rows, left=(0, 1, 2, 8))


def largest(time: StepTime) -> list[ItemTime]:
    """The items with the largest estimates, the largest first."""
    return sorted(time.items, key=lambda item: -item.estimate_s)[:_NUM_LARGEST]


def items(step: CaseStep) -> str:
    """A row for each item of a step."""
    columns = (
        "item",
        "GB moved",
        "TFLOP",
        "launches",
        "MB from ranks",
        "messages",
        "floor, ms",
        "estimate, ms",
    )
    rows = [
        (
            item.item,
            f"{item.nbytes / 1e9:.3f}",
            f"{item.operations / 1e12:.3f}",
            f"{item.launches:,.0f}",
            f"{item.link_bytes / 1e6:,.2f}",
            f"{item.messages:,.0f}",
            _ms(item.floor_s),
            _ms(item.estimate_s),
        )
        for item in step.time.items
    ]
    title = f"{step.case.name}, {step.gpu}, {step.load}"
    return f"{title}\n\n{_table(columns, rows, left=(0,))}"


def constants_table(constants: Mapping[str, Constant]) -> str:
    """A row for each constant with its source."""
    rows = [(name, _value(constant), constant.source) for name, constant in constants.items()]
    return _table(("constant", "value", "source"), rows, left=(0, 2))


def _value(constant: Constant) -> str:
    if constant.unit == "share":
        return f"{constant.value:.2f}"
    return f"{constant.value * 1e6:.1f} us"


def as_json(steps: Sequence[CaseStep], constants: Mapping[str, Constant]) -> dict[str, Any]:
    """The whole account; bytes, operations and seconds without rounding."""
    return {
        "constants": {
            name: {"value": constant.value, "unit": constant.unit, "source": constant.source}
            for name, constant in constants.items()
        },
        "steps": [_step_json(step) for step in steps],
    }


def _step_json(step: CaseStep) -> dict[str, Any]:
    time = step.time
    return {
        "case": step.case.name,
        "gpu": step.gpu,
        "load": step.load,
        "floor_s": time.floor_s,
        "estimate_s": time.estimate_s,
        "estimate_s_by_stage": list(time.stages_s),
        "aiconfigurator_ms": PEER_MS.get((step.case.name, step.gpu, step.load)),
        "launches": _launches(time),
        "launches_outside_graphs": time.outside,
        "items": [
            {
                "item": item.item,
                "bytes": item.nbytes,
                "operations": item.operations,
                "launches": item.launches,
                "collective_bytes": item.link_bytes,
                "messages": item.messages,
                "floor_s": item.floor_s,
                "estimate_s": item.estimate_s,
            }
            for item in time.items
        ],
    }


def _launches(time: StepTime) -> float:
    return sum(item.launches for item in time.items)


def _peer(step: CaseStep) -> str:
    milliseconds = PEER_MS.get((step.case.name, step.gpu, step.load))
    return "-" if milliseconds is None else _ms(milliseconds / 1e3)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.2f}"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int]) -> str:
    marks = ["---" if index in left else "---:" for index in range(len(columns))]
    lines = [columns, marks, *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
