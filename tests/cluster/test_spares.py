"""A group that stands by takes the place of one that is lost."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
import yaml

from arriero.cluster import deployment_file as state
from arriero.cluster.control.admin_client import AdminClient
from arriero.router.client.client import Client
from arriero.router.proto.arriero.v1 import admin_pb2 as pb
from support.command import arriero
from support.eventually import eventually

MODEL = os.environ.get("ARRIERO_TEST_MODEL", "")
pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.timeout(400),
    pytest.mark.skipif(not MODEL, reason="ARRIERO_TEST_MODEL names no checkpoint folder"),
]


def until(admin: AdminClient, good: object, limit_s: float = 60.0) -> pb.Status:
    assert callable(good)

    def status() -> pb.Status | None:
        now = admin.status()
        return now if good(now) else None

    now = eventually(status, limit_s, every_s=0.05, state=admin.status)
    assert now is not None
    return now


def whole(status: pb.Status) -> bool:
    return all(model.settled for model in status.models)


def whole_again(admin: AdminClient, before: pb.Status) -> dict[str, float]:
    """Kill a slice of the group that serves; seconds until each event, and until all is whole."""
    (serving,) = [one for one in before.groups if one.phase == "serving"]
    os.kill(serving.slice_pids[1], signal.SIGKILL)
    begun_s = time.time()
    until(admin, lambda now: whole(now) and serving.id not in {one.id for one in now.groups})
    took = {one.kind: round(one.at - begun_s, 2) for one in admin.events() if one.at > begun_s}
    return took | {"whole": round(time.time() - begun_s, 2)}


def test_a_lost_group_comes_back_sooner_with_a_spare(tmp_path: Path) -> None:
    spec = tmp_path / "arriero.yaml"
    model = {
        "name": "demo", "path": MODEL, "mesh": {"pp": 2}, "threads": 1, "kv": {"memory": "64MiB"}
    }  # fmt: skip
    text = {
        "models": [model],
        "gateway": {"port": 0, "http": None},
        "ray": {"num_cpus": 8},
    }
    spec.write_text(yaml.safe_dump(text))
    try:
        arriero("up", str(spec), folder=tmp_path)
        noted = state.read(tmp_path)
        assert noted is not None
        with AdminClient.of(noted) as admin, Client(noted.gateway, timeout_s=60) as client:
            asked = {"max_tokens": 150, "ignore_eos": True, "temperature": 0}
            right = [t for one in client.generate("Once", **asked) for t in tokens(one)]
            without = whole_again(admin, until(admin, whole))

            model["spares"] = 1
            spec.write_text(yaml.safe_dump(text))
            arriero("reload", str(spec), folder=tmp_path)
            ready = until(admin, lambda now: now.models[0].standing_by == 1)
            assert "1 of 1 spares stand by" in arriero("status", folder=tmp_path).stdout
            assert {one.seat: one.phase for one in ready.groups} == {
                "demo-0": "serving", "demo-1": "standby",
            }  # fmt: skip
            stream = client.generate("Once", **asked)
            got = tokens(next(stream))
            with_spare = whole_again(admin, ready)
            got += [t for one in stream for t in tokens(one)]
            assert got == right
            print(json.dumps({"seconds": {"without": without, "with a spare": with_spare}}))
            assert with_spare["whole"] < without["whole"]

            # the lost group's place is the spare's now
            later = until(admin, lambda now: now.models[0].standing_by == 1)
            assert {one.seat: one.phase for one in later.groups} == {
                "demo-0": "standby", "demo-1": "serving",
            }  # fmt: skip
            (failure,) = [one for one in later.failures if one.seat == "demo-0"][-1:]
            assert failure.HasField("recovered_s")
            arriero("scale", "demo", "2", folder=tmp_path)
            assert admin.status().models[0].serving == 2
            until(admin, lambda now: now.models[0].standing_by == 1)
    finally:
        arriero("down", folder=tmp_path)


def tokens(message: object) -> list[int]:
    return [t for one in message.outputs for t in one.token_ids]  # type: ignore[attr-defined]
