"""Arguments and answer of a leader's action on the weights and the pauses of the group.

Knows values; knows nothing of the work behind them (see `weight_admin`) or of callers.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from arriero.shards.engine.holds import Change, HoldStatus

ACTION = "weights"
STORED = "weights"
"""Name of the pushed weights of all models in Ray's key-value store, where leaders read them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WantedWeights:
    """The weights that all groups of a model shall serve, in place of those of the spec's folder.

    Attributes:
        path: model folder of the spec at the time of the push; a spec with another folder replaces
            the pushed weights.
        sources: folders and files whose tensors replace those of the model folder, in order.
        version: counts the pushes to the model.
    """

    path: str
    sources: tuple[str, ...] = ()
    version: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightArguments:
    """Arguments of the action.

    Attributes:
        change: the change to make; None only tells the state.
        wait_s: longest wait for the end of the change, in seconds; the change then goes on.
    """

    change: Change | None = None
    wait_s: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightReport:
    """State of a group after the action.

    Attributes:
        status: state of weights and pauses.
        error: why the last change was refused; "" after success.
        notes: what the last change left as it is, such as the weights of a draft model.
    """

    status: HoldStatus = field(default_factory=HoldStatus)
    error: str = ""
    notes: tuple[str, ...] = ()
