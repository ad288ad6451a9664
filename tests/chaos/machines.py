"""A Ray cluster of several nodes on this machine, each at a loopback address of its own."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys

import psutil

from arriero.cluster.hosts import local_cluster as local
from arriero.cluster.hosts import ray_access
from arriero.cluster.spec.deployment import RaySpec
from support.eventually import eventually


class Machines:
    """A head at 127.0.0.2 (or where it is told), and nodes beside it."""

    def __init__(self, head_cpus: int = 1, head: str = "127.0.0.2") -> None:
        self._head = local.start(RaySpec(num_cpus=head_cpus, node_address=head))
        try:
            self.address = local.wait_address(self._head)
        except BaseException:
            local.stop(self._head)
            raise
        self.environment = {"RAY_AUTH_TOKEN": self._head.token}  # of those who join the cluster
        self._next = 3
        self._nodes: dict[str, subprocess.Popen[bytes]] = {}

    def add(self, num_cpus: int, address: str | None = None, inside: str | None = None) -> str:
        """Start a node, in the network namespace `inside` if one is named; gives its address."""
        if address is None:
            address = f"127.0.0.{self._next}"
            self._next += 1
        command = [
            *(() if inside is None else ("ip", "netns", "exec", inside)),
            *(sys.executable, "-m", "ray.scripts.scripts", "start", "--block"),
            *("--address", self.address, "--node-ip-address", address),
            *("--num-cpus", str(num_cpus), "--object-store-memory", str(80 * 10**6)),
            *("--disable-usage-stats", "--include-log-monitor", "false"),
        ]
        environment = ray_access.changed(os.environ, self._head.access)
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
        path = self._head.folder / f"node-{address}.log"
        with path.open("w") as log:
            self._nodes[address] = subprocess.Popen(
                command, env=environment, stdout=log, stderr=log, start_new_session=True
            )
        eventually(lambda: self.raylets(address), 60, every_s=0.1, state=path.read_text)
        return address

    def raylets(self, address: str) -> list[psutil.Process]:
        """The raylet processes of a node."""
        found = []
        for one in psutil.Process(self._nodes[address].pid).children(recursive=True):
            try:
                if one.name() == "raylet":
                    found.append(one)
            except psutil.NoSuchProcess:
                continue
        return found

    def processes(self) -> list[psutil.Process]:
        """All processes of all nodes."""
        found = []
        for session in (self._head.session, *(one.pid for one in self._nodes.values())):
            for pid in local.members(session):
                with contextlib.suppress(psutil.NoSuchProcess):
                    found.append(psutil.Process(pid))
        return found

    def close(self) -> None:
        """End all of them, and what they started."""
        for node in self._nodes.values():
            for pid in local.members(node.pid):
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            node.wait()
        local.stop(self._head)
