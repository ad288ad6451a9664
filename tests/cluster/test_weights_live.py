"""Weights pushed into a deployment under load: no answer lost, none mixed, each one named."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import time
import urllib.request
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
from safetensors.torch import load_file, save_file

from arriero.cluster import deployment_file as state
from arriero.router.client.trainer import TrainerGroup
from support import command

MODEL = os.environ.get("ARRIERO_TEST_MODEL", "")
STREAMS, MOST_TOKENS = 16, 24
pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(not MODEL, reason="ARRIERO_TEST_MODEL names no checkpoint folder"),
]


arriero = partial(command.arriero, timeout_s=900)


def up(folder: Path, model: Path | str) -> None:
    """Deploy a group that a busy machine does not count as lost."""
    spec = folder / "arriero.yaml"
    spec.parent.mkdir(exist_ok=True)
    spec.write_text(
        f"models:\n- name: demo\n  path: {model}\n  dtype: float32\n"
        "  limits: {max_model_len: 1024}\n  kv: {memory: 128MiB}\n"
        "gateway: {port: 0}\n"
        "health: {timeout_s: 60, silence_s: 60, hang_s: 300, start_timeout_s: 800}\n"
    )
    arriero("up", str(spec), folder=folder)


@pytest.fixture(scope="module")
def pushed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the same model with other weights: two layers have changed places."""
    folder = tmp_path_factory.mktemp("pushed")
    for file in Path(MODEL).glob("*.json"):
        shutil.copy(file, folder)
    weights = load_file(Path(MODEL) / "model.safetensors")
    swapped = {}
    for name, value in weights.items():
        for here, there in (("layers.3.", "layers.4."), ("layers.4.", "layers.3.")):
            if here in name:
                name = name.replace(here, there)
                break
        swapped[name] = value
    save_file(swapped, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("state")
    try:
        up(folder, MODEL)
        yield folder
    finally:
        arriero("down", folder=folder)


def prompt(number: int) -> str:
    return f"Story {number}. Once upon a time"


class Load:
    """Streams that ask again and again until told to stop."""

    def __init__(self, http: str) -> None:
        self.client = openai.AsyncOpenAI(
            base_url=f"http://{http}/v1", api_key="none", max_retries=0, timeout=600
        )
        self.answers: list[tuple[int, str, set[str], float]] = []
        self.stopping = False

    async def ask(self, number: int) -> tuple[str, set[str]]:
        stream = await self.client.completions.create(
            model="demo",
            prompt=prompt(number),
            max_tokens=MOST_TOKENS,
            temperature=0,
            stream=True,
        )
        text, names = "", set()
        async for chunk in stream:
            if chunk.choices:
                text += chunk.choices[0].text
                names.add(chunk.system_fingerprint or "")
        return text, names

    async def run(self, number: int) -> None:
        while not self.stopping:
            text, names = await self.ask(number)
            self.answers.append((number, text, names, time.monotonic()))


async def under_load(folder: Path, pushed: Path) -> tuple[Load, float, float]:
    deployment = state.read(folder)
    assert deployment is not None
    load = Load(str(deployment.http))
    tasks = [asyncio.create_task(load.run(number)) for number in range(STREAMS)]
    while len(load.answers) < STREAMS:
        await asyncio.sleep(0.1)
    begun_s = time.monotonic()
    await asyncio.to_thread(arriero, "weights", "push", "demo", str(pushed), folder=folder)
    ended_s = time.monotonic()
    at_end = len(load.answers)
    while len(load.answers) < at_end + 2 * STREAMS:
        await asyncio.sleep(0.1)
    load.stopping = True
    await asyncio.gather(*tasks)
    await load.client.close()
    return load, begun_s, ended_s


def memory(folder: Path) -> int:
    """Resident bytes of the slices' processes."""
    (group,) = json.loads(arriero("status", "--json", folder=folder).stdout)["groups"]
    return sum(psutil.Process(int(pid)).memory_info().rss for pid in group["slice_pids"])


def post(folder: Path, path: str, body: dict[str, Any] | None = None) -> Any:  # noqa: ANN401
    deployment = state.read(folder)
    assert deployment is not None
    request = urllib.request.Request(
        f"http://{deployment.http}{path}",
        method="GET" if path.startswith("/is_") else "POST",
        data=None if body is None else json.dumps(body).encode(),
        headers={
            "authorization": f"Bearer {deployment.admin_token}",
            "content-type": "application/json",
        },
    )
    with urllib.request.urlopen(request, timeout=600) as answer:
        text = answer.read()
    return json.loads(text) if text else None


def test_push_under_sixteen_streams(folder: Path, pushed: Path) -> None:
    load, begun_s, ended_s = asyncio.run(under_load(folder, pushed))
    names = {name for *_, each, _ in load.answers for name in each}
    assert len(names) == 2 and "" not in names
    texts: dict[tuple[int, str], set[str]] = {}
    for number, text, each, _ in load.answers:
        assert len(each) == 1, f"story {number} has the names {each}"
        texts.setdefault((number, *each), set()).add(text)
    assert all(len(variants) == 1 for variants in texts.values())
    (new,) = {name for *_, each, at_s in load.answers[-STREAMS:] for name in each}
    first = min(at_s for *_, each, at_s in load.answers if each == {new})
    print(
        f"\n{len(load.answers)} answers, 0 lost, 0 mixed; push {ended_s - begun_s:.1f} s; "
        f"first new answer after {first - begun_s:.1f} s"
    )
    shown = json.loads(arriero("weights", "status", "--json", folder=folder).stdout)
    assert shown["groups"][0]["digest"].startswith(new.removeprefix("fp_"))


def test_answers_equal_those_of_a_fresh_start(folder: Path, pushed: Path, tmp_path: Path) -> None:
    deployment = state.read(folder)
    assert deployment is not None

    async def all_of(http: str) -> list[str]:
        load = Load(http)
        async with load.client:
            return [(await load.ask(number))[0] for number in range(4)]

    after = asyncio.run(all_of(str(deployment.http)))
    before = memory(folder)
    arriero("sleep", "demo", folder=folder)
    asleep = memory(folder)
    assert post(folder, "/is_sleeping") == {"is_sleeping": True}
    arriero("wake", "demo", folder=folder)
    print(f"\nslices: {before >> 20} MiB awake, {asleep >> 20} MiB asleep")
    assert before - asleep > 300 << 20
    assert asyncio.run(all_of(str(deployment.http))) == after
    # a group that starts later has the pushed weights
    (group,) = json.loads(arriero("status", "--json", folder=folder).stdout)["groups"]
    digest = group["digest"]
    os.kill(int(group["slice_pids"][0]), 9)
    deadline_s = time.monotonic() + 300
    while time.monotonic() < deadline_s:
        groups = json.loads(arriero("status", "--json", folder=folder).stdout)["groups"]
        if [g["digest"] for g in groups if g["phase"] == "serving" and g["id"] != group["id"]]:
            break
        time.sleep(1)
    assert [g["digest"] for g in groups if g["phase"] == "serving"] == [digest]
    assert asyncio.run(all_of(str(deployment.http))) == after
    refused = arriero("weights", "push", "demo", str(tmp_path), folder=folder, check=False)
    assert refused.returncode == 5 and "safetensors" in refused.stderr
    assert post(folder, "/update_weights", {"path": MODEL})["status"] == "updated"
    reset = asyncio.run(all_of(str(deployment.http)))
    # the same weights from a trainer's process
    with TrainerGroup(f"http://{deployment.http}", deployment.admin_token) as trainer:
        trainer.push(load_file(pushed / "model.safetensors"), weight_version="7")
    assert asyncio.run(all_of(str(deployment.http))) == after
    arriero("weights", "reset", "demo", folder=folder)
    fresh = tmp_path / "fresh"
    try:
        up(fresh, pushed)
        other = state.read(fresh)
        assert other is not None
        assert asyncio.run(all_of(str(other.http))) == after != reset
    finally:
        arriero("down", folder=fresh)
