"""Groups that come and go by themselves, to zero and back, without an error to anybody."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from arriero.cluster import deploy
from arriero.cluster import deployment_file as state
from arriero.cluster.control.admin_client import AdminClient
from arriero.cluster.spec.load import load
from arriero.router.client.client import AsyncClient
from arriero.router.proto.arriero.v1 import admin_pb2 as pb

sys.path.insert(0, str(Path(__file__).parent))
from load import Load

MODEL = os.environ.get("ARRIERO_TEST_MODEL", "")
pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of Serve's own models
    pytest.mark.skipif(not MODEL, reason="ARRIERO_TEST_MODEL names no checkpoint folder"),
]


async def until(
    admin: AdminClient, there: Callable[[pb.ModelStatus], bool], limit_s: float = 120
) -> float:
    """Wait for a state of the only model; gives how long it took."""
    begun_s = time.monotonic()
    while True:
        (model,) = (await asyncio.to_thread(admin.status)).models
        if there(model):
            return time.monotonic() - begun_s
        assert time.monotonic() - begun_s < limit_s, model
        await asyncio.sleep(0.2)


async def test_up_down_to_zero_and_back(tmp_path: Path) -> None:
    model = {
        "name": "demo", "path": MODEL, "threads": 1, "kv": {"memory": "96MiB"},
        "limits": {"max_sequences": 8},
        "autoscale": {"min": 0, "max": 2, "target": 0.8, "up_s": 2, "down_s": 8},
    }  # fmt: skip
    spec = tmp_path / "arriero.yaml"
    text = {"models": [model], "gateway": {"port": 0, "http": None}, "ray": {"num_cpus": 2}}
    spec.write_text(yaml.safe_dump(text))
    deployment = await asyncio.to_thread(deploy.up, load(spec, {}), tmp_path, print)
    try:
        admin = AdminClient.of(deployment)
        load_of = Load([deployment.gateway], num_streams=24, num_tokens=60)
        await load_of.learn()
        load_of.start()
        up_s = await until(admin, lambda one: one.groups == 2 and one.serving == 2)
        await asyncio.sleep(5)
        report = await load_of.stop()
        assert (report.lost, report.wrong) == ([], [])
        down_s = await until(admin, lambda one: one.groups == 0 and one.settled)
        client = AsyncClient([deployment.gateway], timeout_s=120)
        begun_s = time.monotonic()
        got = [m async for m in client.generate([1, 2, 3], max_tokens=4, ignore_eos=True)]
        await client.close()
        assert got[-1].usage.completion_tokens == 4
        woken_s = time.monotonic() - begun_s
        print(
            f"to 2 groups after {up_s:.1f} s, to 0 after {down_s:.1f} s, woken in {woken_s:.1f} s"
        )
        admin.close()
    finally:
        await asyncio.to_thread(deploy.down, tmp_path, print)
        assert state.read(tmp_path) is None
