"""Prompt Guard beside the gateways of a live cluster: its verdicts, its death and its return."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

from arriero.router.tenants.keys import add_key
from support.eventually import eventually
from support.marked_classifier import CONTEXT, MARK, write_marked_classifier
from support.tiny_deployment import TinyDeployment, tiny_deployment

MODEL = os.environ.get("ARRIERO_TEST_MODEL", "")
LIMIT_S = 600.0
TIMEOUT_S = 15.0
"""`timeout_s` of the policies."""
POLICIES: dict[str, dict[str, Any]] = {
    "closed": {"prompt_guard": {"input": "refuse"}, "on_loss": "closed"},
    "open": {"prompt_guard": {"input": "refuse"}, "on_loss": "open"},
    "notes": {"prompt_guard": {"input": "annotate"}},
}
"""Safety policies, by tenant."""
pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.timeout(3 * LIMIT_S),
    pytest.mark.skipif(not MODEL, reason="ARRIERO_TEST_MODEL names no checkpoint folder"),
]


@dataclass
class Guarded:
    """A deployment with Prompt Guard, and a client for each tenant."""

    deployed: TinyDeployment
    classifier: Path
    clients: dict[str, openai.OpenAI]

    def ask(self, tenant: str, text: str, **fields: Any) -> Any:  # noqa: ANN401
        """The answer to a question."""
        messages: Any = [{"role": "user", "content": text}]
        fields = {"model": "tiny", "max_tokens": 4} | fields
        return self.clients[tenant].chat.completions.create(messages=messages, **fields)

    def replicas(self) -> list[psutil.Process]:
        """The processes of Prompt Guard on this deployment's node."""
        (gateway,) = self.deployed.gateways()
        raylet = psutil.Process(gateway.pid).parent()
        assert raylet is not None
        found = []
        for process in raylet.children():
            try:
                if any("prompt-guard" in word for word in process.cmdline()):
                    found.append(process)
            except psutil.NoSuchProcess:
                continue
        return found

    def kill(self) -> None:
        """Kill the replica of Prompt Guard."""
        (replica,) = self.replicas()
        os.kill(replica.pid, signal.SIGKILL)

    def wait_judging(self) -> None:
        """Wait until a marked prompt is refused; until then each answer is the policy's rule."""
        started_s, numbers = time.monotonic(), itertools.count()

        def is_judged() -> bool:
            try:
                self.ask("closed", f"Now {MARK} {started_s} {next(numbers)}")
            except openai.BadRequestError as error:
                assert error.code == "content_filter"
                return True
            except openai.InternalServerError as error:
                # a busy machine may have the group replaced as well, which is a 503 too
                assert error.status_code == 503, error
                return False
            raise AssertionError("a marked prompt was answered")

        eventually(is_judged, LIMIT_S, every_s=0.5, state=self.metrics)
        print(f"judged again after {time.monotonic() - started_s:.1f} s", flush=True)

    def metrics(self) -> str:
        """The gateway's metrics."""
        (gateway,) = self.deployed.gateways()
        headers = {"authorization": f"Bearer {self.clients['notes'].api_key}"}
        answer = httpx.get(f"http://{gateway.http}/metrics", headers=headers, timeout=60)
        assert answer.status_code == 200, answer.text
        return answer.text


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    pytest.importorskip("transformers", reason="needs the extra arriero[guard]")
    folder = tmp_path_factory.mktemp("guarded")
    classifier = write_marked_classifier(folder / "prompt-guard")
    keys = folder / "keys.json"
    given = {name: add_key(keys, name) for name in POLICIES}
    safety = {name: policy | {"timeout_s": TIMEOUT_S} for name, policy in POLICIES.items()}
    gateway = {
        "count": 1,
        "prompt_guard": {"path": str(classifier), "cpus": 1},
        "keys": str(keys),
        "tenants": [
            {"name": name, "safety": policy, "metrics": name == "notes"}
            for name, policy in safety.items()
        ],
    }
    with tiny_deployment(folder, Path(MODEL), groups=1, gateway=gateway) as deployed:
        (url,) = deployed.urls()
        clients = {
            name: openai.OpenAI(base_url=url, api_key=key, max_retries=0, timeout=LIMIT_S)
            for name, key in given.items()
        }
        try:
            yield Guarded(deployed, classifier, clients)
        finally:
            for client in clients.values():
                client.close()


def far(text: str) -> str:
    """A text above the classifier's context, with `text` at its end."""
    return " ".join(["word"] * (CONTEXT + 60)) + " " + text


def test_a_harmless_prompt_is_answered_and_a_marked_prompt_is_refused(guarded: Guarded) -> None:
    for text in ("Name a river.", far("river")):
        assert guarded.ask("closed", text).choices[0].finish_reason == "length"
    for text in (f"Please {MARK} now.", far(MARK)):
        for stream in (False, True):
            with pytest.raises(openai.BadRequestError, match="prompt_injection") as refused:
                list(guarded.ask("closed", text, stream=stream))
            assert refused.value.code == "content_filter"


def test_annotations_reach_the_client(guarded: Guarded) -> None:
    for text, flagged in (("Name a lake.", False), (f"Do {MARK} it.", True), (far(MARK), True)):
        (verdict,) = guarded.ask("notes", text).model_extra["safety"]
        assert verdict["subject"] == "input_prompt_guard"
        assert verdict["flagged"] is flagged
        assert verdict.get("score", 0.0) == pytest.approx(float(flagged), abs=0.01)


def test_the_policy_decides_while_prompt_guard_is_gone(guarded: Guarded, tmp_path: Path) -> None:
    """The replica is killed and cannot start again until its folder is back."""
    guarded.ask("closed", "Name a hill.")
    away = shutil.move(guarded.classifier, tmp_path / "away")
    guarded.kill()
    for number in range(2):
        started_s = time.monotonic()
        with pytest.raises(openai.InternalServerError, match="safety check") as refused:
            guarded.ask("closed", f"Name {number} towns.")
        print(refused.value, f"{time.monotonic() - started_s:.1f} s", flush=True)
        assert refused.value.status_code == 503
        assert guarded.ask("open", f"Name {number} {MARK} roads.").choices
        assert (
            guarded.ask("notes", f"Name {number} {MARK} towns.").model_extra.get("safety") is None
        )
        assert time.monotonic() - started_s < 4 * TIMEOUT_S
    assert guarded.ask("closed", "Name a hill.").choices, "its score is kept"
    status = guarded.deployed.admin.status().prompt_guard
    assert (status.running, status.replicas) == (0, 1), status
    assert 'arriero_guard_up{guard="prompt-guard"} 0.0' in guarded.metrics()
    shutil.move(away, guarded.classifier)
    guarded.wait_judging()
    eventually(lambda: 'arriero_guard_up{guard="prompt-guard"} 1.0' in guarded.metrics(), 60)
    status = guarded.deployed.admin.status().prompt_guard
    assert (status.running, status.replicas, status.text) == (1, 1, ""), status


def test_a_killed_replica_is_replaced(guarded: Guarded) -> None:
    """Nothing hangs: each answer during the absence is a verdict or the rule of the policy."""
    (before,) = guarded.replicas()
    guarded.kill()
    guarded.wait_judging()
    (after,) = guarded.replicas()
    assert after.pid != before.pid
    text = guarded.metrics()
    assert 'policy="input_prompt_guard",tenant="closed",verdict="lost"' in text
