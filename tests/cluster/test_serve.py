"""The application under Ray Serve's own commands: Serve's HTTP proxy in front of it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import openai
import pytest
import yaml

from arriero.cluster.hosts import local_cluster as local
from arriero.cluster.hosts import ray_access
from arriero.cluster.spec.deployment import RaySpec
from support.eventually import eventually

MODEL = os.environ.get("ARRIERO_TEST_MODEL", "")
pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(240),
    pytest.mark.skipif(not MODEL, reason="ARRIERO_TEST_MODEL names no checkpoint folder"),
]
# What `serve run` does, as a driver on a cluster of loopback addresses; in a process of its own,
# since importing Serve warns, and warnings are errors here.
RUN = """
import sys
from ray import serve
from arriero.cluster.app import application
from arriero.cluster.connection import connected
from arriero.cluster.deployment_file import Deployment
ray_address, node_address, port, spec = sys.argv[1:]
with connected(Deployment(ray_address=ray_address, node_address=node_address)):
    serve.start(http_options={"host": "127.0.0.1", "port": int(port)})
    serve.run(application({"spec": spec}), name="arriero", route_prefix="/")
    print("running", flush=True)
    sys.stdin.read()
    serve.delete("arriero")
"""


def test_serve_run_answers_through_serves_own_proxy(tmp_path: Path) -> None:
    spec = tmp_path / "arriero.yaml"
    model = {"name": "demo", "path": MODEL, "dtype": "float32", "kv": {"memory": "64MiB"}}
    spec.write_text(yaml.safe_dump({"models": [model], "gateway": {"port": 0}}))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    cluster = local.start(RaySpec(num_cpus=2))
    try:
        address = local.wait_address(cluster)
        with subprocess.Popen(
            [sys.executable, "-c", RUN, address, cluster.node_address, port, str(spec)],
            env=ray_access.changed(os.environ, cluster.access),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as driver:
            assert driver.stdin is not None and driver.stdout is not None
            try:
                assert driver.stdout.readline().strip() == "running"
                ask_through_the_proxy(f"http://127.0.0.1:{port}/v1")
            finally:
                driver.stdin.close()
        assert driver.returncode == 0
    finally:
        local.stop(cluster)


def ask_through_the_proxy(base_url: str) -> None:
    with openai.OpenAI(base_url=base_url, api_key="none") as ask:
        eventually(lambda: ask.models.list().data, 60, every_s=0.1)
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
