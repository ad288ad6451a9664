"""Tool calls: however the text is cut, the same calls, and nothing of them in the content."""

from __future__ import annotations

import itertools
import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arriero.router.tools import Content, Event, ToolCall, ToolCallParser, Truncated, partial_call
from arriero.router.tools.balance import Balance

TOOLS = ("get_weather", "add", "brave_search", "maps.route", "code_interpreter")


def parse(
    text: str, cuts: list[int] | None = None, tools: object = TOOLS, *, cut: bool = False
) -> list[Event]:
    """Events of `text` cut at `cuts`, adjacent content joined; `cut` off by a limit, or ended."""
    parser = ToolCallParser(tools)  # type: ignore[arg-type]
    edges = sorted({0, len(text), *(min(cut, len(text)) for cut in cuts or [])})
    events: list[Event] = []
    for start, end in itertools.pairwise(edges):
        events += parser.add(text[start:end])
    events += parser.add("", final=True, cut=cut)
    joined: list[Event] = []
    for event in events:
        if isinstance(event, Content) and joined and isinstance(joined[-1], Content):
            event = Content(joined.pop().text + event.text)  # type: ignore[union-attr]
        joined.append(event)
    return joined


def call(name: str, **arguments: object) -> ToolCall:
    return ToolCall(name, json.dumps(arguments, ensure_ascii=False))


W = call("get_weather", city="Cusco")
JSON_W = '{"name": "get_weather", "arguments": {"city": "Cusco"}}'
JSON_ADD = '{"name": "add", "parameters": {}}'
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
    ('{"name": "Bob", "ag', [Content('{"name": "Bob", "ag')]),
    # marks of other fine-tunes
    (f"<tool_call>\n{JSON_W}\n</tool_call>", [W]),
    (f"<tool_call>{JSON_W}</tool_call>\n<tool_call>{JSON_ADD}</tool_call>", [W, call("add")]),
    (f"<tool_call>\n{JSON_W}\n{JSON_ADD}\n</tool_call>", [W, call("add")]),
    (f"<tool_call>{JSON_W}", [W]),
    (f"<tool_call>[{JSON_W}, {JSON_ADD}]</tool_call>", [W, call("add")]),
    (
        '<tool_call>\n{"id": 0, "name": "get_weather", "arguments": {"city": "Cusco"}}\n'
        "</tool_call>",
        [W],
    ),
    ('<tool_call>{"other": 1}</tool_call>', [Content('<tool_call>{"other": 1}</tool_call>')]),
    (
        '<tool_call><function=get_weather>{"city": "Cusco"}</function></tool_call>',
        [W],
    ),
    ("<tool_call>get_weather(city='Cusco')</tool_call>", [W]),
    ("<|tool_call_start|>[get_weather(city='Cusco')]<|tool_call_end|>", [W]),
    (f"<|tool_call|>[{JSON_W}]<|/tool_call|>", [W]),
    (f"<|tool_call|>{JSON_W}", [W]),
    (f"[TOOL_CALLS] [{JSON_W}]", [W]),
    ('[TOOL_CALLS]get_weather[ARGS]{"city": "Cusco"}', [W]),
    ('[TOOL_CALLS]get_weather{"city": "Cusco"}[TOOL_CALLS]add{}', [W, call("add")]),
    (f"functools[{JSON_W}, {JSON_ADD}]", [W, call("add")]),
    ("functools is a module", [Content("functools is a module")]),
    (f"Here:\n```json\n{JSON_W}\n```", [Content("Here:\n"), W]),
    (f"```\n[{JSON_W}]\n```\nDone.", [W, Content("\nDone.")]),
    (f"```tool_call\n{JSON_W}\n{JSON_ADD}\n```", [W, call("add")]),
    ("```python\n[get_weather(city='Cusco')]\n```", [W]),
    (
        "```python\nget_weather(city='Cusco')\n```",
        [Content("```python\nget_weather(city='Cusco')\n```")],
    ),
    (
        '```json\n{"name": "Bob", "parameters": {}}\n```',
        [Content('```json\n{"name": "Bob", "parameters": {}}\n```')],
    ),
    ("a `code` and ```\nx = 1\n```", [Content("a `code` and ```\nx = 1\n```")]),
    ('<function=get_weather{"city": "Cusco"}</function>', [W]),
    # spellings of the fields
    ('{"name": "get_weather", "args": {"city": "Cusco"}}', [W]),
    ('{"tool": "get_weather", "input": {"city": "Cusco"}}', [W]),
    ('{"tool_name": "get_weather", "tool_input": {"city": "Cusco"}}', [W]),
    (
        '{"type": "tool_use", "id": "t", "name": "get_weather", "input": {"city": "Cusco"}}',
        [W],
    ),
    ('{"function": "get_weather", "arguments": "{\\"city\\": \\"Cusco\\"}"}', [W]),
    ('{"name": "add", "arguments": null}', [call("add")]),
    (f"{JSON_W}\n{JSON_ADD}", [W, call("add")]),
    # a call that lacks its last brackets when the model ends is whole
    ('{"name": "get_weather", "parameters": {"city": "Cusco"}', [W]),
    ('{"name": "get_weather", "parameters": {"city": "Cusco"', [W]),
    ('<tool_call>{"name": "get_weather", "arguments": {"city": "Cusco"}\n', [W]),
    ('<function=get_weather>{"city": "Cusco"', [W]),
    ("[get_weather(city='Cusco')", [W]),
    ("[get_weather(city='Cusco'", [W]),
    (f"[{JSON_W}", [W]),
    ('<|python_tag|>{"name": "get_weather", "parameters": {"city": "Cusco"}<|eom_id|>', [W]),
    ('<tool_call>{"name": "get_weather", "arguments": {"city": "Cusco"}\n</tool_call>', [W]),
    (
        '<tool_call>{"name": "get_weather", "arguments": {"city": "Cusco"}</tool_call>'
        f"<tool_call>{JSON_ADD}</tool_call>",
        [W, call("add")],
    ),
    ('<function=get_weather>{"city": "Cusco"</function> so', [W, Content(" so")]),
    ('```json\n{"name": "get_weather", "parameters": {"city": "Cusco"}\n```', [W]),
    (
        '<tool_call>{"name": "get_weather", "arguments": {"city": "</tool_call>"}}</tool_call>',
        [call("get_weather", city="</tool_call>")],
    ),
    ('brave_search.call(query="llamas"', [call("brave_search", query="llamas")]),
    # what it said in full is not known: its words are content
    ('{"name": "get_weather", "para', [Content('{"name": "get_weather", "para')]),
    (
        '{"name": "get_weather", "parameters": {"city": "Cus',
        [Content('{"name": "get_weather", "parameters": {"city": "Cus')],
    ),
    ('<tool_call>{"name": "get_wea', [Content('<tool_call>{"name": "get_wea')]),
]


@pytest.mark.parametrize(("text", "expected"), FORMS, ids=[str(n) for n in range(len(FORMS))])
def test_every_form(text: str, expected: list[Event] | None) -> None:
    whole = parse(text)
    if expected is not None:
        assert whole == expected
    for cut in range(len(text)):
        assert parse(text, [cut]) == whole, cut
    assert parse(text, list(range(len(text)))) == whole


# what max_tokens cut off: the words that are given, and what a client of HTTP gets of them
CUT_OFF = [
    ('{"name": "get_weather", "para', ("get_weather", "")),
    ('{"name": "get_weather", "parameters": {"city": "Cus', ("get_weather", '{"city": "Cus')),
    (
        '{"name": "get_weather", "parameters": {"city": "Cusco"}',
        ("get_weather", '{"city": "Cusco"}'),
    ),
    (
        '{"parameters": {"city": "Cusco"}, "name": "get_weather"',
        ("get_weather", '{"city": "Cusco"}'),
    ),
    ('{"function": {"name": "add", "arguments": {"a": 1', ("add", '{"a": 1')),
    ('{"name": "add", "arguments": "{\\"a\\": \\"x', ("add", '{"a": "x')),
    ('{"name": "add", "arguments": "{\\"a\\": \\"x\\', ("add", '{"a": "x')),
    ('{"name": "add", "arguments": "{\\"a\\": \\"x\\u00', ("add", '{"a": "x')),
    ('<tool_call>{"name": "get_weather", "arguments": {"ci', ("get_weather", '{"ci')),
    ('<function=get_weather>{"city": "C', ("get_weather", '{"city": "C')),
    ('[TOOL_CALLS]get_weather{"city"', ("get_weather", '{"city"')),
    ("[add(x=1", ("add", '{"x": 1')),
    ("[add(x=1, y='t", ("add", '{"x": 1')),
    ("[add(", ("add", "")),
    ('brave_search.call(query="lla', ("brave_search", "")),
]


@pytest.mark.parametrize(("text", "expected"), CUT_OFF, ids=[str(n) for n in range(len(CUT_OFF))])
def test_a_call_that_was_cut_off(text: str, expected: tuple[str, str]) -> None:
    (event,) = whole = parse(text, cut=True)
    assert isinstance(event, Truncated)
    assert text.endswith(event.text)
    assert partial_call(event.text) == ToolCall(*expected)
    for at in range(len(text)):
        assert parse(text, [at], cut=True) == whole, at


def test_of_a_list_that_was_cut_off_the_whole_calls_are_given() -> None:
    for text, rest in (
        (f"[{JSON_W}, {JSON_W[:20]}", JSON_W[:20]),
        ("[get_weather(city='Cusco'), add(x", "add(x"),
    ):
        assert parse(text, cut=True) == [W, Truncated(rest)]
    (named,) = parse('<tool_call>{"na', cut=True)
    assert isinstance(named, Truncated) and partial_call(named.text) is None
    assert parse('{"name": "Bob", "parameters": {"a', cut=True) == [
        Content('{"name": "Bob", "parameters": {"a')
    ]


@given(text=st.text(alphabet="aé\\u0041\"'{}[]():,=1 ", max_size=30))
def test_any_cut_off_text_is_read(text: str) -> None:
    for begun in ('{"name": "add", "arguments": ', '{"name": "add", "arguments": "{', "add(", text):
        found = partial_call(begun + text)
        assert found is None or not found.arguments or found.arguments[0] == "{"


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
        "```",
        "```json\n",
        "<tool_call>",
        "</tool_call>",
        "[TOOL_CALLS]",
        "functools",
        "</function>",
        '{"name": "add"',
    ]
)


@settings(max_examples=600, deadline=None)
@given(pieces=st.lists(PIECES, max_size=6), data=st.data())
def test_streamed_is_whole(pieces: list[str], data: st.DataObject) -> None:
    text = "".join(pieces)
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=12))
    for cut in (False, True):
        whole = parse(text, cut=cut)
        assert parse(text, cuts, cut=cut) == whole
        assert parse(text, list(range(len(text))), cut=cut) == whole


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
    wrap=st.sampled_from(
        [
            ("", ""),
            ("", "<|eot|>"),
            ("<|python_start|>", "<|python_end|>"),
            ("<tool_call>\n", "\n</tool_call>"),
            ("```json\n", "\n```"),
        ]
    ),
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
