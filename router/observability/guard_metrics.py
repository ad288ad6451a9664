"""The metrics of guards: verdicts by tenant and policy, the seconds of a judgement, what is up.

Knows names and numbers; knows nothing of guards and texts.
"""

from __future__ import annotations

from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

Outcome = Literal["safe", "unsafe", "lost"]
"""What came of a judgement; "lost": the guard gave no verdict."""
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class GuardMetrics:
    """Counts judgements.

    Args:
        registry: exports the metrics.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._verdicts = Counter(
            "arriero_guard_verdicts",
            "Judged texts, by tenant, guard, policy (`input_refuse`, `input_annotate`, "
            "`input_prompt_guard`, `output_cut`, `output_annotate`, `moderation`) and verdict: "
            "`safe`, `unsafe`, `lost`.",
            ["tenant", "guard", "policy", "verdict"],
            registry=registry,
        )
        self._seconds = Histogram(
            "arriero_guard_seconds",
            "Seconds of a judgement, the guard's queue included.",
            ["guard"],
            buckets=_SECONDS,
            registry=registry,
        )
        self._up = Gauge(
            "arriero_guard_up",
            "Whether the guard answered the gateway's latest check, 1 or 0; only `prompt-guard`.",
            ["guard"],
            registry=registry,
        )

    def set_up(self, guard: str, *, up: bool) -> None:
        """Set whether a guard answers.

        Args:
            guard: id of the guard.
            up: the guard answered the latest check.
        """
        self._up.labels(guard).set(up)

    def judged(
        self, *, tenant: str, guard: str, policy: str, outcome: Outcome, elapsed_s: float
    ) -> None:
        """Count a judgement.

        Args:
            tenant: name of a known tenant.
            guard: id of a served or configured guard, or `prompt-guard`.
            policy: the action that asked.
            outcome: the verdict.
            elapsed_s: seconds of the judgement.
        """
        self._verdicts.labels(tenant, guard, policy, outcome).inc()
        self._seconds.labels(guard).observe(elapsed_s)
