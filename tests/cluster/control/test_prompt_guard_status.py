"""Prompt Guard in the status of a deployment, from scripted states of Serve. No Ray cluster."""

from __future__ import annotations

import io
import threading

import pytest
from ray import serve
from ray.exceptions import ActorDiedError
from ray.serve._private.common import DeploymentStatus, DeploymentStatusTrigger, ReplicaState
from ray.serve.exceptions import RayServeException
from ray.serve.schema import (
    ApplicationStatus,
    ApplicationStatusOverview,
    DeploymentStatusOverview,
    ServeStatus,
)
from rich.console import Console

from arriero.cluster import app
from arriero.cluster.commands.views import status_view
from arriero.cluster.control import prompt_guard_status
from arriero.cluster.control.prompt_guard_status import fill_prompt_guard
from arriero.cluster.replica import prompt_guard_service
from arriero.cluster.spec.deployment import DeploymentSpec
from arriero.router.proto.arriero.v1 import admin_pb2 as pb

MESSAGE = """The deployment failed to start 2 times in a row. Error:
Traceback (most recent call last):
  File "prompt_guard.py", line 1
CheckpointError: /models/prompt-guard: no classifier of prompts
"""


def spec(replicas: int) -> DeploymentSpec:
    gateway = {"prompt_guard": {"path": "/p", "replicas": replicas}} if replicas else {}
    models = [{"name": "m", "path": "/m"}]
    return DeploymentSpec.model_validate({"models": models, "gateway": gateway})


def serve_status(message: str = "", **states: int) -> ServeStatus:
    deployment = DeploymentStatusOverview(
        status=DeploymentStatus.UNHEALTHY if message else DeploymentStatus.HEALTHY,
        status_trigger=DeploymentStatusTrigger.UNSPECIFIED,
        replica_states={ReplicaState(name): count for name, count in states.items()},
        message=message,
    )
    application = ApplicationStatusOverview(
        status=ApplicationStatus.RUNNING,
        message="",
        last_deployed_time_s=0.0,
        deployments={prompt_guard_service.NAME: deployment},
    )
    return ServeStatus(applications={app.NAME: application})


def shown(status: pb.Status) -> str:
    console = Console(file=io.StringIO(), width=240)
    console.print(status_view(status))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize(
    ("seen", "running", "line"),
    [
        (serve_status(RUNNING=2), 2, "Prompt Guard: 2 of 2 processes run\n"),
        (serve_status(RUNNING=1, STARTING=1), 1, "Prompt Guard: 1 of 2 processes run\n"),
        (serve_status(STARTING=2), 0, "0 of 2 processes run; `on_loss` of each policy decides\n"),
        (serve_status(MESSAGE, STARTING=2), 0, "decides: The deployment failed to start 2 times"),
        (ServeStatus(), 0, "Prompt Guard: 0 of 2 processes run"),
    ],
)
async def test_the_status_names_prompt_guard(
    monkeypatch: pytest.MonkeyPatch, seen: ServeStatus, running: int, line: str
) -> None:
    monkeypatch.setattr(serve, "status", lambda: seen)
    status = pb.Status()
    await fill_prompt_guard(status, spec(2))
    assert (status.prompt_guard.running, status.prompt_guard.replicas) == (running, 2)
    text = "\n".join(row.rstrip() for row in shown(status).splitlines()) + "\n"
    assert line in text
    assert ("no classifier of prompts" in text) is ("failed" in text)


@pytest.mark.parametrize("error", [RayServeException("no controller"), ActorDiedError(), None])
async def test_the_status_does_without_serve(
    monkeypatch: pytest.MonkeyPatch, error: Exception | None
) -> None:
    ended = threading.Event()

    def read() -> ServeStatus:
        if error is not None:
            raise error
        ended.wait(60)
        return ServeStatus()

    monkeypatch.setattr(serve, "status", read)
    monkeypatch.setattr(prompt_guard_status, "_LIMIT_S", 0.1)
    status = pb.Status()
    try:
        await fill_prompt_guard(status, spec(2))
    finally:
        ended.set()
    assert not status.prompt_guard.HasField("running")
    assert "Prompt Guard: Ray Serve gives no status now" in shown(status)


async def test_a_deployment_without_prompt_guard_asks_serve_nothing() -> None:
    status = pb.Status()
    await fill_prompt_guard(status, spec(0))
    assert not status.HasField("prompt_guard") and "Prompt Guard" not in shown(status)
