"""Grammars of answers that may call, followed token by token."""

from __future__ import annotations

import json

import pytest
from llguidance import LLMatcher
from tokenizers import Tokenizer

from arriero.router.proto.arriero.v1 import inference_pb2 as pb
from arriero.router.text.call_grammar import calls_or_form, strict_form
from arriero.router.text.constraints import read_form
from arriero.router.tools import ToolCall, ToolCallParser
from arriero.shards.worker.grammar_masks import Compiler

CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 6}},
    "required": ["city"],
    "additionalProperties": False,
}
NODE = {
    "type": "object",
    "properties": {"node": {"$ref": "#/$defs/node"}},
    "required": ["node"],
    "additionalProperties": False,
    "$defs": {
        "node": {
            "type": "object",
            "properties": {"x": {"type": "integer"}, "next": {"$ref": "#/$defs/node"}},
            "required": ["x"],
            "additionalProperties": False,
        }
    },
}
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": schema}}
    for name, schema in (("weather", CITY), ("a.tree-1", NODE))
]
GOOD = '{"name": "weather", "parameters": {"city": "Lima"}}'
TREE = '{"name": "a.tree-1", "parameters": {"node": {"x": 1, "next": {"x": 2}}}}'


class Follower:
    """Follows texts through a grammar, as tokens of `tokenizer`."""

    def __init__(self, tokenizer: Tokenizer, grammar: str) -> None:
        self._tokenizer = tokenizer
        compiler = Compiler(
            tokenizer.to_str(), vocab_size=tokenizer.get_vocab_size(), eos_token_ids=[1]
        )
        self._matcher: LLMatcher = compiler.matcher(grammar)
        assert not self._matcher.is_error(), self._matcher.get_error()

    def takes(self, text: str) -> bool:
        """Whether the whole text may be said, and end there."""
        matcher = self._matcher.deep_copy()
        tokens = self._tokenizer.encode(text, add_special_tokens=False).ids
        return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


@pytest.fixture
def strict(llama_tokenizer: Tokenizer) -> Follower:
    return Follower(llama_tokenizer, strict_form(TOOLS, tags=["<|python_tag|>"]).grammar)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "plain words, {braces} and weather(in prose)\n日本語 🦙",
        'an example: {"name": "Bob", "type": "dog"} and {"type": "object"}',
        GOOD,
        f"Let me see.\n{GOOD}; {TREE} done",
        '<|python_tag|>{"name": "weather", "parameters": {"city": "Lima"}}',
        '{ "name" : "weather" , "arguments": {"city": "Lima"} }',
        '<function=weather>{"city": "Lima"}</function>',
        '[{"name": "other", "parameters": {"free": 1}}, ' + GOOD + "]",
        "[other(free=1)]",
        "<|python_tag|>print(1)",
    ],
)
def test_free_text_and_calls_that_fit(strict: Follower, text: str) -> None:
    assert strict.takes(text)


@pytest.mark.parametrize(
    "text",
    [
        '{"name": "weather", "parameters": {"town": "Lima"}}',
        '{"name": "weather", "parameters": {"city": "much too long"}}',
        '{"name": "weather", "parameters": {}}',
        '{"name": "weather"}',
        'well\n{"name": "a.tree-1", "parameters": {"node": {"y": 1}}}',
        '{"type": "function", "function": {"name": "weather", "parameters": {}}}',
        '{"parameters": {"town": 1}, "name": "weather"}',
        '<function=weather>{"town": 1}</function>',
        '<|python_tag|>weather.call(town="x")',
        '[weather(town="x")]',
        '[other(), weather(town="x")]',
        'well\nweather.call(town="x")',
    ],
)
def test_calls_that_do_not_fit_cannot_be_said(strict: Follower, text: str) -> None:
    assert not strict.takes(text)


def test_the_parser_takes_what_the_grammar_lets_through() -> None:
    for text in (GOOD, TREE, '<function=weather>{"city": "Lima"}</function>'):
        (call,) = ToolCallParser(["weather", "a.tree-1"]).add(text, final=True)
        assert isinstance(call, ToolCall)


PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("form", "answers", "wrong"),
    [
        (
            pb.StructuredOutput(json_schema=json.dumps(PERSON)),
            ['{"name": "Bob"}', '{"name": "weather", "age": 3}', '{"name":"we"}'],
            ["Bob", '{"age": 1}', '{"name": "Bob"}; ' + GOOD],
        ),
        (pb.StructuredOutput(json_object=True), ['{"a": [1]}', '{"name": "x"}'], ["1", "well"]),
        (pb.StructuredOutput(regex="yes|no+"), ["yes", "noo"], ["maybe"]),
        (pb.StructuredOutput(lark='start: "x" "y"'), ["xy"], ["x"]),
        (pb.StructuredOutput(choice=pb.Choice(texts=["yes", "no"])), ["yes"], ["yesno"]),
    ],
)
def test_a_call_or_an_answer_of_the_form(
    llama_tokenizer: Tokenizer, form: pb.StructuredOutput, answers: list[str], wrong: list[str]
) -> None:
    own = read_form(form)
    assert own is not None
    both = Follower(llama_tokenizer, calls_or_form(TOOLS, own, parallel=True).grammar)
    for text in (*answers, GOOD, f"{GOOD}; {TREE}"):
        assert both.takes(text), text
    for text in (*wrong, f"well {GOOD}"):
        assert not both.takes(text), text
    single = Follower(llama_tokenizer, calls_or_form(TOOLS, own, parallel=False).grammar)
    assert single.takes(GOOD) and not single.takes(f"{GOOD}; {GOOD}")
