"""Ten thousand made outputs, each cut at random: the calls that went in, and no more content."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from arriero.router.tools import Content, Event, ToolCall, ToolCallParser

TOOLS = ("get_weather", "add", "brave_search", "maps.route")
NUM_OUTPUTS = 10_000
NUM_CUTTINGS = 3
PARTS = 10

Arguments = dict[str, object]
Calls = list[tuple[str, Arguments]]

_TEXTS = (
    "La Paz", "", "it's", 'a "quoted" word', "a]b)c}d", "[x(", "{", "<function=add>{}</function>",
    "</function>", "<|eom_id|", "two\nlines", "back\\slash", "ñ 🦙 日本", '{"name": "add"}', "'''",
)  # fmt: skip
_WORDS = ("Let me look. ", "Two thoughts: a < b, ", "{maybe} ", "See [1].\n", "I said:\n", "🦙 ")


@dataclass(frozen=True, slots=True)
class Made:
    """An output, and what is in it."""

    text: str
    content: str
    calls: Calls


def value(draw: random.Random, depth: int = 0) -> object:
    kind = draw.randrange(8 if depth < 3 else 6)
    if kind < 3:
        return "".join(draw.choices(_TEXTS, k=draw.randint(1, 2)))
    if kind == 3:
        return draw.choice((True, False, None))
    if kind == 4:
        return draw.randint(-(10**12), 10**12)
    if kind == 5:
        return round(draw.uniform(-1e3, 1e3), 3)
    if kind == 6:
        return [value(draw, depth + 1) for _ in range(draw.randint(0, 3))]
    return {draw.choice(_TEXTS): value(draw, depth + 1) for _ in range(draw.randint(0, 3))}


def as_json(draw: random.Random, calls: Calls) -> str:
    key = draw.choice(("parameters", "arguments"))
    plain = draw.random() < 0.5
    written = [
        json.dumps({"name": name, key: arguments}, ensure_ascii=plain) for name, arguments in calls
    ]
    if draw.random() < 0.3:
        return "[" + ", ".join(written) + "]"
    return draw.choice(("; ", "\n", ";\n")).join(written)


def as_functions(draw: random.Random, calls: Calls) -> str:
    return draw.choice(("", "\n")).join(
        f"<function={name}>{json.dumps(arguments)}</function>" for name, arguments in calls
    )


def as_python(draw: random.Random, calls: Calls) -> str:
    written = (
        f"{name}({', '.join(f'{key}={one!r}' for key, one in arguments.items())})"
        for name, arguments in calls
    )
    return "[" + draw.choice((", ", ",\n")).join(written) + "]"


FORMS: tuple[Callable[[random.Random, Calls], str], ...] = (as_json, as_functions, as_python)


def make(draw: random.Random) -> Made:
    calls: Calls = []
    for _ in range(draw.randint(1, 3)):
        keys = draw.sample(("city", "a", "b", "via", "opts"), draw.randint(0, 3))
        calls.append((draw.choice(TOOLS), {key: value(draw) for key in keys}))
    form = draw.choice(FORMS)
    text = form(draw, calls)
    content = ""
    if draw.random() < 0.3:
        tags = (("<|python_tag|>", "<|eom_id|>"), ("<|python_start|>", "<|python_end|><|eot|>"))
        opening, closing = draw.choice(tags)
        text = opening + text + closing
    elif draw.random() < 0.5:
        content = draw.choice(_WORDS)
        text = content + text
    return Made(text, content, calls)


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
