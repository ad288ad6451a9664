"""Ten thousand made outputs, each cut at random: the calls that went in, and no more content."""

from __future__ import annotations

import json
import random

import pytest

from arriero.router.tools import Content, Event, ToolCall, ToolCallParser
from support.made_outputs import TOOLS, make

NUM_OUTPUTS = 10_000
NUM_CUTTINGS = 3
PARTS = 10


def parse(text: str, edges: list[int]) -> list[Event]:
    parser = ToolCallParser(TOOLS)
    events: list[Event] = []
    start = 0
    for end in edges:
        events += parser.add(text[start:end])
        start = end
    return events + parser.add(text[start:], final=True)


def cuttings(draw: random.Random, size: int) -> list[list[int]]:
    cut = [[], list(range(1, size))]
    for _ in range(NUM_CUTTINGS):
        cut.append(sorted(draw.sample(range(size + 1), draw.randint(1, min(size, 12)))))
    return cut


def check(seed: int) -> None:
    draw = random.Random(seed)
    made = make(draw)
    for edges in cuttings(draw, len(made.text)):
        events = parse(made.text, edges)
        where = f"seed {seed}, cut at {edges}: {made.text!r} gave {events}"
        content = "".join(one.text for one in events if isinstance(one, Content))
        assert content == made.content, where
        found = [one for one in events if not isinstance(one, Content)]
        assert all(isinstance(one, ToolCall) for one in found), where
        calls = [(one.name, json.loads(one.arguments)) for one in found]  # type: ignore[union-attr]
        assert calls == made.calls, where


@pytest.mark.parametrize("part", range(PARTS))
def test_streamed_is_whole_and_nothing_leaks(part: int) -> None:
    for seed in range(part, NUM_OUTPUTS, PARTS):
        check(seed)
