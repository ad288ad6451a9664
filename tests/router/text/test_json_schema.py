"""JSON Schemas as libraries write them: what is held is held exactly, and the rest is named."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import httpx
import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from arriero.router import templates
from arriero.router.client.client import AsyncClient
from arriero.router.gateway import GatewayConfig
from arriero.router.proto.arriero.v1 import inference_pb2 as pb
from arriero.router.text.constraints import call_form, described, read_form
from arriero.shards.errors import InvalidRequest
from arriero.shards.worker.grammar_masks import Compiler
from support.frontdoor import LLAMA_SPECIALS, echo, make_card, make_tokenizer, serve

Schema = dict[str, Any]
NODE = {
    "type": "object",
    "properties": {"next": {"anyOf": [{"$ref": "#/$defs/Node"}, {"type": "null"}]}},
    "required": ["next"],
    "additionalProperties": False,
}


def props(**inner: Any) -> Schema:  # noqa: ANN401
    return {"type": "object", "properties": inner, "required": [], "additionalProperties": False}


# the schema, what is not enforced, values that fit and values that do not
CASES: list[tuple[str, Schema, list[str], list[Any], list[Any]]] = [
    (
        "pydantic Decimal",
        {
            "anyOf": [
                {"type": "number"},
                {"type": "string", "pattern": r"^(?!^[-+.]*$)[+-]?0*\d*\.?\d*$"},
            ]
        },
        ["pattern at #/anyOf/1"],
        [1.5, "2"],
        [None],
    ),
    (
        "set",
        {"type": "array", "items": {"enum": ["a", "b"]}, "uniqueItems": True, "maxItems": 2},
        ["uniqueItems at #"],
        [["a", "b"]],
        [["c"]],
    ),
    (
        "one of a set",
        {"type": "array", "uniqueItems": True, "maxItems": 1},
        [],
        [[], [1]],
        [[1, 2]],
    ),
    ("Path", {"type": "string", "format": "path"}, ["format path at #"], ["/a"], [1]),
    (
        "SecretStr",
        {"type": "string", "format": "password", "writeOnly": True},
        ["format password at #"],
        ["x"],
        [1],
    ),
    ("int64 of OpenAPI", {"type": "integer", "format": "int64", "readOnly": True}, [], [5], ["5"]),
    ("date", {"type": "string", "format": "date"}, [], ["2024-07-26"], ["x"]),
    (
        "annotations",
        {
            "type": "string",
            "title": "T",
            "description": "d",
            "examples": ["a"],
            "default": None,
            "deprecated": True,
            "contentEncoding": "base64",
            "contentMediaType": "text/plain",
            "x-order": 3,
            "$comment": "c",
        },
        [],
        ["a"],
        [1],
    ),
    ("not", {"type": "integer", "not": {"const": 3}}, ["not at #"], [4], ["x"]),
    (
        "names that are words",
        props(**{"not": {"type": "integer"}, "pattern": {"type": "string"}, "if": True}),
        [],
        [{"not": 1}, {"pattern": "(?=a)"}, {"if": 2}],
        [{"not": "x"}, {"then": 1}],
    ),
    (
        "values that look like words",
        {"enum": [{"not": 1, "uniqueItems": True}], "default": {"pattern": "(?=a)"}},
        [],
        [{"not": 1, "uniqueItems": True}],
        [{}],
    ),
    (
        "if",
        {"type": "object", "if": {"required": ["a"]}, "then": {"required": ["b"]}},
        ["if at #", "then at #"],
        [{}],
        [[]],
    ),
    (
        "dependencies",
        {"type": "object", "dependentRequired": {"a": ["b"]}, "dependencies": {"a": ["b"]}},
        ["dependentRequired at #", "dependencies at #"],
        [{}],
        [[]],
    ),
    (
        "contains",
        {"type": "array", "contains": {"type": "integer"}, "minContains": 1},
        ["contains at #", "minContains at #"],
        [[1]],
        [{}],
    ),
    (
        "minProperties of optional ones",
        props(a={"type": "integer"}) | {"minProperties": 1},
        ["minProperties at #"],
        [{"a": 1}],
        [{"b": 1}],
    ),
    (
        "minProperties that required ones meet",
        props(a={"type": "integer"}) | {"minProperties": 1, "required": ["a"]},
        [],
        [{"a": 1}],
        [{}],
    ),
    (
        "minProperties of a map",
        {"type": "object", "additionalProperties": {"type": "integer"}, "minProperties": 1},
        [],
        [{"a": 1}],
        [{}, {"a": "x"}],
    ),
    (
        "names of zod's record",
        {
            "$schema": "https://json-schema.org/draft/2020-12/schema",
            "type": "object",
            "propertyNames": {"type": "string"},
            "additionalProperties": {"type": "integer"},
        },
        [],
        [{"a": 1}],
        [{"a": "x"}],
    ),
    (
        "names of an enum",
        {
            "type": "object",
            "propertyNames": {"$ref": "#/$defs/C"},
            "additionalProperties": {"type": "integer"},
            "$defs": {"C": {"enum": ["red", "blue"], "title": "C", "type": "string"}},
        },
        [],
        [{"red": 1}, {"red": 1, "blue": 2}, {}],
        [{"green": 1}, {"red": "x"}],
    ),
    (
        "names of a pattern",
        {"type": "object", "propertyNames": {"pattern": "^a[0-9]$"}},
        [],
        [{"a1": "x"}],
        [{"b": 1}],
    ),
    (
        "names of a length",
        {"type": "object", "propertyNames": {"maxLength": 3}},
        ["propertyNames at #"],
        [{"a": 1}],
        [[]],
    ),
    (
        "a name's pattern with look-around",
        {
            "type": "object",
            "patternProperties": {"^(?!x)": {"type": "integer"}, "^k$": {"type": "string"}},
            "additionalProperties": False,
        },
        ["patternProperties at #"],
        [{"k": "v"}],
        [{"k": 1}],
    ),
    (
        "recursion",
        {"$ref": "#/$defs/Node", "$defs": {"Node": NODE}},
        [],
        [{"next": {"next": None}}],
        [{"next": 1}],
    ),
    (
        "discriminator",
        {
            "oneOf": [{"$ref": "#/$defs/A"}, {"$ref": "#/$defs/B"}],
            "discriminator": {"propertyName": "k", "mapping": {"a": "#/$defs/A"}},
            "$defs": {
                name.upper(): props(k={"const": name}) | {"required": ["k"]} for name in "ab"
            },
        },
        [],
        [{"k": "a"}, {"k": "b"}],
        [{"k": "c"}],
    ),
    ("const null", props(a={"const": None}) | {"required": ["a"]}, [], [{"a": None}], [{"a": 1}]),
    ("nullable", {"type": "string", "nullable": True}, [], ["a", None], [1]),
    ("nullable enum", {"type": "string", "enum": ["a"], "nullable": True}, [], ["a", None], ["b"]),
    (
        "nullable reference",
        props(a={"$ref": "#/$defs/I", "nullable": True}) | {"$defs": {"I": {"type": "integer"}}},
        [],
        [{"a": 1}, {"a": None}],
        [{"a": "x"}],
    ),
    ("bounds as floats", {"type": "integer", "minimum": 0.0, "maximum": 10.0}, [], [10], [11]),
    ("lengths as floats", {"type": "string", "maxLength": 2.0}, [], ["ab"], ["abc"]),
    (
        "exclusive bounds of draft 4",
        {"type": "integer", "minimum": 0, "exclusiveMinimum": True, "maximum": 2},
        [],
        [1, 2],
        [0, 3],
    ),
    ("list of types", {"type": ["string", "null"]}, [], ["a", None], [1]),
    ("true and false", props(a=True, b=False), [], [{"a": [1]}], [{"b": 1}]),
    (
        "unevaluatedProperties",
        {"type": "object", "properties": {"a": True}, "unevaluatedProperties": False},
        [],
        [{"a": 1}],
        [{"b": 1}],
    ),
    (
        "unevaluatedProperties of a union",
        {"type": "object", "anyOf": [{"required": ["a"]}], "unevaluatedProperties": False},
        ["unevaluatedProperties at #"],
        [{"a": 1}],
        [[]],
    ),
    (
        "oneOf that overlaps",
        {"oneOf": [{"type": "integer"}, {"type": "number"}]},
        ["oneOf"],
        [1],
        ["x"],
    ),
    ("types of others", {"type": "OBJECT", "properties": {"a": {"type": "float"}}}, [], [{}], [[]]),
    ("any type", {"type": "any"}, [], [1, "x", None], []),
    (
        "a dialect of its own",
        {"$schema": "https://example.com/s", "type": "integer"},
        [],
        [1],
        ["x"],
    ),
    (
        "null words",
        {"type": "object", "additionalProperties": None, "required": None},
        [],
        [{}],
        [[]],
    ),
    ("word boundary", {"type": "string", "pattern": r"\bfoo\b"}, ["pattern at #"], ["x"], [1]),
    ("back reference", {"type": "string", "pattern": r"^(a)\1$"}, ["pattern at #"], ["x"], [1]),
    ("named group of JS", {"type": "string", "pattern": r"^(?<y>\d{2})$"}, [], ["12"], ["x"]),
]


@cache
def compiler() -> Compiler:
    tokenizer = make_tokenizer(LLAMA_SPECIALS)
    return Compiler(tokenizer.to_str(), vocab_size=tokenizer.get_vocab_size(), eos_token_ids=(1,))


def follow(grammar: str, text: str) -> bool:
    """Whether the grammar takes the whole of `text`."""
    matcher = compiler().matcher(grammar)
    assert not matcher.is_error(), matcher.get_error()
    made = compiler()._tokenizer
    assert made is not None
    for token in made.tokenize_str(text):
        if not matcher.validate_tokens([token]):
            return False
        matcher.consume_token(token)
    return matcher.is_accepting()


@pytest.mark.parametrize("case", CASES, ids=[case[0] for case in CASES])
def test_what_libraries_write(case: tuple[str, Schema, list[str], list[Any], list[Any]]) -> None:
    _, schema, not_enforced, fit, misfit = case
    before = json.dumps(schema)
    form = read_form(pb.StructuredOutput(json_schema=before))
    assert form is not None
    grammar = form.grammar
    if not_enforced == ["oneOf"]:  # seen when the grammar is compiled
        assert compiler().matcher(form.grammar).is_error()
        grammar = form.loose
        not_enforced = []
        schema = {"anyOf": schema["oneOf"]}
    assert list(form.not_enforced) == not_enforced
    for value in fit:
        assert follow(grammar, json.dumps(value)), value
    for value in misfit:
        assert not follow(grammar, json.dumps(value)), value
    if not not_enforced and "nullable" not in before and "example.com" not in before:
        try:
            jsonschema.Draft202012Validator.check_schema(schema)
        except jsonschema.SchemaError:
            return  # of another draft, or of another language's types
        for value in fit:
            jsonschema.validate(value, schema)


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"$ref": "https://example.com/s.json"}, None),
        ({"$ref": "#/$defs/none"}, None),
        ({"type": "string", "pattern": "["}, "no regular expression"),
        ({"type": "file"}, None),
        ({"type": "string", "minLength": -1}, None),
    ],
)
def test_what_is_no_schema_is_refused(schema: Schema, words: str | None) -> None:
    if words is not None:
        with pytest.raises(InvalidRequest, match=words):
            read_form(pb.StructuredOutput(json_schema=json.dumps(schema)))
        return
    form = read_form(pb.StructuredOutput(json_schema=json.dumps(schema)))
    assert form is not None and compiler().matcher(form.grammar).is_error()


WORDS = st.sampled_from(
    [
        *("type", "properties", "required", "items", "anyOf", "oneOf", "propertyNames", "pattern"),
        *("patternProperties", "minProperties", "maxProperties", "nullable", "enum", "$ref"),
        *("$schema", "format", "uniqueItems", "maxItems", "minLength", "exclusiveMinimum", "if"),
        *("additionalProperties", "unevaluatedProperties", "$defs", "const"),
    ]
)
ANY = st.recursive(
    st.sampled_from([None, True, False, 0, 1.0, -1, "string", "#/$defs/a", "(?=a)", ""]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(schema=st.dictionaries(WORDS, ANY, max_size=4))
def test_any_json_is_read_or_refused(schema: Schema) -> None:
    try:
        read_form(pb.StructuredOutput(json_schema=json.dumps(schema)))
    except InvalidRequest:
        pass


def test_a_cycle_of_names_ends() -> None:
    schema = {"propertyNames": {"$ref": "#/$defs/a"}, "$defs": {"a": {"$ref": "#/$defs/a"}}}
    form = read_form(pb.StructuredOutput(json_schema=json.dumps(schema)))
    assert form is not None and form.not_enforced == ("propertyNames at #",)


def test_a_tools_parameters_say_which_tool() -> None:
    tool = {
        "function": {
            "name": "f",
            "parameters": {"properties": {"p": {"type": "string", "format": "path"}}},
        }
    }
    form = call_form([tool], parallel=False)
    assert form.not_enforced == ("tools[0].parameters: format path at #/properties/p",)
    assert follow(form.grammar, '{"name": "f", "parameters": {"p": "x"}}')


def test_a_header_is_ascii_and_bounded() -> None:
    assert described(["not at #/properties/é\n"]) == "not at #/properties/\\xe9\\n"
    many = described([f"not at #/{number}" for number in range(1000)])
    assert len(many) < 2100 and many.endswith("1000 in all")


PATH = {"type": "object", "properties": {"p": {"type": "string", "format": "path"}}}


async def test_the_answer_tells_what_is_not_enforced(llama_tokenizer: Tokenizer) -> None:
    card = make_card(llama_tokenizer, templates.read("llama3.1"), max_model_len=4096)
    config = GatewayConfig(http_address="127.0.0.1:0")
    body: dict[str, Any] = {
        "messages": [{"role": "user", "content": "x"}],
        "max_tokens": 2,
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": PATH}},
    }
    told = "format path at #/properties/p"
    async with (
        serve(card, echo, config=config) as stack,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{stack.gateway.http_port}") as ask,
    ):
        for stream in (False, True):
            answer = await ask.post("/v1/chat/completions", json=body | {"stream": stream})
            assert answer.status_code == 200
            assert answer.headers["x-schema-not-enforced"] == told
            refused = await ask.post(
                "/v1/chat/completions",
                json=body | {"stream": stream},
                headers={"x-strict-schema": "1"},
            )
            assert refused.status_code == 400 and told in refused.json()["error"]["message"]
        off = await ask.post(
            "/v1/chat/completions", json=body, headers={"x-strict-schema": "false"}
        )
        assert off.status_code == 200
        overlap = {"oneOf": [{"type": "integer"}, {"type": "number"}]}
        answer = await ask.post(
            "/v1/completions", json={"prompt": "a", "max_tokens": 2, "guided_json": overlap}
        )
        assert answer.headers["x-schema-not-enforced"].startswith("oneOf")
        plain = await ask.post("/v1/completions", json={"prompt": "a", "max_tokens": 2})
        assert "x-schema-not-enforced" not in plain.headers
        # what is the form itself is never another one than was asked for
        for fields in ({"guided_regex": "(?=a)b"}, {"guided_grammar": "start: /(?!a)b/"}):
            answer = await ask.post("/v1/completions", json={"prompt": "a"} | fields)
            assert answer.status_code == 400
        forced = {
            "tools": [{"type": "function", "function": {"name": "f", "parameters": PATH}}],
            "tool_choice": "required",
        }
        answer = await ask.post(
            "/v1/chat/completions",
            json={"messages": body["messages"], "max_tokens": 2} | forced,
        )
        assert answer.headers["x-schema-not-enforced"] == f"tools[0].parameters: {told}"
        await _check_grpc(stack.client, stack.address, told)


async def _check_grpc(client: AsyncClient, address: str, told: str) -> None:
    request = pb.GenerateRequest(text="a")
    request.sampling.max_tokens = 2
    request.sampling.structured.json_schema = json.dumps(PATH)
    call = client._stub.Generate(request)
    assert [message async for message in call]
    assert dict(await call.trailing_metadata())["x-schema-not-enforced"] == told
    call = client._stub.Generate(request, metadata=(("x-strict-schema", "1"),))
    with pytest.raises(Exception, match="cannot be enforced at format path"):
        [_ async for _ in call]
