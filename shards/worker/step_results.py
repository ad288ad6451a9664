"""What a step gives: draws on the device, and the result that may still be on its way.

Knows tensors and messages; knows nothing of how a step is computed. Shape legend: R rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from arriero.kernels.sampling_rows import Sampled
from arriero.shards.protocol.step_plan import Int32, Logprobs, StepResult


class Pending(Protocol):
    """The result of a step that may still run on the device."""

    @property
    def done(self) -> bool:
        """Whether `wait` would return at once."""

    def wait(self) -> StepResult:
        """The result."""


@dataclass(frozen=True, slots=True)
class Done:
    """The result of a finished step."""

    result: StepResult
    done: bool = True

    def wait(self) -> StepResult:
        """The result."""
        return self.result


@dataclass(frozen=True, slots=True)
class Drawn:
    """What a step gives on the rank that samples.

    Attributes:
        sampled: draws; None for a step without any.
        prompt_logprobs: log-probabilities of prompt tokens, if requested.
        drafts: see `StepResult.drafts`.
    """

    sampled: Sampled | None = None
    prompt_logprobs: Logprobs | None = None
    drafts: Int32 | None = None


def logprobs_of(sampled: Sampled | None) -> Logprobs | None:
    """The log-probabilities of draws, on the host; None if not requested."""
    if sampled is None or sampled.logprobs_R is None:
        return None
    chosen = sampled.logprobs_R.cpu().numpy()
    if sampled.top_tokens_RN is None or sampled.top_logprobs_RN is None:
        none = np.empty((len(chosen), 0))
        return Logprobs(
            chosen=chosen, top_tokens=none.astype(np.int32), top=none.astype(np.float32)
        )
    return Logprobs(
        chosen=chosen,
        top_tokens=sampled.top_tokens_RN.cpu().numpy(),
        top=sampled.top_logprobs_RN.cpu().numpy(),
    )
