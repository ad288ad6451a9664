"""A deployment of a few groups on a Ray cluster of its own, whose parts are killed."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from chaos.machines import Machines

from arriero.cluster import deployment_file as state
from arriero.cluster.control.admin_client import AdminClient
from arriero.cluster.hosts import local_cluster as local
from arriero.router.proto.arriero.v1 import admin_pb2 as pb
from arriero.shards.errors import ArrieroError
from support.command import arriero
from support.eventually import eventually
from support.tiny_chat import write_tiny_chat

START_S = 600.0
"""Limit for starts on machines that are busy."""

HEALTH = {"timeout_s": 60, "silence_s": 60, "hang_s": 60, "start_timeout_s": START_S}
"""Killed processes are noticed at once; a busy machine makes living processes slow."""


@dataclass
class TinyDeployment:
    """A running deployment.

    Attributes:
        folder: state folder.
        environment: variables of commands and drivers on the cluster.
        deployment: the state file's content.
        admin: client of Admin.
        num_groups: groups of a whole deployment.
        num_gateways: gateways of a whole deployment.
        kills: what was killed so far, in order.
    """

    folder: Path
    environment: Mapping[str, str]
    deployment: state.Deployment
    admin: AdminClient
    num_groups: int
    num_gateways: int
    kills: list[str] = field(default_factory=list)

    def gateways(self) -> list[pb.GatewayStatus]:
        """The gateways that run; a dead gateway may be listed until its lease ends."""
        gateways = self.admin.status().gateways
        return [gateway for gateway in gateways if psutil.pid_exists(gateway.pid)]

    def groups(self) -> list[pb.GroupStatus]:
        """The groups that serve."""
        return [group for group in self.admin.status().groups if group.phase == "serving"]

    def urls(self) -> list[str]:
        """HTTP addresses of the gateways, for clients of OpenAI's API."""
        return [f"http://{gateway.http}/v1" for gateway in self.gateways()]

    def wait_whole(self, within_s: float = START_S) -> None:
        """Wait until all gateways and groups are there."""

        def is_whole() -> bool:
            try:
                groups, gateways = self.groups(), self.gateways()
            except ArrieroError:
                return False
            return (len(groups), len(gateways)) == (self.num_groups, self.num_gateways)

        eventually(is_whole, within_s, every_s=0.5, state=self.admin.status)

    def kill_gateway(self, rng: random.Random) -> None:
        """Kill any gateway."""
        self._kill("gateway", rng.choice(self.gateways()).pid)

    def kill_group(self, rng: random.Random) -> None:
        """Kill the leader or a slice of any group."""
        group = rng.choice(self.groups())
        self._kill("group", rng.choice([group.pid, *group.slice_pids]))

    def _kill(self, kind: str, pid: int) -> None:
        os.kill(pid, signal.SIGKILL)
        self.kills.append(kind)


@contextmanager
def tiny_deployment(
    folder: Path,
    checkpoint: Path,
    *,
    names: Sequence[str] = ("tiny",),
    groups: int = 2,
    gateway: dict[str, Any] | None = None,
    real: bool = False,
) -> Iterator[TinyDeployment]:
    """A deployment of tiny random models.

    Args:
        folder: empty folder for state, models and spec.
        checkpoint: folder whose tokenizer the models have.
        names: of the models; each has weights of its own.
        groups: groups of each model.
        gateway: fields of the spec's section.
        real: serve the checkpoint itself under each of the names.
    """
    gateways = {"port": 0, "count": 2} | (gateway or {})
    models = [
        {
            "name": name,
            "path": str(
                checkpoint if real else write_tiny_chat(folder / name, checkpoint, seed=seed)
            ),
            "groups": groups,
            "dtype": "float32",
            "threads": 1,
            "kv": {"memory": "128MiB" if real else "32MiB"},
        }
        for seed, name in enumerate(names)
    ]
    spec = folder / "arriero.yaml"
    spec.write_text(yaml.safe_dump({"models": models, "gateway": gateways, "health": HEALTH}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local, "START_LIMIT_S", START_S)
        machines = Machines(head_cpus=16)
    environment = machines.environment

    def run(*args: str, attempts: int = 1) -> None:
        for attempt in range(1, attempts + 1):
            result = arriero(
                *args, folder=folder, check=False, timeout_s=START_S, environment=environment
            )
            if not result.returncode:
                return
            assert attempt < attempts, result.stderr

    try:
        # Ray waits a minute for its own actors; on a busy machine they are there at the next try
        run("up", str(spec), "--address", machines.address, attempts=5)
        deployment = state.read(folder)
        assert deployment is not None
        with AdminClient.of(deployment) as admin:
            num_groups, num_gateways = groups * len(names), int(gateways["count"])
            running = TinyDeployment(
                folder, environment, deployment, admin, num_groups, num_gateways
            )
            running.wait_whole()
            yield running
        run("down")
    finally:
        machines.close()
