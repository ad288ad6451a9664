"""The number of groups of each model with `autoscale`, from registry snapshots.

Knows loads and autoscalers by model; knows nothing of seats.
"""

from __future__ import annotations

import time

from arriero.cluster.control.autoscale import Autoscaler, ModelLoad
from arriero.cluster.registry.snapshot import RegistrySnapshot
from arriero.cluster.spec.model import ModelSpec


class GroupCounts:
    """An autoscaler for each model that has `autoscale`."""

    def __init__(self) -> None:
        self._autoscalers: dict[str, Autoscaler] = {}

    def forget(self, model: str) -> None:
        """Forget the loads of a model, whose limits have changed."""
        self._autoscalers.pop(model, None)

    def count(
        self, settings: ModelSpec, current: int, snapshot: RegistrySnapshot
    ) -> tuple[int, str]:
        """Number of groups that a model needs, and the reason in words.

        Args:
            settings: of the model.
            current: number of groups until now.
            snapshot: of the registry.
        """
        if settings.autoscale is None:
            return current, ""
        limits = settings.autoscale.limits()
        autoscaler = self._autoscalers.setdefault(settings.name, Autoscaler(limits))
        waiting, wait_s = snapshot.demand.get(settings.name, (0, 0.0))
        groups = [group for group in snapshot.groups if group.model == settings.name]
        in_groups = sum(
            group.stats.get("num_running", 0) + group.stats.get("num_waiting", 0)
            for group in groups
        )
        load = ModelLoad(
            sequences=waiting + in_groups,
            capacity=settings.limits.max_sequences,
            serving=sum(group.phase == "serving" for group in groups),
            wait_s=wait_s,
        )
        count = autoscaler.count(load, current, time.monotonic())
        return count, f"{load.sequences} sequences, {wait_s:.1f} s to wait"
