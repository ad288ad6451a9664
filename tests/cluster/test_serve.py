"""The application under Ray Serve's own commands, as its users type them."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import openai
import pytest
import yaml

from arriero.cluster.hosts import local_cluster as local
from arriero.cluster.hosts import ray_access
from arriero.cluster.spec.deployment import RaySpec
from support.eventually import eventually, eventually_async

sys.path.insert(0, str(Path(__file__).parents[1] / "chaos"))
from load import Load

MODEL = os.environ.get("ARRIERO_TEST_MODEL", "")
NUM_STREAMS, NUM_TOKENS = 8, 40
DASHBOARD = "http://127.0.0.1:8265"
pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not MODEL, reason="ARRIERO_TEST_MODEL names no checkpoint folder"),
]
# prints the addresses of the gateways whenever they change
FOLLOW = """
import json, sys, time
import ray
from arriero.cluster.connection import connect_driver
from arriero.cluster.registry import registry
connect_driver(sys.argv[1])
last = None
while True:
    try:
        snapshot = ray.get(registry.connect().snapshot.remote())
        now = [entry.address for entry in snapshot.gateways if entry.linked]
    except ray.exceptions.RayError:
        now = []
    if now != last:
        print(json.dumps(now), flush=True)
        last = now
    time.sleep(0.2)
"""


class Cluster:
    """A cluster of a test's own, and Serve's commands on it."""

    def __init__(self, folder: Path, **ray: object) -> None:
        self.folder = folder
        self._local = local.start(RaySpec.model_validate({"num_cpus": 8} | ray))
        self.address = local.wait_address(self._local)
        self.environment = ray_access.changed(os.environ, self._local.access) | {
            "RAY_ADDRESS": self.address,
            "OMP_NUM_THREADS": "1",
        }

    def close(self) -> None:
        local.stop(self._local)

    def start(self, *args: str) -> subprocess.Popen[str]:
        """A command of Serve's that goes on; its output is in `serve.log`."""
        with (self.folder / "serve.log").open("a") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "ray.serve.scripts", *args],
                env=self.environment, stdout=log, stderr=log, text=True, cwd=self.folder,
            )  # fmt: skip

    def serve(self, *args: str, check: bool = True) -> str:
        """A command of Serve's that ends; gives its output."""
        done = subprocess.run(
            [sys.executable, "-m", "ray.serve.scripts", *args],
            env=self.environment, capture_output=True, text=True, timeout=180, cwd=self.folder,
        )  # fmt: skip
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    def statuses(self) -> dict[str, str]:
        """The states of the applications, by name, as `serve status` says."""
        status = yaml.safe_load(self.serve("status", "--address", DASHBOARD))
        return {name: entry["status"] for name, entry in status["applications"].items()}


@contextmanager
def started_cluster(folder: Path, **ray: object) -> Iterator[Cluster]:
    cluster = Cluster(folder, **ray)
    try:
        yield cluster
    finally:
        cluster.close()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


def write_spec(folder: Path, *, groups: int = 1, gateways: int = 1, **limits: int) -> Path:
    path = folder / "arriero.yaml"
    model = {
        "name": "demo", "path": MODEL, "dtype": "float32", "kv": {"memory": "64MiB"},
        "threads": 1, "groups": groups, "limits": limits,
    }  # fmt: skip
    text = {"models": [model], "gateway": {"port": 0, "count": gateways, "drain_s": 5}}
    path.write_text(yaml.safe_dump(text))
    return path


def test_serve_run_answers_through_serves_own_proxy(tmp_path: Path) -> None:
    """`serve run` has not connected to Ray when it builds the application."""
    write_spec(tmp_path)
    port = free_port()
    with started_cluster(tmp_path) as cluster:
        cluster.serve("start", "--http-host", "127.0.0.1", "--http-port", str(port))
        running = cluster.start("run", "arriero.cluster.app:application", "spec=arriero.yaml")
        try:
            ask_through_the_proxy(f"http://127.0.0.1:{port}/v1", running, tmp_path / "serve.log")
        finally:
            running.send_signal(signal.SIGINT)
            try:
                code = running.wait(180)
            finally:
                running.kill()
        assert code == 0, (tmp_path / "serve.log").read_text()


def test_serve_run_refuses_wrong_arguments(tmp_path: Path) -> None:
    write_spec(tmp_path)
    with started_cluster(tmp_path) as cluster:
        run = ("run", "arriero.cluster.app:application")
        assert "give spec=PATH" in cluster.serve(*run, "path=arriero.yaml", check=False)
        said = cluster.serve(*run, "spec=arriero.yaml", "digest=0123456789ab", check=False)
        assert digest_of(tmp_path / "arriero.yaml")[:12] in said
        write_spec(tmp_path, groups=400)
        said = cluster.serve(*run, "spec=arriero.yaml", check=False)
        assert "`groups`=400 exceeds" in said, said


def ask_through_the_proxy(base_url: str, running: subprocess.Popen[str], log: Path) -> None:
    def models() -> bool:
        assert running.poll() is None, log.read_text()
        try:
            return bool(ask.models.list().data)
        except openai.APIError:
            return False

    with openai.OpenAI(base_url=base_url, api_key="none", max_retries=0) as ask:
        eventually(models, 180, every_s=0.3, state=log.read_text)
        stream = ask.chat.completions.create(
            model="demo",
            messages=[{"role": "user", "content": "What is the capital of France?"}],
            temperature=0,
            max_completion_tokens=24,
            stream=True,
        )
        said = [chunk.choices[0].delta.content or "" for chunk in stream]
        assert "Paris" in "".join(said) and len(said) > 3
        with pytest.raises(openai.BadRequestError, match="lower `max_tokens`"):
            ask.completions.create(model="demo", prompt="a", max_tokens=10**6)


def digest_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def deploy(cluster: Cluster, port: int) -> None:
    """`serve deploy` with the spec as it is now."""
    args = {"spec": str(cluster.folder / "arriero.yaml")}
    application = {
        "name": "arriero",
        "route_prefix": "/",
        "import_path": "arriero.cluster.app:application",
        "args": args | {"digest": digest_of(cluster.folder / "arriero.yaml")},
    }
    config = {
        "http_options": {"host": "127.0.0.1", "port": port},
        "applications": [application],
    }
    path = cluster.folder / "serve.yaml"
    path.write_text(yaml.safe_dump(config))
    cluster.serve("deploy", str(path), "--address", DASHBOARD)


@pytest.mark.slow
async def test_serve_deploy_takes_a_changed_spec_under_streams(tmp_path: Path) -> None:
    write_spec(tmp_path, groups=2, gateways=2, max_model_len=1024)
    port = free_port()
    with started_cluster(tmp_path, dashboard=True) as cluster:
        deploy(cluster, port)
        await until_running(cluster)
        follower = subprocess.Popen(
            [sys.executable, "-c", FOLLOW, cluster.address],
            env=cluster.environment, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        load = Load([], NUM_STREAMS, NUM_TOKENS)
        following = threading.Thread(target=follow, args=(follower, load), daemon=True)
        following.start()
        try:
            await eventually_async(lambda: len(load.addresses) == 2, 120)
            before = list(load.addresses)
            await load.learn()
            load.start()
            assert await asyncio.to_thread(longest, port) == 1024
            begun_s = time.monotonic()
            write_spec(tmp_path, groups=2, gateways=2, max_model_len=512)
            await asyncio.to_thread(deploy, cluster, port)
            await eventually_async(
                lambda: len(load.addresses) == 2 and not set(load.addresses) & set(before), 300
            )
            await until_running(cluster)
            took_s = time.monotonic() - begun_s
            assert await asyncio.to_thread(longest, port) == 512, "the changed spec is not taken"
            finished = load.report.finished
            await eventually_async(lambda: load.report.finished > finished + NUM_STREAMS, 120)
        finally:
            report = await load.stop()
            follower.kill()
            following.join()
            follower.communicate()
        print(json.dumps({
            "streams at once": NUM_STREAMS, "seconds of the change": round(took_s, 1),
            "finished": report.finished, "lost": len(report.lost), "wrong": len(report.wrong),
        }))  # fmt: skip
        assert not report.lost and not report.wrong


def follow(follower: subprocess.Popen[str], load: Load) -> None:
    assert follower.stdout is not None
    for line in follower.stdout:
        if addresses := json.loads(line):
            load.addresses = addresses


async def until_running(cluster: Cluster) -> None:
    """Wait until `serve status` says that everything runs."""
    limit_s = time.monotonic() + 300
    while (statuses := await asyncio.to_thread(cluster.statuses)) != {"arriero": "RUNNING"}:
        assert time.monotonic() < limit_s, statuses
        assert statuses.get("arriero") != "DEPLOY_FAILED", cluster.serve("status")
        await asyncio.sleep(1)


def longest(port: int) -> int:
    """`limits.max_model_len` of the deployment, as a refusal through Serve's proxy names it."""
    with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none") as ask:
        with pytest.raises(openai.BadRequestError) as caught:
            ask.completions.create(model="demo", prompt="a", max_tokens=10**6)
    (limit,) = {limit for limit in (512, 1024) if str(limit) in str(caught.value)}
    return limit
