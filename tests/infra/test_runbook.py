"""A walk through the runbook: each alert is provoked on a real deployment, each command is run.

A real Prometheus scrapes the gateways and evaluates `infra/prometheus/rules.yaml`, with shorter
durations alone: the walk would take a day. When an alert fires, the commands of its entry are run
as they stand there, with names in place of MODEL, GROUP, SPEC and N. Needs real Ray; takes minutes.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import pytest
import yaml

from arriero.cluster import deployment_file
from arriero.cluster.control.admin_client import AdminClient
from arriero.router.client.client import Client
from arriero.router.proto.arriero.v1 import admin_pb2 as pb
from arriero.shards.errors import ArrieroError
from support.command import arriero
from support.eventually import eventually

sys.path.insert(0, str(Path(__file__).parent))
from fast_prometheus import INFRA, Prometheus
from pages import commands_in

MODEL = os.environ.get("ARRIERO_TEST_MODEL", "")
RUNBOOK = (INFRA / "runbook.md").read_text()
NOT_RUN = {
    "kubectl": "there is no Kubernetes",
    "ray": "`ray stop` ends every cluster of the machine",
}
"""Programs of the runbook that the walk does not run, and why."""
FIRE_S, COMMAND_S = 180.0, 300.0
NOT_FOUND = 4
pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.timeout(3000),
    pytest.mark.skipif(not MODEL, reason="ARRIERO_TEST_MODEL names no checkpoint folder"),
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="no prometheus (Debian)"),
]


def entries() -> dict[str, str]:
    """The entries of the runbook by name; "" has the commands to begin with."""
    parts = re.split(r"^## (.+)$", RUNBOOK, flags=re.MULTILINE)
    return {"": parts[0]} | dict(zip(parts[1::2], parts[2::2], strict=True))


@dataclass
class Walk:
    """The deployment, its Prometheus, and the commands that were run.

    Attributes:
        ran: each command that was run, in words.
        fired: seconds until each alert fired.
    """

    folder: Path
    spec: Path
    key: str
    prometheus: Prometheus
    ran: list[str] = field(default_factory=list)
    fired: dict[str, float] = field(default_factory=dict)
    _stopping: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)

    def status(self) -> pb.Status:
        deployment = deployment_file.read(self.folder)
        assert deployment is not None
        with AdminClient.of(deployment) as admin:
            return admin.status()

    def group(self, model: str) -> pb.Group:
        """A group of a model that serves; waits for it."""

        def serving() -> pb.Group | None:
            groups = [group for group in self.status().groups if group.phase == "serving"]
            return next((group for group in groups if group.seat.startswith(f"{model}-")), None)

        group = eventually(serving, 240, every_s=0.3, state=self.status)
        assert group is not None
        return group

    def provoke(self, *alerts: str, act: Callable[[], None] = lambda: None) -> None:
        """Repeat `act` until alerts fire, then run the commands of their entries."""
        begun_s = time.monotonic()
        waiting = set(alerts)
        while waiting:
            assert time.monotonic() - begun_s < FIRE_S, f"{waiting} do not fire"
            act()
            for name in waiting & self.prometheus.firing():
                self.fired[name] = round(time.monotonic() - begun_s, 1)
            waiting -= set(self.fired)
            time.sleep(0.5)
        for name in alerts:
            self.follow(name)

    def follow(self, entry: str) -> None:
        """Run the commands of an entry that were not run yet."""
        for words in commands_in(entries()[entry]):
            if words[0] in NOT_RUN or not words[0].startswith("arriero") or len(words) == 1:
                continue
            if shlex.join(words) not in self.ran and self._run(words):
                self.ran.append(shlex.join(words))

    def _run(self, words: list[str]) -> bool:
        """Run a command; False for a `why` before anything failed. `top` goes on until Ctrl-C."""
        names = {"MODEL": "b", "SPEC": str(self.spec), "N": "1"}
        if "GROUP" in words:
            names["GROUP"] = self.group("b").seat
        args = [names.get(word, word) for word in words[1:]]
        if args == ["top"]:
            done = self._interrupt(args)
        else:
            done = arriero(*args, folder=self.folder, check=False, timeout_s=COMMAND_S)
        if words[1] == "why" and done.returncode == NOT_FOUND:
            assert re.search("no failure|has failed", done.stderr), done.stderr
            return False
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        assert done.stdout.strip() or args[0] == "logs", f"{words} says nothing"
        return True

    def _interrupt(self, args: list[str]) -> subprocess.CompletedProcess[str]:
        """Run a command on a terminal until its first output, then press Ctrl-C."""
        ours, theirs = os.openpty()
        environment = os.environ | {"ARRIERO_STATE": str(self.folder), "TERM": "xterm"}
        with subprocess.Popen(
            [sys.executable, "-m", "arriero.cluster.cli", *args],
            env=environment, stdin=theirs, stdout=theirs, stderr=theirs,
        ) as process:  # fmt: skip
            os.close(theirs)
            said = os.read(ours, 4096)
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(OSError):  # the end of the terminal
                while part := os.read(ours, 4096):
                    said += part
        os.close(ours)
        code = 0 if process.returncode in (0, 130) else process.returncode
        return subprocess.CompletedProcess(args, code, said.decode(errors="replace"), "")

    def stream(self, model: str, count: int, num_tokens: int) -> None:
        """Start so many streams of a model, each followed by the next, until `quiet`."""
        address = self.status().gateways[0].address

        def run() -> None:
            with Client(address, api_key=self.key, timeout_s=120) as client:
                while not self._stopping.is_set():
                    with contextlib.suppress(ArrieroError, grpc.RpcError):
                        fields = {"max_tokens": num_tokens, "ignore_eos": True, "model": model}
                        for _ in client.generate([1, 2, 3], **fields):
                            if self._stopping.is_set():
                                break

        for _ in range(count):
            self._threads.append(threading.Thread(target=run, daemon=True))
            self._threads[-1].start()

    def quiet(self) -> None:
        """End all streams."""
        self._stopping.set()
        for thread in self._threads:
            thread.join(150)
        self._threads.clear()
        self._stopping.clear()


def small(name: str, **more: object) -> dict[str, object]:
    return {"name": name, "path": MODEL, "threads": 1, "kv": {"memory": "64MiB"}} | more


@pytest.fixture(scope="module")
def walk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Walk]:
    folder = tmp_path_factory.mktemp("runbook")
    added = arriero(
        "keys", "add", "ops", "--file", str(folder / "keys.yaml"), "--json", folder=folder
    )
    with socket.create_server(("127.0.0.1", 0)) as probe:
        http = probe.getsockname()[1]
    text = {
        "models": [
            small("a", groups=2, kv={"memory": "256MiB"}, limits={"max_model_len": 1024}),
            # room for a few of its sequences, and for fewer of their tokens
            small("b", kv={"memory": "12MiB"}, limits={"max_sequences": 6, "max_model_len": 400}),
        ],
        "gateway": {
            "port": 0, "http": {"port": http}, "keys": "keys.yaml", "lost_s": 1,
            "tenants": [{"name": "ops", "metrics": True}],
        },
        "health": {"drain_s": 2, "timeout_s": 60},
        "ray": {"num_cpus": 8},
    }  # fmt: skip
    spec = folder / "arriero.yaml"
    spec.write_text(yaml.safe_dump(text))
    prometheus = None
    try:
        arriero("up", str(spec), folder=folder, timeout_s=500)
        prometheus = Prometheus(folder, f"127.0.0.1:{http}")
        yield Walk(folder, spec, json.loads(added.stdout)["key"], prometheus)
    finally:
        if prometheus is not None:
            prometheus.close()
        arriero("down", folder=folder, check=False)


def change(walk: Walk, **health: float) -> None:
    """Write another `health` into the spec, and reload it."""
    text = yaml.safe_load(walk.spec.read_text())
    text["health"] |= health
    walk.spec.write_text(yaml.safe_dump(text))
    arriero("reload", str(walk.spec), folder=walk.folder)


def kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def test_no_metrics(walk: Walk) -> None:
    """The scrape has no key: the targets say 401, as the runbook says."""
    walk.follow("")
    walk.provoke("ArrieroNoMetrics")
    (target,) = walk.prometheus.ask("targets")["activeTargets"]
    assert "401" in target["lastError"]
    walk.prometheus.use_key(walk.key)
    eventually(lambda: "ArrieroNoMetrics" not in walk.prometheus.firing(), 60, every_s=0.5)


def test_too_many_requests_for_the_pool(walk: Walk) -> None:
    walk.stream("b", 24, 380)
    try:
        walk.provoke("ArrieroOverloaded", "ArrieroPreempts")
    finally:
        walk.quiet()


def test_a_group_that_stalls(walk: Walk) -> None:
    """A slice is stopped, with limits so high that its group does not count as lost."""
    change(walk, silence_s=120, hang_s=120)
    group = walk.group("b")
    walk.stream("b", 4, 40)
    eventually(lambda: walk.group("b").running > 0, 60, every_s=0.3)
    os.kill(group.slice_pids[0], signal.SIGSTOP)
    stopped_s = time.monotonic()
    try:
        walk.stream("b", 12, 40)
        eventually(lambda: "ArrieroStalled" in walk.prometheus.firing(), FIRE_S, every_s=0.5)
        time.sleep(max(0.0, stopped_s + 15 - time.monotonic()))
    finally:
        os.kill(group.slice_pids[0], signal.SIGCONT)
    try:
        walk.fired["ArrieroStalled"] = round(time.monotonic() - stopped_s, 1)
        walk.provoke("ArrieroSlowFirstToken")
        walk.follow("ArrieroStalled")
    finally:
        walk.quiet()
        change(walk, silence_s=3, hang_s=4)


def test_a_model_without_a_group(walk: Walk) -> None:
    """A rollout, and a group that is lost again and again, under streams that do not wait."""
    text = yaml.safe_load(walk.spec.read_text())
    text["models"][1]["limits"]["max_sequences"] = 5
    walk.spec.write_text(yaml.safe_dump(text))
    arriero("rollout", str(walk.spec), folder=walk.folder, timeout_s=COMMAND_S)
    walk.stream("b", 4, 40)

    def kill_what_serves() -> None:
        for group in walk.status().groups:
            if group.seat.startswith("b-") and group.phase == "serving":
                kill(group.slice_pids[0])

    try:
        walk.provoke("ArrieroNoGroup", "ArrieroGroupsMissing", act=kill_what_serves)
        walk.provoke("ArrieroRequestsFail", "ArrieroGroupsRestart", act=kill_what_serves)
    finally:
        walk.quiet()
    (expression,) = re.findall(r"`(sum by \(kind\)[^`]+)`", entries()["ArrieroRequestsFail"])
    kinds = {
        series["metric"]["kind"]
        for series in walk.prometheus.ask("query", query=expression)["result"]
    }
    assert "Unavailable" in kinds


def test_streams_that_move(walk: Walk) -> None:
    walk.stream("a", 30, 400)

    def kill_a_group() -> None:
        groups = [group for group in walk.status().groups if group.seat.startswith("a-")]
        if len(groups) == 2 and all(group.phase == "serving" for group in groups):
            time.sleep(2)
            kill(max(groups, key=lambda group: group.running).slice_pids[0])

    try:
        walk.provoke("ArrieroStreamsMove", act=kill_a_group)
    finally:
        walk.quiet()


def test_every_alert_was_provoked_and_every_command_run(walk: Walk) -> None:
    """The last test: without a head, and the sums of the walk."""
    for entry in entries():
        if entry != "Without a head":
            walk.follow(entry)  # `why` of a group that had not failed before
    deployment = deployment_file.read(walk.folder)
    assert deployment is not None and deployment.local_session is not None
    for pid in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            is_ours = os.getsid(int(pid.name)) == deployment.local_session
            if is_ours and (pid / "comm").read_text().strip() == "gcs_server":
                kill(int(pid.name))
    said = arriero("status", folder=walk.folder, check=False)
    assert said.returncode == 3 and "head" in said.stderr
    arriero("up", str(walk.spec), folder=walk.folder, timeout_s=500)  # "Without a head" says so
    walk.ran.append("arriero up")
    print(json.dumps({"fired after seconds": walk.fired, "commands": walk.ran}, indent=1))
    alerts = set(re.findall(r"alert: (\w+)", (INFRA / "prometheus" / "rules.yaml").read_text()))
    assert set(walk.fired) == alerts
    written = {
        shlex.join(words)
        for words in commands_in(RUNBOOK)
        if words[0] not in NOT_RUN and len(words) > 1
    }
    assert written <= set(walk.ran), "a command of the runbook that no entry's walk ran"
