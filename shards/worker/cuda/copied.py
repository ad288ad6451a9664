"""Results of a step on their way to the host.

Knows tensors of draws and events; knows nothing of how a step runs.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from arriero.shards.protocol.step_plan import Int32, Logprobs, StepPlan, StepResult
from arriero.shards.worker.cuda.device import Event


@dataclass(frozen=True, slots=True)
class OnHost:
    """Host copies of the fields of `Sampled`, complete after the event of `Copied`."""

    tokens_R: Tensor
    logprobs_R: Tensor | None
    top_tokens_RN: Tensor | None
    top_logprobs_RN: Tensor | None


class Copied:
    """A `Pending` with queued copies to the host."""

    def __init__(
        self,
        plan: StepPlan,
        copies: OnHost | None,
        prompt_logprobs: Logprobs | None,
        copied: Event,
        started_ns: int,
        drafts: Int32 | None = None,
    ) -> None:
        self._step, self._dp_rank = plan.step, plan.dp_rank
        self._copies, self._prompt_logprobs = copies, prompt_logprobs
        self._copied, self._started_ns = copied, started_ns
        self._drafts = drafts

    @property
    def done(self) -> bool:
        """Whether `wait` would return at once."""
        return self._copied.query()

    def wait(self) -> StepResult:
        """The result, after the copies are complete."""
        self._copied.synchronize()
        tokens, logprobs = np.empty(0, np.int32), None
        if self._copies is not None:
            tokens = self._copies.tokens_R.numpy()
            logprobs = _logprobs(self._copies)
        return StepResult(
            step=self._step,
            tokens=tokens,
            logprobs=logprobs,
            prompt_logprobs=self._prompt_logprobs,
            elapsed_us=(time.perf_counter_ns() - self._started_ns) // 1000,
            dp_rank=self._dp_rank,
            drafts=self._drafts,
        )


def _logprobs(copies: OnHost) -> Logprobs | None:
    if copies.logprobs_R is None:
        return None
    chosen = copies.logprobs_R.numpy()
    if copies.top_tokens_RN is None or copies.top_logprobs_RN is None:
        none = np.empty((len(chosen), 0))
        return Logprobs(
            chosen=chosen, top_tokens=none.astype(np.int32), top=none.astype(np.float32)
        )
    return Logprobs(
        chosen=chosen, top_tokens=copies.top_tokens_RN.numpy(), top=copies.top_logprobs_RN.numpy()
    )
