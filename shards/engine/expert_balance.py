"""When experts move, and where to: decided by the leader from what each was asked.

Loads come in layer by layer; once a layer has seen enough tokens and another placement would be
clearly better, that placement goes out, one layer a step, so that no step waits for many weights.

Knows counts and placements; knows nothing of weights, plans or processes.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from arriero.shards.layout.expert_balancer import balanced, imbalance
from arriero.shards.layout.expert_placement import ExpertPlacement
from arriero.shards.protocol.step_plan import Int32

WINDOW_TOKENS_PER_EXPERT = 64
"""A layer is looked at again after so many tokens for each of its experts."""


class ExpertBalance:
    """The placements of a group's layers.

    Args:
        initial: every layer's placement at the start.
        moves: whether experts move at all; else loads are only counted.

    Attributes:
        num_moves: placements that were changed.
    """

    def __init__(self, initial: ExpertPlacement, *, moves: bool) -> None:
        self._initial, self._moves = initial, moves
        self.num_moves = 0
        self._num_experts = int(initial.expert_S.max()) + 1
        self._slots = np.diff(initial.start_R1).tolist()
        self._placements: dict[int, ExpertPlacement] = {}
        self._window: dict[int, npt.NDArray[np.int64]] = {}
        self._totals: dict[int, npt.NDArray[np.int64]] = {}

    def note(self, loads: Mapping[int, npt.NDArray[np.int64]]) -> None:
        """Take in tokens that each expert was sent, by layer."""
        for layer, loads_E in loads.items():
            for kept in (self._window, self._totals):
                kept[layer] = kept[layer] + loads_E if layer in kept else loads_E.copy()

    def next_move(self) -> tuple[int, Int32] | None:
        """A layer and the expert in each of its slots from the next step on, or None."""
        if not self._moves:
            return None
        enough = WINDOW_TOKENS_PER_EXPERT * self._num_experts
        for layer, loads_E in self._window.items():
            if loads_E.sum() < enough:
                continue
            del self._window[layer]
            now = self._placements.get(layer, self._initial)
            found = balanced(loads_E.astype(np.float64), self._slots, now)
            if found is now:
                return None
            self._placements[layer] = found
            self.num_moves += 1
            return layer, found.expert_S
        return None

    @property
    def imbalance(self) -> float:
        """Largest rank load over the mean, by all tokens so far; the mean over layers."""
        each = [
            imbalance(loads_E.astype(np.float64), self._placements.get(layer, self._initial))
            for layer, loads_E in self._totals.copy().items()  # any thread may ask
        ]
        return float(np.mean(each)) if each else 1.0

    @property
    def totals(self) -> dict[str, list[int]]:
        """Tokens that each expert was sent since the start, by layer (in words, for any wire)."""
        return {
            str(layer): loads_E.tolist() for layer, loads_E in sorted(self._totals.copy().items())
        }
