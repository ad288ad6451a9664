"""Weights that leave a simulated device, come back and change: graphs are captured again."""

from __future__ import annotations

from pathlib import Path

import pytest

from arriero.shards.engine.holds import Change, Kind
from support.fake_cuda import simulated
from support.groups import running
from support.models import tiny_llama

from .test_simulated import GREEDY, PROMPTS, config_of, on_cuda, tokens

pytestmark = pytest.mark.slow


def test_tokens_after_a_wake_and_after_a_push(tmp_path: Path) -> None:
    for seed, name in ((3, "a"), (4, "b")):
        tiny_llama(tmp_path / name, seed=seed)
    prompts, params = PROMPTS[:2], [GREEDY] * 2
    config = config_of(tmp_path / "a")
    old = tokens(config, prompts, params)
    new = tokens(config_of(tmp_path / "b"), prompts, params)
    assert old != new
    with simulated() as device, running(on_cuda(config)) as group:
        group.engine.name_weights("first", (), lambda digest: digest.encode())
        captures = device.captures
        assert [answer.tokens for answer in group.generate(prompts, params)] == old
        asleep = group.engine.change(Change(kind=Kind.SLEEP)).result(60)
        assert asleep.weights_bytes == 0
        group.engine.change(Change(kind=Kind.WAKE)).result(300)
        assert device.captures == 2 * captures
        assert [answer.tokens for answer in group.generate(prompts, params)] == old
        push = Change(kind=Kind.PUSH, sources=(str(tmp_path / "b"),))
        group.engine.change(push).result(300)
        assert [answer.tokens for answer in group.generate(prompts, params)] == new
