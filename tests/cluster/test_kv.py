"""The KV cache of a deployment: kept on disk over a restart, looked into and changed by command."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest

from arriero.cluster import deployment_file as state
from support.command import arriero

MODEL = os.environ.get("ARRIERO_TEST_MODEL", "")
pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(400),
    pytest.mark.skipif(not MODEL, reason="ARRIERO_TEST_MODEL names no checkpoint folder"),
]
SYSTEM = "You are a guide to the towns of the Andes, and answer in few words. " * 12


@contextmanager
def deployed(folder: Path, mesh: str) -> Iterator[Path]:
    spec = folder / "arriero.yaml"
    spec.write_text(
        f"models:\n- name: demo\n  path: {MODEL}\n  dtype: float32\n  mesh: {mesh}\n"
        "  limits: {max_model_len: 1024}\n"
        f"  kv: {{memory: 128MiB, host: 64MiB, disk: {{path: {folder}/kv, size: 256MiB}}}}\n"
        "gateway: {port: 0}\n"
    )
    try:
        arriero("up", str(spec), folder=folder)
        yield folder
    finally:
        arriero("down", folder=folder)


def kv(folder: Path, *args: str) -> dict[str, Any]:
    """The only group's answer."""
    (answer,) = json.loads(arriero("kv", *args, "--json", folder=folder).stdout)
    found: dict[str, Any] = answer
    return found


def ask(folder: Path) -> tuple[str, int]:
    """An answer's text, and how many tokens of its prompt a cache had."""
    deployment = state.read(folder)
    assert deployment is not None
    with openai.OpenAI(base_url=f"http://{deployment.http}/v1", api_key="none") as client:
        answer = client.chat.completions.create(
            model="demo",
            messages=[
                {"role": "system", "content": SYSTEM},
                {"role": "user", "content": "Where is Cusco?"},
            ],
            temperature=0,
            max_completion_tokens=16,
        )
    assert answer.usage is not None and answer.usage.prompt_tokens_details is not None
    return answer.choices[0].message.content or "", (
        answer.usage.prompt_tokens_details.cached_tokens or 0
    )


def test_a_cache_outlives_its_group_and_its_layout(tmp_path: Path) -> None:
    with deployed(tmp_path, "{pp: 1}"):
        text, cached = ask(tmp_path)
        assert cached == 0
        assert ask(tmp_path) == (text, cached := ask(tmp_path)[1])
        assert cached > 150
        pinned = kv(tmp_path, "pin", SYSTEM, "--name", "guide")
        assert pinned["pins"] == [{"name": "guide", "tokens": pinned["changed"]}]
        assert kv(tmp_path, "flush")["changed"] > 0
        assert 150 < ask(tmp_path)[1] <= cached  # what is pinned stayed
        assert not kv(tmp_path, "unpin", "guide")["pins"]
        wrong = arriero("kv", "unpin", "guide", check=False, folder=tmp_path)
        assert wrong.returncode == 4 and "nothing is pinned" in wrong.stderr
        prompts = tmp_path / "prompts.txt"
        prompts.write_text(f"{SYSTEM}\n" + json.dumps("two\nlines of another system prompt") + "\n")
        assert kv(tmp_path, "warm", str(prompts))["changed"] > 200
        found = kv(tmp_path, "stats")
        tiers = {one["tier"]: one for one in found["tiers"]}
        assert tiers["disk"]["used"] > 10 and tiers["device"]["used"] > 10
        (tenant,) = [one for one in found["tenants"] if one["tenant"]]
        assert tenant["cached_tokens"] >= 3 * 150
        assert "tenant" in arriero("kv", "stats", folder=tmp_path).stdout
        assert "down/s" in arriero("kv", "top", "--count", "1", folder=tmp_path).stdout
    with deployed(tmp_path, "{pp: 2}"):
        again, hit = ask(tmp_path)
        assert again == text and hit > 150


def split(folder: Path, prefill_groups: int) -> Path:
    """A spec of two groups."""
    spec = folder / "arriero.yaml"
    spec.write_text(
        f"models:\n- name: demo\n  path: {MODEL}\n  dtype: float32\n"
        f"  groups: 2\n  prefill_groups: {prefill_groups}\n"
        "  limits: {max_model_len: 1024}\n"
        "  kv: {memory: 128MiB, host: 64MiB}\n"
        "gateway: {port: 0}\n"
    )
    return spec


def groups(folder: Path) -> dict[str, dict[str, Any]]:
    """What each group has done so far."""
    answers = json.loads(arriero("kv", "stats", "--json", folder=folder).stdout)
    return {one["group"]: one for one in answers}


def prompt_tokens(one: dict[str, Any]) -> int:
    return sum(int(tenant.get("prompt_tokens", 0)) for tenant in one.get("tenants", ()))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_roles_come_from_the_spec_and_change_without_a_restart(tmp_path: Path) -> None:
    try:
        arriero("up", str(split(tmp_path, 0)), folder=tmp_path)
        arriero("kv", "flush", folder=tmp_path)
        text, _ = ask(tmp_path)
        arriero("kv", "flush", folder=tmp_path)
        before = groups(tmp_path)
        assert len(before) == 2
        arriero("rollout", str(split(tmp_path, 1)), folder=tmp_path)
        deadline = time.monotonic() + 60
        while True:  # roles are told within seconds
            begun = groups(tmp_path)
            assert ask(tmp_path)[0] == text
            done = groups(tmp_path)
            grown = [prompt_tokens(done[one]) - prompt_tokens(begun[one]) for one in done]
            # the second group lays the prompt in again, out of the first one's memory
            if min(grown) > 150:
                break
            arriero("kv", "flush", folder=tmp_path)
            assert time.monotonic() < deadline, "the prompt stays with one group"
        assert done.keys() == before.keys()  # and none of them restarted
        assert sum(int(one.get("loaded", 0)) for one in done.values()) > 0
    finally:
        arriero("down", folder=tmp_path)
