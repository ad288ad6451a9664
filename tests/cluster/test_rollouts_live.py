"""Rollouts and drained nodes on a live cluster of a head and two nodes, which all tests share."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml
from chaos.machines import Machines

from arriero.cluster import deployment_file as state
from arriero.cluster.hosts import local_cluster as local
from arriero.router.proto.arriero.v1 import inference_pb2 as pb
from arriero.router.proto.arriero.v1 import inference_pb2_grpc
from support.command import arriero
from support.eventually import eventually
from support.wishes import make_model

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1200)]


@dataclass
class Served:
    """A deployment of the model `m`."""

    folder: Path
    model: Path
    environment: dict[str, str]

    def run(self, *args: str, code: int = 0) -> str:
        """Run a command; returns its output."""
        ended = arriero(
            *args, folder=self.folder, check=False, environment=self.environment, timeout_s=500
        )
        assert ended.returncode == code, ended.stderr
        return ended.stdout + ended.stderr

    def status(self) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(self.run("status", "--json"))
        return answer

    def groups(self, model: str = "m") -> list[dict[str, Any]]:
        """The groups of a model that serve."""
        groups = self.status()["groups"]
        return [group for group in groups if (group["model"], group["phase"]) == (model, "serving")]

    def spec(self, *more: dict[str, Any], **fields: Any) -> str:  # noqa: ANN401
        """A spec file: `m` with these fields, and further models."""
        base = {"path": str(self.model), "device": "cpu", "dtype": "float32", "cpus_per_slice": 2}
        base |= {"kv": {"memory": "8MiB"}}
        models = [base | {"name": "m"} | fields, *(base | other for other in more)]
        path = self.folder / "arriero.yaml"
        path.write_text(yaml.safe_dump({"models": models, "gateway": {"port": 0}}))
        return str(path)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("state")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local, "START_LIMIT_S", 300.0)  # on machines that are busy
        machines = Machines()
    try:
        for _ in range(2):
            machines.add(3)
        model = make_model(folder / "model")
        served = Served(folder, model, machines.environment)
        served.run("up", served.spec(), "--address", machines.address)
        yield served
        served.run("down")
    finally:
        machines.close()


def test_a_dry_run_tells_and_changes_nothing(served: Served) -> None:
    before = served.groups()
    said = served.run("rollout", "--dry-run", served.spec(kv={"memory": "16MiB"}))
    assert "models[m].kv.memory: 8388608 -> 16777216 (by restart)" in said
    assert "m: 1 groups restart one after the other (settings), revision 2" in said
    assert "a successor starts before a group stops; fits: 1 of at most 2 groups" in said
    after = served.groups()  # counters move on: a canary token every few seconds
    same = ("id", "pid", "slice_pids", "revision", "blocks_total")
    assert [[group[name] for name in same] for group in after] == [
        [group[name] for name in same] for group in before
    ]
    assert served.status()["models"][0]["revision"] == 1


def test_a_rollout_that_is_not_ready_in_time_is_taken_back(served: Served) -> None:
    (before,) = served.groups()
    spec = served.spec(kv={"memory": "24MiB"})
    said = served.run("rollout", spec, "--deadline", "1", code=1)
    assert "not ready within 1 s" in said and "revision 1 is current again" in said
    (after,) = served.groups()
    assert (after["id"], after["slice_pids"]) == (before["id"], before["slice_pids"])
    assert "rollback" in served.run("events")


def test_a_rollout_to_labels_of_no_node_is_refused(served: Served) -> None:
    (before,) = served.groups()
    spec = served.spec(placement={"labels": {"rack": "nowhere"}})
    said = served.run("rollout", spec, code=2)
    assert "`placement.labels` {rack: nowhere} fits none of the 3 nodes" in said
    (after,) = served.groups()
    assert (after["id"], after["slice_pids"]) == (before["id"], before["slice_pids"])


def test_models_come_and_go_by_rollout(served: Served) -> None:
    (before,) = served.groups()
    served.run("rollout", served.spec({"name": "n"}))
    assert len(served.groups("n")) == 1
    said = served.run("rollout", served.spec(), code=2)
    assert "the spec lacks `n`, which serves" in said
    served.run("rollout", served.spec(), "--prune")
    status = served.status()
    assert [model["model"] for model in status["models"]] == ["m"]
    assert [group["id"] for group in status["groups"]] == [before["id"]]


def test_a_paused_rollout_keeps_the_groups(served: Served) -> None:
    (before,) = served.groups()
    served.run("rollout", served.spec(kv={"memory": "16MiB"}), "--no-wait")
    served.run("rollout", "pause", "m")
    eventually(lambda: len(served.groups()) == 2, 120, every_s=0.5)
    assert "the rollout is paused" in served.run("status")
    served.run("rollout", "resume", "m")
    (after,) = served.groups()
    assert after["id"] != before["id"]
    spec = yaml.safe_load(served.run("get", "spec"))
    assert spec["models"][0]["kv"]["memory"] == 16 * 2**20


def test_a_drained_node_hands_its_groups_over(served: Served) -> None:
    deployment = state.read(served.folder)
    assert deployment is not None
    (before,) = served.groups()
    node = before["slice_nodes"][0]
    tokens: list[int] = []

    def stream() -> None:
        with grpc.insecure_channel(deployment.gateway) as channel:
            stub = inference_pb2_grpc.InferenceStub(channel)
            sampling = pb.SamplingParams(temperature=0.0, max_tokens=400, ignore_eos=True)
            request = pb.GenerateRequest(text="the", sampling=sampling)
            for answer in stub.Generate(request, timeout=240):
                tokens.extend(token for one in answer.outputs for token in one.token_ids)

    reader = threading.Thread(target=stream)
    reader.start()
    served.run("node", "drain", node)
    (after,) = served.groups()
    assert after["slice_nodes"] != [node] and after["id"] != before["id"]
    reader.join()
    assert len(tokens) == 400
    nodes = json.loads(served.run("get", "nodes", "-o", "json"))
    assert [each["address"] for each in nodes if each["draining"]] == [node]
    said = served.run("scale", "m", "2", code=2)  # the other node has room for one
    assert "`groups`=2 exceeds 1" in said
    assert "takes groups again" in served.run("node", "undrain", node)
