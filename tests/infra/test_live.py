"""What `infra/` starts, started here: a head with its tables in Redis; Kubernetes' deployer.

Needs real Ray and Redis; takes minutes. The nodes listen at loopback addresses of their own.
"""

from __future__ import annotations

import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from arriero.router.client.client import Client

sys.path.insert(0, str(Path(__file__).parent))
from machine import MODEL, ROOT, Machine, kill_session, started_machine, wait

DEPLOY = ROOT / "infra" / "kubernetes" / "base" / "deploy.sh"
DEPLOYER = "127.0.0.4"
GREEDY = {"max_tokens": 200, "temperature": 0, "ignore_eos": True}
pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not MODEL, reason="ARRIERO_TEST_MODEL names no checkpoint folder"),
]


@pytest.fixture
def machine() -> Iterator[Machine]:
    with started_machine() as machine:
        yield machine


@pytest.mark.skipif(shutil.which("redis-server") is None, reason="no redis-server")
def test_groups_serve_on_without_a_head_that_has_redis(machine: Machine) -> None:
    settings = machine.redis()
    head = machine.head(**settings)
    machine.worker()
    before = machine.up(machine.spec())
    assert len(before.groups) == 1
    gateway = before.gateways[0].address

    with Client(gateway, timeout_s=120) as client:

        def answer() -> list[int]:
            tokens: list[int] = []
            for message in client.generate([1, 2, 3], **GREEDY):
                tokens += [token for output in message.outputs for token in output.token_ids]
            return tokens

        undisturbed = answer()
        tokens: list[int] = []
        for message in client.generate([1, 2, 3], **GREEDY):
            tokens += [token for output in message.outputs for token in output.token_ids]
            if head.poll() is None and len(tokens) > 20:
                kill_session(head.pid)  # GCS, raylet, registry, operator, Serve's controller
                head.wait()
        assert tokens == undisturbed
        assert machine.status() is None, "Admin was on the head"
        assert answer() == undisturbed, "a new request, while there is no head"
        machine.head(**settings)
        back_s = wait(lambda: machine.status() is not None, "Admin does not come back")
        print(f"Admin is back {back_s:.1f} s after the head")
        assert answer() == undisturbed
        after = machine.status()
        assert after is not None
        assert [group.id for group in after.groups] == [group.id for group in before.groups]


def test_the_deployer_deploys_and_rolls_out(machine: Machine) -> None:
    machine.head()
    machine.worker()
    spec = machine.spec()
    settings = {
        "HEAD": machine.gcs,
        "NODE_IP": DEPLOYER,
        "SERVES": str(machine.folder / "serves"),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": (machine.folder / "ray.token").read_text(),
    }
    serves = Path(settings["SERVES"])
    deployer = machine.run("deployer", "bash", str(DEPLOY), str(spec), **settings)
    wait(serves.exists, (machine.folder / "deployer.log").read_text())
    status = machine.status()
    assert status is not None and [model.revision for model in status.models] == [1]
    with Client(status.gateways[0].address, timeout_s=60) as client:
        assert list(client.generate([1, 2, 3], max_tokens=4))
    deployer.send_signal(signal.SIGTERM)
    deployer.wait(30)
    assert machine.status() is not None, "what serves does not end with the pod that deployed it"

    machine.spec(limits={"max_sequences": 7})
    machine.run("deployer", "bash", str(DEPLOY), str(spec), **settings)
    wait(serves.exists, "the rollout does not end")
    status = machine.status()
    assert status is not None and [model.revision for model in status.models] == [2]
