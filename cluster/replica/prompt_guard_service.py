"""Prompt Guard as a deployment of Ray Serve: its replicas, and a gateway's calls to them.

Serve starts the replicas beside the gateways, shares the calls among them, and replaces a replica
that dies. Knows Serve's handles; knows nothing of the classifier's form and of policies.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import ray
from ray import serve
from ray.serve.exceptions import RayServeException

from arriero.cluster.hosts.log_level import set_log_level
from arriero.cluster.registry import registry
from arriero.cluster.registry.history import Failure
from arriero.cluster.spec.safety import PromptGuardSpec
from arriero.shards.errors import ArrieroError, Unavailable

NAME = "prompt-guard"
_MAX_CALLS = 16
"""Calls that a replica accepts at once; it computes one after the other."""


class PromptGuardReplica:
    """The Serve replica around one `PromptGuard`.

    Args:
        spec: folder and threads.
        log_level, log_format: level and form of the replica's logs.
    """

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, spec: PromptGuardSpec, log_level: str, log_format: str
    ) -> None:
        set_log_level(log_level, log_format)
        try:
            self._guard = await asyncio.to_thread(_load, spec)
        except ArrieroError as error:
            failure = Failure(who=NAME, kind=type(error).__name__, cause=str(error))
            await registry.connect().fail.remote(failure)
            raise
        self._turn = asyncio.Lock()  # tokenizers refuse calls from two threads

    async def scores(self, texts: Sequence[str], limit_s: float) -> list[float]:
        """Probability of an attack for each text; see `PromptGuard.scores`."""
        if not texts:  # a check of a gateway, which waits for no computation
            return []
        async with self._turn:
            return await asyncio.to_thread(self._guard.scores, texts, limit_s)


class RemotePromptGuard:
    """A gateway's calls to the replicas; see `router.guards.injections.ScoreTexts`.

    Args:
        handle: Serve's handle of the deployment.
    """

    def __init__(self, handle: Any) -> None:  # noqa: ANN401  # Serve's handle lacks types
        self._handle = handle

    async def __call__(self, texts: Sequence[str], timeout_s: float) -> Sequence[float]:
        """Probability of an injection for each text.

        Raises:
            Unavailable: no replica gives scores.
        """
        response = self._handle.scores.remote(list(texts), timeout_s)
        try:
            scores: list[float] = await response
        except asyncio.CancelledError:
            response.cancel()  # also one that still waits for a replica
            raise
        except (ray.exceptions.RayError, RayServeException, ArrieroError) as error:
            raise Unavailable(f"no scores: {_first_line(error)}") from None
        return scores

    async def is_up(self, timeout_s: float) -> bool:
        """Whether a replica answers within `timeout_s` seconds."""
        try:
            await asyncio.wait_for(self([], timeout_s), timeout_s)
        except (TimeoutError, Unavailable):
            return False
        return True


def application(
    spec: PromptGuardSpec, log_level: str, log_format: str, *, period_s: float
) -> serve.Application:
    """The deployment of the replicas, for the application of the gateways.

    Args:
        spec: folder, number and CPUs of the replicas.
        log_level: level of the replicas' logs.
        log_format: form of the replicas' logs.
        period_s: seconds between two checks of a replica; Serve replaces a replica that is gone.
    """
    deployment = serve.deployment(
        name=NAME,
        num_replicas=spec.replicas,
        ray_actor_options={"num_cpus": spec.cpus},
        max_ongoing_requests=_MAX_CALLS,
        health_check_period_s=period_s,
        graceful_shutdown_wait_loop_s=0.1,
    )(PromptGuardReplica)
    return deployment.bind(spec, log_level, log_format)


def _load(spec: PromptGuardSpec) -> Any:  # noqa: ANN401
    """The classifier; imports torch here, which gateways and the command line do without."""
    from arriero.cluster.replica.prompt_guard import PromptGuard

    return PromptGuard(str(spec.path), threads=spec.threads)


def _first_line(error: Exception) -> str:
    """What went wrong, without the traceback that Ray puts into its text."""
    cause = getattr(error, "cause", None) or error
    return next((line for line in str(cause).splitlines() if line.strip()), type(error).__name__)
