"""Everything is killed, stopped and changed under running streams; no token may be lost.

`CHAOS_ROUNDS` says how often each fault is injected: 1 by default; 20 is the long form.
`CHAOS_SPARES` has so many groups stand by for those that are lost.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import pytest_asyncio
import yaml

from arriero.cluster import state
from arriero.cluster.admin_client import AdminClient
from arriero.router.proto.arriero.v1 import admin_pb2 as pb
from arriero.shards.errors import ArrieroError

sys.path.insert(0, str(Path(__file__).parent))
from load import Load
from machines import Machines

MODEL = os.environ.get("ARRIERO_TEST_MODEL", "")
ROUNDS = int(os.environ.get("CHAOS_ROUNDS", "1"))
SPARES = int(os.environ.get("CHAOS_SPARES", "0"))
NUM_STREAMS = 32
NUM_TOKENS = 40
CRASH_S, HANG_S = 2.0, 5.0
pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.skipif(not MODEL, reason="ARRIERO_TEST_MODEL names no checkpoint folder"),
]


@dataclass
class Deployed:
    """A deployment of two groups on nodes of their own, under load."""

    machines: Machines
    folder: Path
    spec: Path
    admin: AdminClient
    load: Load
    results: list[dict[str, object]]

    def arriero(self, *args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "arriero.cluster.cli", *args],
            env=os.environ | {"ARRIERO_STATE": str(self.folder), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=True,
            timeout=240,
        )

    async def status(self) -> pb.Status | None:
        try:
            return await asyncio.to_thread(self.admin.status)
        except ArrieroError:
            return None

    async def whole(self, limit_s: float = 120.0) -> pb.Status:
        """Wait for full capacity."""
        deadline_s = time.monotonic() + limit_s
        while True:
            now = await self.status()
            if now is not None and len(now.gateways) == 2 and all(m.settled for m in now.models):
                self.load.addresses = [one.address for one in now.gateways]
                return now
            assert time.monotonic() < deadline_s, now
            await asyncio.sleep(0.2)


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def deployed(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Deployed]:
    folder = tmp_path_factory.mktemp("chaos")
    machines = Machines()
    try:
        for _ in range(2):
            machines.add(num_cpus=4)
        spec = folder / "arriero.yaml"
        model = {
            "name": "demo", "path": MODEL, "groups": 2, "mesh": {"pp": 2}, "threads": 1,
            "kv": {"memory": "192MiB"}, "spares": SPARES,
        }  # fmt: skip
        text = {
            "models": [model],
            "gateway": {"port": 0, "http": None, "count": 2},
            "health": {"drain_s": 60},
            "ray": {"address": machines.address},
        }
        spec.write_text(yaml.safe_dump(text))
        deployed = Deployed(machines, folder, spec, None, None, [])  # type: ignore[arg-type]
        deployed.arriero("up", str(spec))
        noted = state.read(folder)
        assert noted is not None
        deployed.admin = AdminClient.of(noted)
        now = await asyncio.to_thread(deployed.admin.status)
        deployed.load = Load([one.address for one in now.gateways], NUM_STREAMS, NUM_TOKENS)
        await deployed.whole()
        await deployed.load.learn()
        deployed.load.start()
        yield deployed
        report = await deployed.load.stop()
        print(json.dumps(deployed.results, indent=1))
        print(f"finished {report.finished}, lost {len(report.lost)}, wrong {len(report.wrong)}")
        deployed.admin.close()
        deployed.arriero("down")
        assert (report.lost, report.wrong) == ([], [])
        assert report.finished > NUM_STREAMS
    finally:
        machines.close()


def actor(name: str, status: pb.Status) -> int:
    """The process of a named actor of the deployment's own."""
    for one in psutil.process_iter(["cmdline"]):
        if any(part.startswith(f"ray::{name}") for part in one.info["cmdline"] or ()):
            return one.pid
    raise AssertionError(f"no process of actor {name}")


Find = Callable[[pb.Status], int]
FAULTS: dict[str, tuple[Find, signal.Signals, float | None, str]] = {
    # what is hit, with what, how soon it must be seen, and a word of what `why` says
    "slice": (lambda s: s.groups[0].slice_pids[1], signal.SIGKILL, CRASH_S, "slice 1 (pid {pid}"),
    "first slice": (
        lambda s: s.groups[1].slice_pids[0], signal.SIGKILL, CRASH_S, "slice 0 (pid {pid}",
    ),
    "leader": (lambda s: s.groups[0].pid, signal.SIGKILL, CRASH_S, "leader is gone (pid {pid}"),
    "slice hangs": (
        lambda s: s.groups[1].slice_pids[1], signal.SIGSTOP, HANG_S, "slice 1 (pid {pid}",
    ),
    "leader hangs": (
        lambda s: s.groups[0].pid, signal.SIGSTOP, HANG_S, "silent",
    ),
    "gateway": (lambda s: s.gateways[0].pid, signal.SIGKILL, None, ""),
    "registry": (lambda s: actor("Registry", s), signal.SIGKILL, None, ""),
    "operator": (lambda s: actor("Operator", s), signal.SIGKILL, None, ""),
    "controller": (lambda s: actor("ServeController", s), signal.SIGKILL, None, ""),
}  # fmt: skip


@pytest.mark.parametrize("fault", [name for name in FAULTS for _ in range(ROUNDS)])
async def test_a_fault_under_load(deployed: Deployed, fault: str) -> None:
    find, sign, limit_s, said = FAULTS[fault]
    before = await deployed.whole()
    await asyncio.sleep(2)
    begun = len(deployed.load.report.lost), len(deployed.load.report.wrong)
    pid = find(before)
    at = time.time()
    os.kill(pid, sign)
    result: dict[str, object] = {"fault": fault}
    if limit_s is not None:
        lost = await first_loss(deployed, at)
        result["detected_s"] = round(lost.at - at, 2)
        why = await asyncio.to_thread(deployed.admin.why, lost.who)
        result["why"] = why.failure.cause
    else:
        await asyncio.sleep(2)
    await deployed.whole()
    result["whole_s"] = round(time.time() - at, 1)
    deployed.results.append(result)
    print(json.dumps(result), flush=True)
    report = deployed.load.report
    assert report.lost[begun[0] :] == []
    assert report.wrong[begun[1] :] == []
    if limit_s is not None:
        assert said.format(pid=pid) in str(result["why"])
        assert float(str(result["detected_s"])) <= limit_s


async def test_a_raylet_dies_under_load(deployed: Deployed) -> None:
    before = await deployed.whole()
    begun = len(deployed.load.report.lost), len(deployed.load.report.wrong)
    node = before.groups[0].node
    at = time.time()
    deployed.machines.kill_raylet(node)
    lost = await first_loss(deployed, at)
    why = await asyncio.to_thread(deployed.admin.why, lost.who)
    await asyncio.to_thread(deployed.machines.add, 4)
    await deployed.whole()
    result = {
        "fault": "raylet",
        "detected_s": round(lost.at - at, 2),
        "why": why.failure.cause,
        "whole_s": round(time.time() - at, 1),
    }
    deployed.results.append(result)
    print(json.dumps(result), flush=True)
    report = deployed.load.report
    assert (report.lost[begun[0] :], report.wrong[begun[1] :]) == ([], [])
    assert f"node {node} is gone" in why.failure.cause
    assert lost.at - at <= CRASH_S


async def test_a_rolling_update_under_load(deployed: Deployed, tmp_path: Path) -> None:
    await changed(deployed, "rollout", "rollout", "--force")


async def test_a_drain_under_load(deployed: Deployed) -> None:
    now = await deployed.whole()
    await changed(deployed, "drain", "drain", now.groups[0].slot)


@pytest.mark.parametrize("groups", [1, 3, 1, 2])
async def test_scaling_under_load(deployed: Deployed, groups: int) -> None:
    await changed(deployed, f"scale to {groups}", "scale", "demo", str(groups))


async def changed(deployed: Deployed, name: str, *command: str) -> None:
    """Run a command that changes the deployment; nobody may notice."""
    await deployed.whole()
    begun = len(deployed.load.report.lost), len(deployed.load.report.wrong)
    at = time.time()
    await asyncio.to_thread(deployed.arriero, *command)
    result = {"change": name, "took_s": round(time.time() - at, 1)}
    deployed.results.append(result)
    print(json.dumps(result), flush=True)
    report = deployed.load.report
    assert (report.lost[begun[0] :], report.wrong[begun[1] :]) == ([], [])


async def first_loss(deployed: Deployed, since: float) -> pb.Event:
    """The first loss that is recorded after a moment."""
    deadline_s = time.monotonic() + 30
    while True:
        try:
            events = await asyncio.to_thread(deployed.admin.events)
        except ArrieroError:
            events = []
        for one in events:
            if one.kind == "lost" and one.at > since:
                return one
        assert time.monotonic() < deadline_s, "no loss was recorded"
        await asyncio.sleep(0.2)
