"""What a client wants of the output's form, made into a grammar, checked within bounds.

Knows the forms (JSON schema, regex, EBNF, choice, tool calls) and their limits; how a grammar
steers the sampling is `shards.grammar`'s.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any

from arriero.router.proto.arriero.v1 import inference_pb2 as pb
from arriero.shards.errors import InvalidRequest
from arriero.shards.grammar import limits

if TYPE_CHECKING:
    from llguidance import LLTokenizer

MAX_BYTES = 64 * 1024
"""Longest schema, regex or grammar."""
MAX_DEPTH = 64
MAX_CHOICES = 1024
MAX_CALLS = 8
"""Most calls of one answer whose calls are forced."""
_JSON = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""One spelling: a model that may write spaces without end sometimes does."""


def read_grammar(message: pb.Grammar) -> str:
    """The grammar that `message` asks for.

    Raises:
        InvalidRequest: it is none, or passes a limit.
    """
    kind = message.WhichOneof("kind")
    if kind is None:
        raise InvalidRequest("grammar", "`grammar` is empty; give one of its forms")
    if kind == "json_object":
        return _checked("json_object", _json_schema('{"type": "object"}'))
    if kind == "choice":
        options = list(message.choice.options)
        if not 1 <= len(options) <= MAX_CHOICES or "" in options:
            raise InvalidRequest(
                "choice",
                f"`choice` has {len(options)} options; give 1 to {MAX_CHOICES}, none empty",
            )
        text, form = json.dumps(options), "choice"
    else:
        text, form = getattr(message, kind), {"ebnf": "grammar"}.get(kind, kind)
    size = len(text.encode())
    if size > MAX_BYTES:
        raise InvalidRequest(kind, f"`{kind}` has {size} bytes; the most is {MAX_BYTES}")
    if kind == "json_schema":
        return _checked(kind, _json_schema(text))
    from llguidance import grammar_from

    try:
        return _checked(kind, grammar_from(form, text))
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(kind, f"`{kind}` cannot be read: {str(error)[:300]}") from None


def calls_grammar(tools: Sequence[Mapping[str, Any]], *, most: int) -> str:
    """One to `most` calls of `tools`, as JSON objects, and nothing else.

    Raises:
        InvalidRequest: a tool's parameters are no schema that can be enforced.
    """
    calls = []
    for tool in tools:
        function = tool["function"]
        one = {
            "type": "object",
            "properties": {
                "name": {"const": function["name"]},
                "parameters": _object(function["parameters"]),
            },
            "required": ["name", "parameters"],
            "additionalProperties": False,
            "x-guidance": _JSON,
        }
        calls.append(f"%json {json.dumps(one)}")
    names = [f"call_{number}" for number in range(len(calls))]
    rules = [f"{name}: {call}" for name, call in zip(names, calls, strict=True)]
    more = f' ("; " call){{0,{most - 1}}}' if most > 1 else ""
    lines = [f"start: call{more}", f"call: {' | '.join(names)}", *rules]
    text = json.dumps({"grammars": [{"lark_grammar": "\n".join(lines)}]})
    if len(text) > 4 * MAX_BYTES:
        raise InvalidRequest("tools", f"the tools' schemas pass {4 * MAX_BYTES} bytes together")
    return _checked("tools", text)


def _object(schema: Any) -> Any:  # noqa: ANN401
    """A tool's parameters, an object even where they do not say so."""
    if isinstance(schema, dict) and "type" not in schema and "$ref" not in schema:
        return {"type": "object", **schema}
    return schema


def _json_schema(text: str) -> str:
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest("json_schema", f"`json_schema` is not JSON: {error}") from None
    if not isinstance(schema, dict):
        raise InvalidRequest("json_schema", "`json_schema` must be a JSON object")
    level: list[Any] = [schema]
    for _ in range(MAX_DEPTH):
        below = [one.values() if isinstance(one, dict) else one for one in level]
        level = [item for one in below for item in one if isinstance(item, dict | list)]
        if not level:
            break
    else:
        raise InvalidRequest(
            "json_schema", f"`json_schema` is nested deeper than {MAX_DEPTH}; make it flatter"
        )
    return json.dumps({"grammars": [{"json_schema": {**schema, "x-guidance": _JSON}}]})


@lru_cache(maxsize=256)
def _checked(field: str, grammar: str) -> str:
    """`grammar`, once it has been compiled and asked for its first token."""
    from llguidance import LLMatcher

    matcher = LLMatcher(_bytes(), grammar, log_level=0, limits=limits())
    if not matcher.is_error():
        matcher.compute_bitmask()
    if matcher.is_error():
        words = matcher.get_error().partition("\n<state>")[0][:500]
        raise InvalidRequest(field, f"`{field}` cannot be enforced: {words}")
    return grammar


@cache
def _bytes() -> LLTokenizer:
    """Compiling depends little on the vocabulary: bytes are the smallest."""
    from llguidance import LLTokenizer

    return LLTokenizer("byte")
