"""Everything is killed, stopped and changed under running streams; no token may be lost.

`CHAOS_ROUNDS` says how often each fault is injected: 1 by default; 20 is the long form. Each round
has all faults, in an order of its own. `CHAOS_SPARES` has so many groups stand by for lost ones.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
import pytest_asyncio
import torch
import yaml
from safetensors.torch import load_file, save_file

from arriero.cluster import deployment_file as state
from arriero.cluster.control.admin_client import AdminClient
from arriero.router.proto.arriero.v1 import admin_pb2 as pb
from arriero.shards.errors import ArrieroError
from support.command import arriero

sys.path.insert(0, str(Path(__file__).parent))
from load import Load
from machines import Machines

MODEL = os.environ.get("ARRIERO_TEST_MODEL", "")
SPARES = int(os.environ.get("CHAOS_SPARES", "0"))
ROUNDS = int(os.environ.get("CHAOS_ROUNDS", "1"))
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
    rng: random.Random = field(default_factory=lambda: random.Random(6))

    def arriero(self, *args: str) -> subprocess.CompletedProcess[str]:
        environment = self.machines.environment
        return arriero(*args, folder=self.folder, timeout_s=240, environment=environment)

    async def status(self) -> pb.Status | None:
        """How it stands now; what it says of gateways, the callers hear too."""
        try:
            now = await asyncio.to_thread(self.admin.status)
        except ArrieroError:
            return None
        if now.gateways:
            self.load.addresses = [one.address for one in now.gateways]
        return now

    async def whole(self, limit_s: float = 120.0) -> pb.Status:
        """Wait for full capacity."""
        deadline_s = time.monotonic() + limit_s
        while True:
            now = await self.status()
            if now is not None and len(living(now)) == 2 and all(m.settled for m in now.models):
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
        spec, weights = folder / "arriero.yaml", folder / "model"
        weights.symlink_to(Path(MODEL).resolve())
        model = {
            "name": "demo", "path": str(weights), "groups": 2, "mesh": {"pp": 2}, "threads": 1,
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
        print(json.dumps(summary(deployed.results), indent=1))
        print(f"finished {report.finished}, lost {len(report.lost)}, wrong {len(report.wrong)}")
        deployed.admin.close()
        deployed.arriero("down")
        assert (report.lost, report.wrong) == ([], [])
        assert report.finished > NUM_STREAMS
    finally:
        machines.close()


def living(now: pb.Status) -> list[int]:
    """The gateways that run; a dead one may be listed until its lease ends."""
    return [one.pid for one in now.gateways if psutil.pid_exists(one.pid)]


def summary(results: list[dict[str, object]]) -> dict[str, object]:
    """The times of each fault: how many, median and worst."""
    found: dict[str, object] = {}
    for name in sorted({str(one["fault"]) for one in results if "fault" in one}):
        hits = [one for one in results if one.get("fault") == name]
        found[name] = {"times": len(hits)} | {
            what: [round(statistics.median(times), 2), max(times)]
            for what in ("detected_s", "whole_s")
            if (times := [float(str(one[what])) for one in hits if what in one])
        }
    return found


def actor(name: str) -> Callable[[Deployed, pb.Status], tuple[int, str]]:
    """The process of a named actor of the deployment's own."""

    def find(deployed: Deployed, _: pb.Status) -> tuple[int, str]:
        for one in deployed.machines.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                if any(part.startswith(f"ray::{name}") for part in one.cmdline()):
                    return one.pid, ""
        raise LookupError(f"no process of actor {name}")

    return find


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong.

    Attributes:
        find: the process that is hit, and a word that `why` must say of it.
        sign: what it is hit with.
        limit_s: how soon it must be seen; None where no group is lost.
        node: whether the node of that process must be made up for.
    """

    find: Callable[[Deployed, pb.Status], tuple[int, str]]
    sign: signal.Signals = signal.SIGKILL
    limit_s: float | None = None
    node: bool = False


def slice_of(group: int, rank: int) -> Callable[[Deployed, pb.Status], tuple[int, str]]:
    def find(_: Deployed, now: pb.Status) -> tuple[int, str]:
        pid = now.groups[group].slice_pids[rank]
        return pid, f"slice {rank} (pid {pid} "

    return find


def raylet(deployed: Deployed, now: pb.Status) -> tuple[int, str]:
    node = now.groups[0].node
    (process,) = deployed.machines.raylets(node)
    return process.pid, f"node {node} is gone"


def plain(find: Callable[[pb.Status], int], said: str = "") -> Callable[..., tuple[int, str]]:
    return lambda _, now: (find(now), said)


FAULTS = {
    "slice": Fault(slice_of(0, 1), limit_s=CRASH_S),
    "first slice": Fault(slice_of(1, 0), limit_s=CRASH_S),
    "slice hangs": Fault(slice_of(1, 1), signal.SIGSTOP, HANG_S),
    "leader": Fault(plain(lambda s: s.groups[0].pid, "leader is gone"), limit_s=CRASH_S),
    "leader hangs": Fault(plain(lambda s: s.groups[0].pid, "silent"), signal.SIGSTOP, HANG_S),
    "raylet": Fault(raylet, limit_s=CRASH_S, node=True),
    "gateway": Fault(plain(lambda s: living(s)[0])),
    "registry": Fault(actor("Registry")),
    "operator": Fault(actor("Operator")),
    "controller": Fault(actor("ServeController")),
}


def rounds() -> list[str]:
    """All faults, so often, each time in another order."""
    rng = random.Random(20)
    return [name for _ in range(ROUNDS) for name in rng.sample(list(FAULTS), len(FAULTS))]


@pytest.mark.parametrize("name", rounds())
async def test_a_fault_under_load(deployed: Deployed, name: str) -> None:
    fault = FAULTS[name]
    await deployed.whole()
    await asyncio.sleep(deployed.rng.uniform(1, 3))
    before = await deployed.whole()
    begun = len(deployed.load.report.lost), len(deployed.load.report.wrong)
    pid, said = fault.find(deployed, before)
    at = time.time()
    os.kill(pid, fault.sign)
    result: dict[str, object] = {"fault": name}
    if fault.limit_s is not None:
        lost = await first_loss(deployed, at)
        result["detected_s"] = round(lost.at - at, 2)
        why = await asyncio.to_thread(deployed.admin.why, lost.who)
        result["why"] = why.failure.cause
    else:
        await replaced(deployed, fault, pid)
    if fault.node:
        await asyncio.to_thread(deployed.machines.add, 4)
    await deployed.whole()
    result["whole_s"] = round(time.time() - at, 1)
    deployed.results.append(result)
    print(json.dumps(result), flush=True)
    report = deployed.load.report
    assert report.lost[begun[0] :] == []
    assert report.wrong[begun[1] :] == []
    if fault.limit_s is not None:
        assert said in str(result["why"])
        assert float(str(result["detected_s"])) <= fault.limit_s


async def test_a_rolling_update_of_weights_under_load(deployed: Deployed) -> None:
    before = deployed.load.learnt
    weights = deployed.folder / "model"
    other_weights(weights.resolve(), deployed.folder / "other")
    (deployed.folder / "next").symlink_to(deployed.folder / "other")
    (deployed.folder / "next").replace(weights)
    await changed(deployed, "rollout of other weights", "rollout")
    await asyncio.sleep(2)
    # every stream ran on the one or the other from its first token to its last
    learnt = await deployed.load.learn()
    assert learnt not in before
    assert deployed.load.report.weights <= before | {learnt}
    assert learnt in deployed.load.report.weights
    assert deployed.load.report.wrong == []


def other_weights(model: Path, other: Path) -> None:
    """The same model, its last norm a little stronger: other answers, by another digest."""
    shutil.copytree(model, other)
    tensors = load_file(other / "model.safetensors")
    norm = tensors["model.norm.weight"]
    tensors["model.norm.weight"] = (norm.float() * torch.linspace(0.9, 1.2, norm.numel())).to(norm)
    save_file(tensors, other / "model.safetensors", {"format": "pt"})


async def test_a_drain_under_load(deployed: Deployed) -> None:
    now = await deployed.whole()
    await changed(deployed, "drain", "drain", now.groups[0].seat)


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


async def replaced(deployed: Deployed, fault: Fault, pid: int) -> None:
    """Another process is there for the one that was killed."""
    deadline_s = time.monotonic() + 60
    while True:
        now = await deployed.status()
        with contextlib.suppress(LookupError):
            if now is not None and fault.find(deployed, now)[0] != pid and len(living(now)) == 2:
                return
        assert time.monotonic() < deadline_s, f"nobody came for process {pid}: {now}"
        await asyncio.sleep(0.2)


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
        assert time.monotonic() < deadline_s, (
            f"no loss was recorded; the last events: {events[-5:]}"
        )
        await asyncio.sleep(0.2)
