"""How many groups a model should have, by what is asked of it: a policy, sans-I/O.

As many as keep each group at its target share of sequences, and one more while requests wait too
long for their turn. More groups come once they were wanted for `up_s` without a break, fewer once
for `down_s` no more were wanted, so that a burst neither starts groups for nothing nor ends those
that the next burst needs (the two windows are those of Kubernetes' HorizontalPodAutoscaler). From
none, the first request brings one at once.

Knows counts and a clock that is passed in; knows nothing of groups' lives or of where they go.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

from arriero.cluster.spec.scale_limits import ScaleLimits


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelLoad:
    """What is asked of one model now.

    Attributes:
        sequences: those that run or wait, in groups and gateways.
        capacity: sequences that one group takes.
        serving: groups that serve.
        wait_s: the longest predicted wait for a turn.
    """

    sequences: int
    capacity: int
    serving: int
    wait_s: float = 0.0


class Autoscaler:
    """Counts the groups of one model; ask it regularly."""

    def __init__(self, limits: ScaleLimits) -> None:
        self.limits = limits
        self._raw: deque[tuple[float, int]] = deque()

    def count(self, demand: ModelLoad, now: int, now_s: float) -> int:
        """Groups to have from now on.

        Args:
            demand: of this moment.
            now: groups that are wanted until now.
            now_s: the time.
        """
        raw = self._wanted(demand, now)
        self._raw.append((now_s, raw))
        longest_s = max(self.limits.up_s, self.limits.down_s)
        while now_s - self._raw[0][0] > longest_s and self._raw[1][0] <= now_s - longest_s:
            self._raw.popleft()
        if now == 0 and demand.sequences:
            return max(raw, 1)
        if (up := min(self._within(self.limits.up_s, now_s), default=now)) > now:
            return up
        if (down := max(self._within(self.limits.down_s, now_s), default=now)) < now:
            return down
        return min(max(now, self.limits.least), self.limits.most)

    def _wanted(self, demand: ModelLoad, now: int) -> int:
        wanted = math.ceil(demand.sequences / (self.limits.target * demand.capacity))
        if demand.wait_s > self.limits.wait_s:
            wanted = max(wanted, now + 1)
        if not demand.serving:  # nobody could ask yet: those on their way are wanted still
            wanted = max(wanted, now)
        return min(max(wanted, self.limits.least), self.limits.most)

    def _within(self, window_s: float, now_s: float) -> list[int]:
        """What was wanted in the last `window_s` seconds; none while less is known."""
        if now_s - self._raw[0][0] < window_s:
            return []
        return [raw for at_s, raw in self._raw if now_s - at_s <= window_s]
