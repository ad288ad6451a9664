"""Made outputs of models: text with tool calls in every form, and what is in them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass

TOOLS = ("get_weather", "add", "brave_search", "maps.route")

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
