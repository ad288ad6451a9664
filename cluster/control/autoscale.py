"""The autoscaler: how many groups a model needs for the current load. Sans-I/O.

The policy keeps each group at the target share of its sequences, and adds a group while requests
wait too long in the queue. The count rises after `up_s` seconds of higher need without a break, and
falls after `down_s` seconds of lower need: a short burst starts no group, and a short pause ends
none (the two windows are those of Kubernetes' HorizontalPodAutoscaler). From zero, the first
request starts a group at once.

Knows counts and a clock that the caller passes; knows nothing of the life or place of groups.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

from arriero.cluster.spec.scale_limits import ScaleLimits


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelLoad:
    """Current load of a model.

    Attributes:
        sequences: number that runs or waits, in groups and gateways.
        capacity: number of sequences of a group.
        serving: number of groups that serve.
        wait_s: longest predicted wait in the queue, in seconds.
    """

    sequences: int
    capacity: int
    serving: int
    wait_s: float = 0.0


class Autoscaler:
    """Counts the groups of a model; call `count` at regular times."""

    def __init__(self, limits: ScaleLimits) -> None:
        self.limits = limits
        self._needs: deque[tuple[float, int]] = deque()  # time in seconds, groups needed

    def count(self, load: ModelLoad, current: int, now_s: float) -> int:
        """Number of groups to have from now on.

        Args:
            load: current load.
            current: number of groups until now.
            now_s: current time in seconds.
        """
        needed = self._needed(load, current)
        self._needs.append((now_s, needed))
        longest_s = max(self.limits.up_s, self.limits.down_s)
        while now_s - self._needs[0][0] > longest_s and self._needs[1][0] <= now_s - longest_s:
            self._needs.popleft()
        if current == 0 and load.sequences:
            return max(needed, 1)
        if (up := min(self._within(self.limits.up_s, now_s), default=current)) > current:
            return up
        if (down := max(self._within(self.limits.down_s, now_s), default=current)) < current:
            return down
        return min(max(current, self.limits.least), self.limits.most)

    def _needed(self, load: ModelLoad, current: int) -> int:
        needed = math.ceil(load.sequences / (self.limits.target * load.capacity))
        if load.wait_s > self.limits.wait_s:
            needed = max(needed, current + 1)
        if not load.serving:  # no group takes requests yet: keep the groups that are starting
            needed = max(needed, current)
        return min(max(needed, self.limits.least), self.limits.most)

    def _within(self, window_s: float, now_s: float) -> list[int]:
        """The needs of the last `window_s` seconds; empty while the record is shorter."""
        if now_s - self._needs[0][0] < window_s:
            return []
        return [needed for at_s, needed in self._needs if now_s - at_s <= window_s]
