"""A gateway's calls to Prompt Guard, on a scripted handle of Serve. No Ray cluster."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from ray.exceptions import ActorDiedError
from ray.serve.exceptions import BackPressureError

from arriero.cluster.replica.gateway import GatewayReplica
from arriero.cluster.replica.prompt_guard_service import PromptGuardReplica, RemotePromptGuard
from arriero.router.observability.guard_metrics import GuardMetrics
from arriero.shards.errors import Unavailable


class Handle:
    """Serve's handle of a deployment whose calls end as scripted.

    Args:
        outcome: what a call gives: scores, an error, or None for no answer at all.
    """

    def __init__(self, outcome: Any) -> None:  # noqa: ANN401
        self._outcome = outcome
        self.num_cancelled = 0
        self.scores = SimpleNamespace(remote=self._call)

    def _call(self, texts: Sequence[str], timeout_s: float) -> Any:  # noqa: ANN401
        handle = self

        class Response:
            def __await__(self) -> Any:  # noqa: ANN401
                return handle._answer().__await__()

            def cancel(self) -> None:
                handle.num_cancelled += 1

        return Response()

    async def _answer(self) -> Any:  # noqa: ANN401
        if self._outcome is None:
            await asyncio.sleep(60)
        if isinstance(self._outcome, Exception):
            raise self._outcome
        return self._outcome


@pytest.mark.parametrize(
    ("outcome", "up", "num_cancelled"),
    [
        ([], True, 0),
        (ActorDiedError(), False, 0),
        (BackPressureError(num_queued_requests=1, max_queued_requests=1), False, 0),
        (None, False, 1),
    ],
)
async def test_a_gateway_sees_whether_prompt_guard_answers(
    outcome: Any,  # noqa: ANN401
    up: bool,
    num_cancelled: int,
) -> None:
    handle = Handle(outcome)
    remote = RemotePromptGuard(handle)
    assert await remote.is_up(0.1) is up
    assert handle.num_cancelled == num_cancelled, "no call stays in Serve's queue"
    if isinstance(outcome, Exception):
        with pytest.raises(Unavailable, match="no scores"):
            await remote(["Hello."], 0.1)


async def test_a_check_waits_for_no_computation() -> None:
    replica = object.__new__(PromptGuardReplica)
    replica._turn = asyncio.Lock()
    async with replica._turn:
        assert await asyncio.wait_for(replica.scores([], 5.0), 5.0) == []


async def test_a_gateway_exports_whether_prompt_guard_answers() -> None:
    registry = CollectorRegistry()
    inference = SimpleNamespace(metrics=SimpleNamespace(guards=GuardMetrics(registry)))
    for outcome, up in (([], 1.0), (ActorDiedError(), 0.0)):
        replica: Any = SimpleNamespace(
            _gateway=SimpleNamespace(inference=inference),
            _prompt_guard=RemotePromptGuard(Handle(outcome)),
        )
        checking = asyncio.create_task(GatewayReplica._check_prompt_guard(replica))
        await asyncio.sleep(0.1)
        assert not checking.done(), "the next check comes"
        checking.cancel()
        labels = {"guard": "prompt-guard"}
        assert registry.get_sample_value("arriero_guard_up", labels) == up
    replica = SimpleNamespace(_prompt_guard=None)
    await asyncio.wait_for(GatewayReplica._check_prompt_guard(replica), 5.0)


def test_the_metric() -> None:
    registry = CollectorRegistry()
    metrics = GuardMetrics(registry)
    labels = {"guard": "prompt-guard"}
    assert registry.get_sample_value("arriero_guard_up", labels) is None
    for up in (True, False):
        metrics.set_up("prompt-guard", up=up)
        assert registry.get_sample_value("arriero_guard_up", labels) == up
