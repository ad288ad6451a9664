"""What `arriero up` waits for, on scripted states of the registry and of Serve. No Ray cluster."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray import serve

from arriero.cluster import app, deploy
from arriero.cluster.spec.deployment import DeploymentSpec
from arriero.shards.errors import Unavailable


class Actor:
    """An actor whose calls give their answer at once."""

    def __init__(self, **answers: Any) -> None:  # noqa: ANN401
        for name, answer in answers.items():
            setattr(self, name, SimpleNamespace(remote=lambda answer=answer: answer))


def spec(**gateway: Any) -> DeploymentSpec:  # noqa: ANN401
    health = {"start_timeout_s": 0.5}
    models = [{"name": "llama", "path": "/m"}]
    return DeploymentSpec.model_validate({"models": models, "gateway": gateway, "health": health})


def wait(
    monkeypatch: pytest.MonkeyPatch, settings: DeploymentSpec, statuses: list[str]
) -> list[str]:
    """Progress of `up` while all groups serve and Serve gives these statuses, the last forever."""
    gateway = SimpleNamespace(linked=("llama-0",), address="g:1", http="g:2")
    snapshot = SimpleNamespace(failures=(), gateways=(gateway,), groups=("llama-0",), progress={})
    left = list(statuses)

    def status() -> SimpleNamespace:
        now = left.pop(0) if len(left) > 1 else left[0]
        return SimpleNamespace(applications={app.NAME: SimpleNamespace(status=now, message="")})

    monkeypatch.setattr(ray, "get", lambda answer, timeout: answer)
    monkeypatch.setattr(serve, "status", status)
    shown: list[str] = []
    registry: Any = Actor(snapshot=snapshot)
    operator: Any = Actor(problems={})
    assert deploy._wait(settings, registry, operator, (), shown.append) == ("g:1", "g:2")
    return shown


def test_up_waits_for_prompt_guard(monkeypatch: pytest.MonkeyPatch) -> None:
    guarded = spec(prompt_guard={"path": "/p"})
    assert wait(monkeypatch, spec(), ["DEPLOYING"]) == []
    shown = wait(monkeypatch, guarded, ["DEPLOYING", "DEPLOYING", "RUNNING"])
    assert shown == ["starting Prompt Guard"] * 2
    with pytest.raises(Unavailable, match="; Prompt Guard does not run"):
        wait(monkeypatch, guarded, ["DEPLOYING"])


@pytest.mark.parametrize(
    ("gateway", "url"),
    [
        ({}, "http://127.0.0.1:8000/console"),
        ({"tls": {"certificate": "c", "key": "k"}}, "https://127.0.0.1:8000/console"),
        ({"http": {"console": False}}, ""),
        ({"http": {"host": "0.0.0.0"}}, ""),
        ({"http": None}, ""),
    ],
)
def test_the_console_that_up_prints(gateway: dict[str, Any], url: str) -> None:
    made = spec(**gateway).gateway
    assert made.console_url("127.0.0.1:8000" if made.http is not None else "") == url
