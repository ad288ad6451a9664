"""A slice's link loses 30 % of its packets and delays the others by 200 ms, under load.

`CHAOS_ROUNDS` says how often, in one deployment: 1 by default; 20 is the long form.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from arriero.cluster import deployment_file as state
from arriero.cluster.control.admin_client import AdminClient
from arriero.shards.errors import ArrieroError

sys.path.insert(0, str(Path(__file__).parent))
from bad_link import HERE, NAME, NAMESPACE, THERE, BadLink
from load import Load
from machines import Machines

MODEL = os.environ.get("ARRIERO_TEST_MODEL", "")
ROUNDS = int(os.environ.get("CHAOS_ROUNDS", "1"))
BAD_S = 15.0
WHOLE_S = 60.0
NUM_STREAMS = 8
pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(not MODEL, reason="ARRIERO_TEST_MODEL names no checkpoint folder"),
    pytest.mark.skipif(
        os.geteuid() != 0 or shutil.which("ip") is None or not Path("/dev/net/tun").exists(),
        reason="needs root, ip and /dev/net/tun",
    ),
]


async def test_a_bad_link_under_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", NAME)
    environment = os.environ | {"ARRIERO_STATE": str(tmp_path), "OMP_NUM_THREADS": "1"}
    cli = [sys.executable, "-m", "arriero.cluster.cli"]
    spec = tmp_path / "arriero.yaml"
    model = {
        "name": "demo", "path": MODEL, "mesh": {"pp": 2}, "threads": 1, "cpus_per_slice": 2,
        "kv": {"memory": "192MiB"},
    }  # fmt: skip
    link = BadLink()
    machines = Machines(head_cpus=3, head=HERE)
    environment |= machines.environment
    try:
        gateway = {"port": 0, "http": None}
        text = {"models": [model], "gateway": gateway, "ray": {"address": machines.address}}
        spec.write_text(yaml.safe_dump(text))
        # the gateway finds one node only; the second slice waits for the other
        with subprocess.Popen([*cli, "up", str(spec)], env=environment) as up:
            await asyncio.sleep(12)
            await asyncio.to_thread(machines.add, 2, THERE, NAMESPACE)
            assert await asyncio.to_thread(up.wait) == 0
        noted = state.read(tmp_path)
        assert noted is not None
        with AdminClient.of(noted) as admin:
            groups = (await asyncio.to_thread(admin.status)).groups
            assert set(groups[0].slice_nodes) == {HERE, THERE}
            load = Load([noted.gateway], NUM_STREAMS, 32)
            await load.learn()
            load.start()
            for _ in range(ROUNDS):
                print(json.dumps(await once(admin, link, load)), flush=True)
            report = await asyncio.wait_for(load.stop(), 180)
        print(f"finished {report.finished}, lost {report.lost}, wrong {report.wrong}")
        assert (report.lost, report.wrong) == ([], [])
        assert report.finished >= NUM_STREAMS
        subprocess.run([*cli, "down"], env=environment, check=True, timeout=120)
    finally:
        machines.close()
        link.close()


async def once(admin: AdminClient, link: BadLink, load: Load) -> dict[str, object]:
    """The link is bad for a while, and good again until streams end as before."""
    await asyncio.sleep(3)
    at, before = time.time(), load.report.finished
    link.worsen(loss=0.3, delay_s=0.2)
    await asyncio.sleep(BAD_S)
    meanwhile = load.report.finished - before
    link.worsen(loss=0.0, delay_s=0.0)
    good = time.time()
    deadline_s = time.monotonic() + WHOLE_S
    while load.report.finished < before + meanwhile + NUM_STREAMS:
        assert time.monotonic() < deadline_s, "no stream ends on the link that is good again"
        await asyncio.sleep(0.2)
    told: dict[str, object] = {"finished_meanwhile": meanwhile}
    told["whole_s"] = round(time.time() - good, 1)
    try:
        why = (await asyncio.to_thread(admin.why)).failure
    except ArrieroError:
        return told | {"cause": None}  # nothing has failed yet: it got through
    if why.at < at:
        return told | {"cause": None}
    return told | {"cause": why.cause, "seen_s": round(why.at - at, 1)}
