"""When experts move, and where to: the leader decides from the load of each expert.

Loads arrive layer by layer. Once a layer has seen enough tokens and another placement is clearly
better, the leader sends that placement, one layer a step, so that no step waits for many weights.

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
"""Tokens per expert after which a layer's placement is decided again."""


class ExpertBalance:
    """Placements of the experts in a group's layers.

    Args:
        initial: placement of every layer at the start.
        enabled: whether experts move at all; False only counts the loads.

    Attributes:
        num_moves: number of changed placements.
    """

    def __init__(self, initial: ExpertPlacement, *, enabled: bool) -> None:
        self._initial, self._enabled = initial, enabled
        self.num_moves = 0
        self._num_experts = int(initial.expert_S.max()) + 1
        self._slots = np.diff(initial.start_R1).tolist()
        self._placements: dict[int, ExpertPlacement] = {}
        self._window: dict[int, npt.NDArray[np.int64]] = {}
        self._totals: dict[int, npt.NDArray[np.int64]] = {}

    def note(self, loads: Mapping[int, npt.NDArray[np.int64]]) -> None:
        """Add the number of tokens sent to each expert, by layer."""
        for layer, loads_E in loads.items():
            for counts in (self._window, self._totals):
                counts[layer] = counts[layer] + loads_E if layer in counts else loads_E.copy()

    def next_placement(self) -> tuple[int, Int32] | None:
        """A layer and the expert in each of the layer's slots from the next step on, or None."""
        if not self._enabled:
            return None
        enough = WINDOW_TOKENS_PER_EXPERT * self._num_experts
        for layer, loads_E in self._window.items():
            if loads_E.sum() < enough:
                continue
            del self._window[layer]
            current = self._placements.get(layer, self._initial)
            placement = balanced(loads_E.astype(np.float64), self._slots, current)
            if placement is current:
                return None
            self._placements[layer] = placement
            self.num_moves += 1
            return layer, placement.expert_S
        return None

    @property
    def imbalance(self) -> float:
        """Largest rank load over the mean load, from all tokens so far; mean over layers."""
        each = [
            imbalance(loads_E.astype(np.float64), self._placements.get(layer, self._initial))
            for layer, loads_E in self._totals.copy().items()  # any thread may read
        ]
        return float(np.mean(each)) if each else 1.0

    @property
    def totals(self) -> dict[str, list[int]]:
        """Tokens sent to each expert since the start, by layer (layer as text, for msgpack)."""
        return {
            str(layer): loads_E.tolist() for layer, loads_E in sorted(self._totals.copy().items())
        }
