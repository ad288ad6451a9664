"""What `infra/` starts, started here: a head with its tables in Redis; Kubernetes' deployer.

Needs real Ray and Redis; takes minutes. The nodes listen at loopback addresses of their own.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import psutil
import pytest
import yaml

from arriero.cluster.control.admin_client import AdminClient
from arriero.router.client.client import Client
from arriero.router.proto.arriero.v1 import admin_pb2 as pb
from arriero.shards.errors import ArrieroError

ROOT = Path(__file__).parents[2]
METAL = ROOT / "infra" / "metal"
DEPLOY = ROOT / "infra" / "kubernetes" / "base" / "deploy.sh"
MODEL = os.environ.get("ARRIERO_TEST_MODEL", "")
HEAD, WORKER, DEPLOYER = "127.0.0.2", "127.0.0.3", "127.0.0.4"
START_S = 300.0
pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not MODEL, reason="ARRIERO_TEST_MODEL names no checkpoint folder"),
]


def free_port() -> int:
    """A free port that neither the system nor Ray gives to another process meanwhile."""
    while True:
        port = random.randrange(20_000, 32_000)
        with contextlib.suppress(OSError), socket.create_server(("", port)):
            return port


def wait(condition: Callable[[], bool], what: str, limit_s: float = START_S) -> float:
    """Wait for a condition; gives the seconds that it took."""
    start_s = time.monotonic()
    while not condition():
        assert time.monotonic() - start_s < limit_s, what
        time.sleep(0.2)
    return time.monotonic() - start_s


@dataclass
class Machine:
    """Nodes of one cluster, as `infra/metal` starts them, and what runs beside them."""

    folder: Path
    gcs_port: int = field(default_factory=free_port)
    admin_port: int = field(default_factory=free_port)
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def gcs(self) -> str:
        return f"{HEAD}:{self.gcs_port}"

    @property
    def environment(self) -> dict[str, str]:
        binaries = self.folder / "bin"
        if not binaries.exists():
            binaries.mkdir()
            for name, module in (
                ("ray", "ray.scripts.scripts"),
                ("arriero", "arriero.cluster.cli"),
            ):
                path = binaries / name
                path.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m {module} "$@"\n')
                path.chmod(0o755)
        (self.folder / "admin.token").write_text("t" * 64)
        return {
            "PATH": f"{binaries}:{os.environ['PATH']}",
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "HOME": str(self.folder),
            "OMP_NUM_THREADS": "1",
            "TOKEN_FILE": str(self.folder / "ray.token"),
            "TEMP_DIR": str(self.folder / "t" / "ray"),
            "RAY_raylet_start_wait_time_s": str(int(START_S)),  # Ray crashes at a fraction
            "ARRIERO_ADMIN": f"{HEAD}:{self.admin_port}",
            "ARRIERO_ADMIN_TOKEN_FILE": str(self.folder / "admin.token"),
        }

    def run(self, name: str, *command: str, **settings: str) -> subprocess.Popen[bytes]:
        """Start a process in a session of its own; its output goes to `name`.log."""
        log: IO[bytes]
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                command, env=self.environment | settings, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
        self.processes.append(process)
        return process

    def head(self, **settings: str) -> subprocess.Popen[bytes]:
        # Ray takes a worker of the same machine for a head that still runs
        (self.folder / "t/ray/ray_current_cluster").unlink(missing_ok=True)
        (self.folder / "head.log").write_bytes(b"")
        process = self.run(
            "head", str(METAL / "head.sh"),
            NODE_IP=HEAD, PORT=str(self.gcs_port), CPUS="0", **settings,
        )  # fmt: skip
        self.wait_start("head", process)
        return process

    def worker(self) -> subprocess.Popen[bytes]:
        process = self.run(
            "worker", str(METAL / "worker.sh"), HEAD=self.gcs, NODE_IP=WORKER, CPUS="2"
        )
        self.wait_start("worker", process)
        return process

    def wait_start(self, name: str, process: subprocess.Popen[bytes]) -> None:
        """Wait until a node has started; fails at once when its process has ended."""
        log = self.folder / f"{name}.log"
        started = "Ray runtime started"
        wait(lambda: self.says(name, started) or process.poll() is not None, f"{name}: no start")
        assert self.says(name, started), log.read_text(errors="replace")

    def says(self, name: str, text: str) -> bool:
        return text in (self.folder / f"{name}.log").read_text(errors="replace")

    def spec(self, **model: object) -> Path:
        """A spec of one small model."""
        path = self.folder / "arriero.yaml"
        small = {"name": "demo", "path": MODEL, "threads": 1, "kv": {"memory": "128MiB"}}
        text = {
            "models": [small | {"cpus_per_slice": 0.5} | model],
            "gateway": {"host": WORKER, "port": 0, "http": None},
            "admin": {"host": HEAD, "port": self.admin_port},
            "health": {"start_timeout_s": START_S, "drain_s": 5},
        }
        path.write_text(yaml.safe_dump(text))
        return path

    def status(self) -> pb.Status | None:
        """What Admin says; None while it says nothing."""
        with AdminClient(f"{HEAD}:{self.admin_port}", "t" * 64) as admin:
            try:
                return admin.status()
            except ArrieroError:
                return None

    def close(self) -> None:
        for process in reversed(self.processes):
            kill_session(process.pid)
            process.wait()


def kill_session(session: int, but: str = "") -> None:
    """Kill the processes of a session, but those whose command holds a text."""
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == session and not (but and but in process.cmdline()):
                process.kill()
        except (psutil.NoSuchProcess, ProcessLookupError):
            continue


@pytest.fixture
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    # a short path: Ray's sockets must have names of at most 107 characters
    folder = Path(f"/tmp/arriero-live-{os.getpid()}")
    folder.mkdir(mode=0o700)
    machine = Machine(folder)
    try:
        yield machine
    finally:
        machine.close()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.skipif(shutil.which("redis-server") is None, reason="no redis-server")
def test_groups_serve_on_without_a_head_that_has_redis(machine: Machine) -> None:
    port = free_port()
    store = machine.folder / "redis"
    store.mkdir()
    (machine.folder / "password").write_text("secret")
    (machine.folder / "redis.conf").write_text(
        f"bind 127.0.0.1\nport {port}\ndir {store}\nappendonly yes\nrequirepass secret\n"
    )
    machine.run("redis", "redis-server", str(machine.folder / "redis.conf"))
    settings = {
        "REDIS": f"127.0.0.1:{port}",
        "REDIS_PASSWORD_FILE": str(machine.folder / "password"),
    }
    head = machine.head(**settings)
    machine.worker()
    up = machine.run(
        "up", "arriero", "up", str(machine.spec()), "--address", machine.gcs,
        ARRIERO_STATE=str(machine.folder / "state"),
        RAY_AUTH_TOKEN_PATH=str(machine.folder / "ray.token"),
    )  # fmt: skip
    assert up.wait(START_S) == 0, (machine.folder / "up.log").read_text()
    before = machine.status()
    assert before is not None and len(before.groups) == 1
    gateway = before.gateways[0].address

    with Client(gateway, timeout_s=120) as client:

        def answer() -> list[int]:
            tokens: list[int] = []
            for message in client.generate([1, 2, 3], max_tokens=200, ignore_eos=True):
                tokens += [token for output in message.outputs for token in output.token_ids]
            return tokens

        undisturbed = answer()
        tokens: list[int] = []
        for message in client.generate([1, 2, 3], max_tokens=200, ignore_eos=True):
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
