"""The section `autoscale` of a model in `arriero.yaml`.

Knows fields, limits and defaults; knows nothing of load and of how groups are added.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from arriero.cluster.spec.fields import Count, Seconds, SpecSection
from arriero.cluster.spec.scale_limits import ScaleLimits


class AutoscaleSpec(SpecSection):
    """The number of groups follows the load; see `arriero.cluster.control.autoscale`.

    Attributes:
        min: smallest number of groups; with 0 an idle model stops, and the next request waits for
            a start.
        max: largest number of groups.
        target: share of a group's `max_sequences` that should be in use.
        wait_s: longest time in seconds that a request should wait in the queue.
        up_s: seconds of high load before groups are added.
        down_s: seconds of low load before groups are removed.
    """

    min: Annotated[int, Field(ge=0)] = 1
    max: Count
    target: Annotated[float, Field(gt=0, le=1)] = 0.6
    wait_s: Seconds = 2
    up_s: Seconds = 5
    down_s: Seconds = 300

    @model_validator(mode="after")
    def _order(self) -> AutoscaleSpec:
        if self.min > self.max:
            raise ValueError(
                f"`min`={self.min} is more than `max`={self.max}; lower `min` or raise `max`"
            )
        return self

    def limits(self) -> ScaleLimits:
        """Limits of the autoscaler."""
        return ScaleLimits(
            least=self.min,
            most=self.max,
            target=self.target,
            wait_s=self.wait_s,
            up_s=self.up_s,
            down_s=self.down_s,
        )
