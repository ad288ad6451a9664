"""Nodes of one cluster as `infra/metal` starts them, on loopback addresses of this machine.

Knows the scripts and the processes that they start; knows nothing of what a test does with them.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import psutil
import yaml

from arriero.cluster.control.admin_client import AdminClient
from arriero.router.proto.arriero.v1 import admin_pb2 as pb
from arriero.shards.errors import ArrieroError

ROOT = Path(__file__).parents[2]
METAL = ROOT / "infra" / "metal"
MODEL = os.environ.get("ARRIERO_TEST_MODEL", "")
HEAD, WORKER = "127.0.0.2", "127.0.0.3"
START_S = 300.0
HEAD_STARTS = 3
_RAY_LOGS = ("gcs_server", "raylet", "raylet.1", "raylet.2")


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
        """Start the head; again where Ray gives up, as systemd does (`Restart=always`).

        A raylet ends itself when its agent takes more than 15 s to start, which happens on a
        machine that is short of CPU time; head.sh ends such a start.
        """
        for _ in range(HEAD_STARTS):
            process = self._head(settings)
            if self.wait_start("head", process):
                return process
            kill_session(process.pid)
        raise AssertionError((self.folder / "head.log").read_text(errors="replace"))

    def _head(self, settings: dict[str, str]) -> subprocess.Popen[bytes]:
        # Ray takes a worker of the same machine for a head that still runs
        (self.folder / "t/ray/ray_current_cluster").unlink(missing_ok=True)
        (self.folder / "head.log").write_bytes(b"")
        return self.run(
            "head", str(METAL / "head.sh"),
            NODE_IP=HEAD, PORT=str(self.gcs_port), CPUS="0", START_LIMIT_S="60", **settings,
        )  # fmt: skip

    def worker(self) -> subprocess.Popen[bytes]:
        process = self.run(
            "worker", str(METAL / "worker.sh"), HEAD=self.gcs, NODE_IP=WORKER, CPUS="2"
        )
        assert self.wait_start("worker", process), (self.folder / "worker.log").read_text()
        return process

    def wait_start(self, name: str, process: subprocess.Popen[bytes]) -> bool:
        """Wait for the end of a node's start; False where it failed."""
        started = "Ray runtime started"
        wait(lambda: self.says(name, started) or process.poll() is not None, f"{name}: no start")
        return self.says(name, started)

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
            # a group or gateway that the machine keeps waiting is not lost
            "health": {
                "start_timeout_s": START_S,
                "drain_s": 5,
                "silence_s": 60,
                "hang_s": 60,
                "timeout_s": 60,
            },
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

    def redis(self) -> dict[str, str]:
        """Start Redis; gives the settings of head.sh for it."""
        port, store = free_port(), self.folder / "redis"
        store.mkdir()
        (self.folder / "password").write_text("secret")
        (self.folder / "redis.conf").write_text(
            f"bind 127.0.0.1\nport {port}\ndir {store}\nappendonly yes\nrequirepass secret\n"
        )
        self.run("redis", "redis-server", str(self.folder / "redis.conf"))
        password = str(self.folder / "password")
        return {"REDIS": f"127.0.0.1:{port}", "REDIS_PASSWORD_FILE": password}

    def up(self, spec: Path) -> pb.Status:
        """Deploy a spec; gives the status of what serves."""
        up = self.run(
            "up", "arriero", "up", str(spec), "--address", self.gcs,
            ARRIERO_STATE=str(self.folder / "state"),
            RAY_AUTH_TOKEN_PATH=str(self.folder / "ray.token"),
        )  # fmt: skip
        assert up.wait(START_S) == 0, (self.folder / "up.log").read_text()
        status = self.status()
        assert status is not None
        return status

    def show_logs(self) -> None:
        """Print the ends of all logs, for a test that failed."""
        ours = sorted(self.folder.glob("*.log"))
        rays = [self.folder / "t/ray/session_latest/logs" / f"{name}.out" for name in _RAY_LOGS]
        for path in (*ours, *rays):
            if path.exists():
                lines = path.read_text(errors="replace").splitlines()[-15:]
                print(f"---- {path.name}", *lines, sep="\n")

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


@contextmanager
def started_machine() -> Iterator[Machine]:
    """A machine of a test's own; its processes end with it."""
    # a short path: Ray's sockets must have names of at most 107 characters
    folder = Path(f"/tmp/arriero-live-{os.getpid()}")
    folder.mkdir(mode=0o700)
    machine = Machine(folder)
    try:
        yield machine
    except BaseException:
        machine.show_logs()
        raise
    finally:
        machine.close()
        shutil.rmtree(folder, ignore_errors=True)
