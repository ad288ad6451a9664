"""Adapters that come and go in two groups of a live cluster, while streams run."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from chaos.machines import Machines

from arriero.cluster import deployment_file as state
from arriero.cluster.hosts import local_cluster as local
from arriero.router.client.client import Client
from arriero.shards.adapters.adapter import WEIGHTS_FILE
from arriero.shards.errors import NotFound
from support.adapters import write_adapter
from support.command import arriero
from support.eventually import eventually
from support.wishes import make_model

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]

VOCAB = 512
OUTPUT = 200


@dataclass
class Served:
    """Two groups of the model `m`, and a folder of adapters."""

    folder: Path
    gateway: str
    environment: dict[str, str]

    @property
    def root(self) -> Path:
        return self.folder / "adapters"

    def run(self, *args: str, code: int = 0) -> str:
        ended = arriero(
            *args, folder=self.folder, check=False, environment=self.environment, timeout_s=300
        )
        assert ended.returncode == code, ended.stdout + ended.stderr
        return ended.stdout + ended.stderr

    def adapters(self) -> dict[str, int]:
        """Number of groups that serve each adapter."""
        listed = json.loads(self.run("adapters", "list", "--json"))
        return {adapter["name"]: len(adapter.get("groups", [])) for adapter in listed}

    def ask(self, model: str) -> list[int]:
        with Client(self.gateway, timeout_s=120) as client:
            asked: dict[str, Any] = {"max_tokens": OUTPUT, "ignore_eos": True, "temperature": 0}
            return [
                token
                for answer in client.generate("the", model=model, **asked)
                for output in answer.outputs
                for token in output.token_ids
            ]


@contextmanager
def two_groups(folder: Path) -> Iterator[Served]:
    (folder / "adapters").mkdir()
    model = {
        "name": "m",
        "path": str(make_model(folder / "model")),
        "groups": 2,
        "device": "cpu",
        "dtype": "float32",
        "threads": 1,
        "kv": {"memory": "8MiB"},
        "adapter_slots": 2,
        "max_adapter_rank": 8,
        "adapter_root": str(folder / "adapters"),
    }
    spec = folder / "arriero.yaml"
    spec.write_text(yaml.safe_dump({"models": [model], "gateway": {"port": 0, "http": None}}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local, "START_LIMIT_S", 300.0)  # on machines that are busy
        machines = Machines()
    try:
        for _ in range(2):
            machines.add(3)
        up = ("up", str(spec), "--address", machines.address)
        arriero(*up, folder=folder, environment=machines.environment, timeout_s=500)
        deployment = state.read(folder)
        assert deployment is not None
        yield Served(folder, deployment.gateway, machines.environment)
        arriero("down", folder=folder, environment=machines.environment)
    finally:
        machines.close()


@dataclass
class Streams:
    """The same request again and again in threads, until the end of the block."""

    ask: Callable[[], list[int]]
    answers: list[list[int]] = field(default_factory=list)
    errors: list[Exception] = field(default_factory=list)

    @contextmanager
    def running(self, threads: int = 2) -> Iterator[None]:
        stop = threading.Event()

        def work() -> None:
            while not stop.is_set():
                try:
                    self.answers.append(self.ask())
                except Exception as error:
                    self.errors.append(error)

        workers = [threading.Thread(target=work) for _ in range(threads)]
        for worker in workers:
            worker.start()
        try:
            yield
        finally:
            stop.set()
            for worker in workers:
                worker.join()


def test_adapters_come_and_go_while_streams_run(tmp_path: Path) -> None:
    with two_groups(tmp_path) as served:
        base = served.ask("m")
        of_base = Streams(lambda: served.ask("m"))
        with of_base.running():
            poet = write_adapter(served.root / "poet", 1, tables=VOCAB)
            served.run("adapters", "add", "poet", poet.path)
            assert served.adapters() == {"poet": 2}
            right = served.ask("poet")
            assert right != base and len(right) == OUTPUT
            assert [served.ask("poet") for _ in range(6)] == [right] * 6, "groups differ"

            # what a group cannot serve changes nothing, in no group
            write_adapter(served.root / "bad", 2, tables=VOCAB + 1)
            said = served.run("adapters", "add", "bad", str(served.root / "bad"), code=2)
            assert "needs" in said and "bad" not in served.adapters()
            weights = served.root / "poet" / WEIGHTS_FILE
            whole = weights.read_bytes()
            weights.write_bytes(whole[:1000])
            served.run("adapters", "add", "poet", poet.path, "--replace", code=2)
            assert [served.ask("poet") for _ in range(4)] == [right] * 4

            # other files under the name serve from the command's end on
            clerk = write_adapter(served.root / "clerk", 3)
            shutil.copy(Path(clerk.path) / WEIGHTS_FILE, weights)
            served.run("adapters", "add", "poet", poet.path, "--replace")
            other = served.ask("poet")
            assert other not in (right, base)
            assert [served.ask("poet") for _ in range(6)] == [other] * 6

            # a removed adapter ends its running streams, and takes no more
            of_poet = Streams(lambda: served.ask("poet"))
            with of_poet.running():
                eventually(lambda: len(of_poet.answers) >= 2, 60)
                served.run("adapters", "remove", "poet")
                eventually(lambda: of_poet.errors, 60)
            assert all(answer == other for answer in of_poet.answers)
            assert all(isinstance(error, NotFound) for error in of_poet.errors)
            assert served.adapters() == {}
        assert not of_base.errors and all(answer == base for answer in of_base.answers)
        assert len(of_base.answers) > 4
