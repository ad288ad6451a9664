"""Tool calls: however the text is cut, the same calls, and nothing of them in the content."""

from __future__ import annotations

import itertools
import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arriero.router.tools import Content, Event, ToolCall, ToolCallParser, Truncated
from arriero.router.tools.balance import Balance

TOOLS = ("get_weather", "add", "brave_search", "maps.route", "code_interpreter")


def parse(text: str, cuts: list[int] | None = None, tools: object = TOOLS) -> list[Event]:
    """Events of `text` cut at `cuts`, adjacent content joined."""
    parser = ToolCallParser(tools)  # type: ignore[arg-type]
    edges = sorted({0, len(text), *(min(cut, len(text)) for cut in cuts or [])})
    events: list[Event] = []
    for start, end in itertools.pairwise(edges):
        events += parser.add(text[start:end])
    events += parser.add("", final=True)
    joined: list[Event] = []
    for event in events:
        if isinstance(event, Content) and joined and isinstance(joined[-1], Content):
            event = Content(joined.pop().text + event.text)  # type: ignore[union-attr]
        joined.append(event)
    return joined


def call(name: str, **arguments: object) -> ToolCall:
    return ToolCall(name, json.dumps(arguments, ensure_ascii=False))


W = call("get_weather", city="Cusco")
FORMS = [
    (
        '<|python_tag|>brave_search.call(query="llamas")<|eom_id|>',
        [call("brave_search", query="llamas")],
    ),
    ('brave_search.call(query="llamas")', [call("brave_search", query="llamas")]),
    ('{"name": "get_weather", "parameters": {"city": "Cusco"}}', [W]),
    ('<|python_tag|>{"name": "get_weather", "parameters": {"city": "Cusco"}}<|eom_id|>', [W]),
    ('{"type": "function", "name": "get_weather", "parameters": {"city": "Cusco"}}', [W]),
    (
        json.dumps({"type": "function", "function": {"name": "add", "arguments": "{}"}}),
        [call("add")],
    ),
    ('{"name": "get_weather", "parameters": {"city": "Cusco"}}; {"name": "add"}', [W, call("add")]),
    (
        '[{"name": "get_weather", "arguments": {"city": "Cusco"}}, {"name": "add"}]',
        [W, call("add")],
    ),
    ('<function=get_weather>{"city": "Cusco"}</function><|eot_id|>', [W]),
    (
        '<function=get_weather>{"city": "Cusco"}</function>\n<function=add>{}</function>',
        [W, call("add")],
    ),
    (
        '<function=get_weather>{"city": "</function>"}</function>',
        [call("get_weather", city="</function>")],
    ),
    ('<function=get_weather>{"city": "Cusco"}', [W]),
    ("[get_weather(city='Cusco'), add()]", [W, call("add")]),
    ("<|python_start|>[get_weather(city='Cusco')]<|python_end|><|eot|>", [W]),
    ('<|python_start|>{"name": "get_weather", "parameters": {"city": "Cusco"}}<|python_end|>', [W]),
    ("<|python_tag|>get_weather(city='Cusco')", [W]),
    (
        "[maps.route(via=[[1, 2], [3.5, -4]], opts={'a': {'b': None}}, ok=True)]",
        [call("maps.route", via=[[1, 2], [3.5, -4]], opts={"a": {"b": None}}, ok=True)],
    ),
    (
        "[get_weather(city=\"a]b)c\\\"d\"), get_weather(city='it\\'s')]",
        [call("get_weather", city='a]b)c"d'), call("get_weather", city="it's")],
    ),
    ('[get_weather(city="""two\n"lines"""")]', None),
    (
        "<|python_tag|>import math\nprint(math.pi)<|eom_id|>",
        [call("code_interpreter", code="import math\nprint(math.pi)")],
    ),
    (
        "<|python_tag|>[x for x in range(3)]<|eom_id|>",
        [call("code_interpreter", code="[x for x in range(3)]")],
    ),
    ("I will look.\n[get_weather(city='Cusco')]", [Content("I will look.\n"), W]),
    (
        'Sure: {"name": "get_weather", "parameters": {"city": "Cusco"}} done',
        [Content("Sure: "), W, Content(" done")],
    ),
    ("\n\n[add()]\n", [call("add")]),
    ("plain words, no call.\n", [Content("plain words, no call.\n")]),
    ('{"name": "Bob", "age": 5}', [Content('{"name": "Bob", "age": 5}')]),
    ('{"a": [1, 2]} [x](http://y) <b> f(x)', [Content('{"a": [1, 2]} [x](http://y) <b> f(x)')]),
    ("[get_weather(city=unknown)]", [Content("[get_weather(city=unknown)]")]),
    ("[other(city='x')]", [Content("[other(city='x')]")]),
    (
        '{"name": "get_weather", "parameters": {"x": 1e999}}',
        [Content('{"name": "get_weather", "parameters": {"x": 1e999}}')],
    ),
    ("<function=>nothing", [Content("<function=>nothing")]),
    ("  \n", [Content("  \n")]),
    ('{"name": "get_weather", "para', [Truncated('{"name": "get_weather", "para')]),
    ('{"name": "Bob", "ag', [Content('{"name": "Bob", "ag')]),
    ("[add(x=1", [Truncated("[add(x=1")]),
]


@pytest.mark.parametrize(("text", "expected"), FORMS, ids=[str(n) for n in range(len(FORMS))])
def test_every_form(text: str, expected: list[Event] | None) -> None:
    whole = parse(text)
    if expected is not None:
        assert whole == expected
    for cut in range(len(text)):
        assert parse(text, [cut]) == whole, cut
    assert parse(text, list(range(len(text)))) == whole


PIECES = st.sampled_from(
    [text for text, _ in FORMS]
    + [
        "words ",
        "\n",
        " ",
        "; ",
        "<",
        "<|",
        "<function=",
        "[",
        "{",
        '{"',
        '"name"',
        "add(",
        ")",
        "]",
        "<|python_tag|>",
        "<|eom_id|>",
        "'",
        '"',
        "\\",
        "🦙",
        "x = [1]",
        "add.call(",
        '"""',
    ]
)


@settings(max_examples=600, deadline=None)
@given(pieces=st.lists(PIECES, max_size=6), data=st.data())
def test_streamed_is_whole(pieces: list[str], data: st.DataObject) -> None:
    text = "".join(pieces)
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=12))
    assert parse(text, cuts) == parse(text)
    assert parse(text, list(range(len(text)))) == parse(text)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)
ARGUMENTS = st.dictionaries(st.from_regex(r"[a-z][a-z_0-9]{0,5}", fullmatch=True), JSON, max_size=3)
CALLS = st.lists(st.tuples(st.sampled_from(TOOLS[:4]), ARGUMENTS), min_size=1, max_size=3)
WORDS = st.from_regex(r"([A-Za-z ,.]{0,20}\n)?", fullmatch=True)


def pythonic(calls: list[tuple[str, dict[str, object]]]) -> str:
    written = [f"{n}({', '.join(f'{k}={v!r}' for k, v in a.items())})" for n, a in calls]
    return f"[{', '.join(written)}]"


def as_json(calls: list[tuple[str, dict[str, object]]]) -> str:
    return "; ".join(json.dumps({"name": n, "parameters": a}) for n, a in calls)


def as_functions(calls: list[tuple[str, dict[str, object]]]) -> str:
    return "\n".join(f"<function={n}>{json.dumps(a)}</function>" for n, a in calls)


@settings(max_examples=400, deadline=None)
@given(
    calls=CALLS,
    before=WORDS,
    form=st.sampled_from([pythonic, as_json, as_functions]),
    wrap=st.sampled_from([("", ""), ("", "<|eot|>"), ("<|python_start|>", "<|python_end|>")]),
    data=st.data(),
)
def test_calls_round_trip_through_every_form(calls, before, form, wrap, data) -> None:  # noqa: ANN001
    text = before + wrap[0] + form(calls) + wrap[1]
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=10))
    events = parse(text, cuts)
    content = "".join(e.text for e in events if isinstance(e, Content))
    assert content.strip() == before.strip()
    got = [(e.name, json.loads(e.arguments)) for e in events if isinstance(e, ToolCall)]
    assert got == [(name, json.loads(json.dumps(arguments))) for name, arguments in calls]


@given(text=st.text(alphabet="ab <>[]{}()\"'\\|=,.:\n", max_size=40))
def test_nothing_is_lost(text: str) -> None:
    events = parse(text)
    if all(isinstance(event, Content) for event in events):
        assert "".join(e.text for e in events if isinstance(e, Content)) == text


def test_nesting_bombs_are_content() -> None:
    for bomb in (
        "[add(x=" + "[" * 5000 + "]" * 5000 + ")]",
        '{"name": "add", "parameters": ' + '{"a":' * 5000 + "1" + "}" * 5001,
    ):
        (event,) = parse(bomb)
        assert isinstance(event, Content)
        assert event.text == bomb


def test_any_name_when_no_tools_are_named() -> None:
    assert parse("[other(city='x')]", tools=None) == [call("other", city="x")]


def test_balance_in_one_pass() -> None:
    text = '{"a": "}\\"]"} rest'
    balance = Balance('"')
    ends = [balance.end(text[:size]) for size in range(1, len(text) + 1)]
    assert next(end for end in ends if end) == re.search(" rest", text).start()  # type: ignore[union-attr]
