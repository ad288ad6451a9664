"""The head's GCS is killed again and again under streams: with Redis nothing is lost.

`HEAD_KILLS` says how often (2 by default, 10 for the long form); each kill prints a line. Without
Redis the cluster is empty after a kill: `arriero up` starts again, in the seconds printed. Needs
real Ray and Redis; takes a minute for each kill. The test starts the head again, as systemd and
KubeRay do.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import pytest

from arriero.cluster import deployment_file
from arriero.cluster.hosts import local_cluster
from arriero.router.client.client import Client
from support.command import arriero

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "chaos"))
from load import Load, Report
from machine import MODEL, Machine, kill_session, started_machine, wait

KILLS = int(os.environ.get("HEAD_KILLS", "2"))
NUM_STREAMS, NUM_TOKENS = 16, 60
LEAST_FINISHED = 5
"""Streams that must end while there is no head, so that a kill has streams to disturb."""
HEAD_END_S, ADMIN_BACK_S, SERVE_S = 60.0, 240.0, 180.0
GREEDY = {"max_tokens": 20, "temperature": 0, "ignore_eos": True}
pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(not MODEL, reason="ARRIERO_TEST_MODEL names no checkpoint folder"),
]


@dataclass(frozen=True)
class Kill:
    """One kill of the GCS.

    Attributes:
        head_ended_s: seconds until all processes of the head had ended.
        finished_without: streams that ended, right, while there was no head.
        head_back_s: seconds from the start of the head until Ray said that it runs.
        admin_back_s: seconds from there until Admin answered.
        lost, wrong: streams until now that ended in an error, or differ from an undisturbed run.
    """

    head_ended_s: float
    finished_without: int
    head_back_s: float
    admin_back_s: float
    lost: int
    wrong: int


def _name(pid: int) -> str:
    try:
        return psutil.Process(pid).name()
    except psutil.NoSuchProcess:  # ended meanwhile
        return ""


def kill_gcs(session: int) -> None:
    """`kill -9` of the GCS of a session, and of nothing else."""
    pids = [pid for pid in local_cluster.members(session) if _name(pid) == "gcs_server"]
    assert len(pids) == 1, pids
    os.kill(pids[0], signal.SIGKILL)


@pytest.mark.skipif(shutil.which("redis-server") is None, reason="no redis-server")
async def test_streams_outlive_every_gcs() -> None:
    with started_machine() as machine:
        await kill_under_streams(machine)


async def kill_under_streams(machine: Machine) -> None:
    settings = machine.redis()
    head = machine.head(**settings)
    machine.worker()
    before = machine.up(machine.spec(limits={"max_sequences": NUM_STREAMS}))
    load = Load([gateway.address for gateway in before.gateways], NUM_STREAMS, NUM_TOKENS)
    await load.learn()
    load.start()
    kills = []
    try:
        for _ in range(KILLS):
            kill, head = await kill_and_start(machine, head, load.report, settings)
            kills.append(kill)
            print(json.dumps(asdict(kill)), flush=True)
    finally:
        report = await load.stop()
    after = machine.status()
    print(json.dumps({
        "kills": len(kills), "streams at once": NUM_STREAMS, "finished": report.finished,
        "lost": len(report.lost), "wrong": len(report.wrong),
    }))  # fmt: skip
    assert not report.lost and not report.wrong
    assert after is not None
    assert [group.id for group in after.groups] == [group.id for group in before.groups]
    assert after.gateways[0].pid == before.gateways[0].pid


async def kill_and_start(
    machine: Machine, head: subprocess.Popen[bytes], report: Report, settings: dict[str, str]
) -> tuple[Kill, subprocess.Popen[bytes]]:
    """Kill the GCS, wait until the head has ended, and start the head again."""
    begun_s, finished = time.monotonic(), report.finished
    kill_gcs(head.pid)
    await asyncio.to_thread(head.wait, HEAD_END_S)
    kill_session(head.pid)  # as systemd does with what a unit leaves behind
    ended_s = time.monotonic()
    while report.finished < finished + LEAST_FINISHED:
        assert time.monotonic() < ended_s + SERVE_S, "no stream ends without a head"
        await asyncio.sleep(0.2)
    finished_without = report.finished - finished
    starting_s = time.monotonic()
    again = await asyncio.to_thread(machine.head, **settings)
    started_s = time.monotonic()
    back_s = await asyncio.to_thread(
        wait, lambda: machine.status() is not None, "Admin does not come back", ADMIN_BACK_S
    )
    return Kill(
        head_ended_s=round(ended_s - begun_s, 1),
        finished_without=finished_without,
        head_back_s=round(started_s - starting_s, 1),
        admin_back_s=round(back_s, 1),
        lost=len(report.lost),
        wrong=len(report.wrong),
    ), again


def test_up_works_after_a_head_without_redis(tmp_path: Path) -> None:
    flags = ("up", "--model", MODEL, "--port", "0", "--name", "demo", "--kv-memory", "64MiB")

    def answer() -> list[int]:
        deployment = deployment_file.read(tmp_path)
        assert deployment is not None
        with Client(deployment.gateway, timeout_s=120) as client:
            messages = list(client.generate([1, 2, 3], **GREEDY))
        return [token for message in messages for one in message.outputs for token in one.token_ids]

    took_s: dict[str, float] = {}
    try:
        begun_s = time.monotonic()
        arriero(*flags, folder=tmp_path, timeout_s=400)
        took_s["the first up"] = time.monotonic() - begun_s
        undisturbed = answer()
        deployment = deployment_file.read(tmp_path)
        assert deployment is not None and deployment.local_session is not None
        kill_gcs(deployment.local_session)
        begun_s = time.monotonic()
        said = arriero("status", folder=tmp_path, check=False)
        took_s["status says that the head is gone"] = time.monotonic() - begun_s
        assert said.returncode == 3 and "head" in said.stderr and "arriero down" in said.stderr
        begun_s = time.monotonic()
        arriero(*flags, folder=tmp_path, timeout_s=400)
        took_s["up over the rest"] = time.monotonic() - begun_s
        assert answer() == undisturbed
        assert not local_cluster.members(deployment.local_session), "the rest is removed"
    finally:
        arriero("down", folder=tmp_path)
    print(json.dumps({name: round(seconds, 1) for name, seconds in took_s.items()}))
