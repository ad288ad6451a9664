"""The span of a request in a group.

Knows spans, outputs and statistics; knows nothing of links.
"""

from __future__ import annotations

from arriero.router.observability.tracing import Tracing
from arriero.shards.engine.stats import EngineStats
from arriero.shards.engine.types import EngineRequest, SequenceOutput


class GroupSpan:
    """The span of a request in a group: first step, number of steps and tokens, end.

    The times of a step's phases are means over the last steps of the group, shared by all requests.

    Args:
        tracing: makes the span.
        request: the request, with its `traceparent`.
        group: id of the group.
    """

    __slots__ = ("_num_tokens", "_reason", "_span", "_steps")

    def __init__(self, tracing: Tracing, request: EngineRequest, group: str) -> None:
        attributes = {"arriero.request_id": request.request_id, "arriero.group": group}
        self._span = tracing.begin("group", request.trace, attributes)
        self._num_tokens = self._steps = 0
        self._reason = "cancelled"

    def add(self, output: SequenceOutput) -> None:
        """Count an output of the request."""
        if not self._steps:
            self._span.event("first step", {"arriero.cached_tokens": output.num_cached})
        self._steps += 1
        self._num_tokens += len(output.tokens)
        self._reason = output.finish_reason or self._reason

    def end(self, stats: EngineStats) -> None:
        """End the span with the group's statistics."""
        attributes: dict[str, str | int | float] = {
            "arriero.steps": self._steps,
            "gen_ai.usage.output_tokens": self._num_tokens,
            "arriero.end": self._reason,
        }
        attributes |= {f"arriero.step_us.{phase}": mean for phase, mean in stats.step_us.items()}
        self._span.end(attributes)
