"""Grammars of answers that may call tools: a schema binds the arguments once a call begins.

Text is free up to the beginning of a call of a strict tool; then the arguments must fit the schema
of the tool, and after the call text is free again. With a form beside the tools, the answer is
either calls or text of the form. Knows the spellings of calls (`tools.parser` reads the same
spellings); knows nothing of requests.

The beginning is a lazy lexeme of llguidance: the shortest text that ends in the lexeme wins over
free text. A schema cannot bind spellings with arguments outside of JSON, `[f(a=1)]` and
`f.call(a=1)`, nor objects that do not begin with the name: text must not contain such calls of a
strict tool.

Source: llguidance's syntax.md, "Lazy lexemes" and "Structural tags".
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from arriero.router.text.constraints import MAX_CALLS, Form, form_of_schemas, parameter_schemas

_WORD = re.compile(r"[A-Za-z0-9_-]")
_JSON = "start: %json"
"""Beginning of the grammar of a JSON form."""
_KEYS = "type|function|parameters|arguments"


def strict_form(tools: Sequence[Mapping[str, Any]], *, tags: Sequence[str] = ()) -> Form:
    """The form of free text in which every call of `tools` fits the schema of the tool.

    Args:
        tools: strict tools, in the format of chat templates.
        tags: special tokens of the tokenizer after which a call may begin.

    Raises:
        InvalidRequest: the parameters of a tool exceed a limit.
    """
    names = "|".join(_escaped(tool["function"]["name"]) for tool in tools)
    parts = [f"json{number} | tagged{number}" for number in range(len(tools))]
    parts += [f"TEXT? {tag}" for tag in tags]
    lines = [
        f"start: ({' | '.join(parts)})* TEXT",
        r"TEXT: /(?s:.*)/ & ~LOOSE",
        rf"LOOSE: /((?s:.*)[\n\[,;])?\s*({names})(\.call)?\s*\((?s:.*)/"
        rf' | /(?s:.*)\{{\s*"({_KEYS})"(?s:.*)"({names})"(?s:.*)/',
    ]
    for number, tool in enumerate(tools):
        name = _escaped(tool["function"]["name"])
        lines += [
            rf'head{number}[lazy]: TEXT /\{{\s*"name"\s*:\s*"{name}"/',
            rf'json{number}: head{number} /\s*,\s*"(parameters|arguments)"\s*:\s*/ '
            rf"parameters{number} /\s*\}}/",
            rf"tag{number}[lazy]: TEXT /<function=\s*{name}\s*>\s*/",
            rf'tagged{number}: tag{number} parameters{number} /\s*/ "</function>"',
        ]
    return form_of_schemas("tools", parameter_schemas(tools), lines)


def calls_or_form(tools: Sequence[Mapping[str, Any]], form: Form, *, parallel: bool) -> Form:
    """The form of an answer that is calls of `tools`, or else fits another form.

    Each call is a JSON Schema. Beside another JSON Schema, llguidance tells only such rules apart
    character by character: its lexer takes the longest lexeme, and the beginning of a call as a
    single lexeme would swallow the beginning of the other schema.

    Args:
        tools: tools in the format of chat templates.
        form: form of an answer without calls. An object that fits the form and looks like a call
            counts as a call.
        parallel: whether several calls are allowed.

    Raises:
        InvalidRequest: the parameters of a tool exceed a limit.
    """
    several = f' ("; " call){{0,{MAX_CALLS - 1}}}' if parallel else ""
    choices = " | ".join(f"call{number}" for number in range(len(tools)))
    lines = ["start: calls | form", f"calls: call{several}", f"call: {choices}"]
    schemas = [
        (f"call{number}", field, schema)
        for number, (_, field, schema) in enumerate(parameter_schemas(tools))
    ]

    def wrap(number: int, parameters: dict[str, Any]) -> dict[str, Any]:
        return {
            "type": "object",
            "properties": {
                "name": {"const": tools[number]["function"]["name"]},
                "parameters": _rebased(parameters, "#/properties/parameters"),
            },
            "required": ["name", "parameters"],
            "additionalProperties": False,
        }

    calls = form_of_schemas("tools", schemas, lines, wrap)
    loose = ""
    if calls.loose or form.loose:
        loose = _joined(calls.loose or calls.grammar, form.loose or form.grammar)
    return Form(
        field=form.field,
        grammar=_joined(calls.grammar, form.grammar),
        loose=loose,
        not_enforced=(*form.not_enforced, *calls.not_enforced),
    )


def _joined(calls: str, form: str) -> str:
    """The grammar of `calls` with the rule `form` added."""
    if form.startswith(_JSON):
        return calls + "form: %json" + form.removeprefix(_JSON)
    grammars = [
        {"name": "answer", "lark_grammar": f"{calls}form: @own\n"},
        {"name": "own", "lark_grammar": _lark(form)},
    ]
    return json.dumps({"grammars": grammars})


def _rebased(schema: Any, root: str) -> Any:  # noqa: ANN401
    """A schema for the place `root` within another schema, with local references adapted."""
    if isinstance(schema, list):
        return [_rebased(item, root) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: root + item[1:]
        if key == "$ref" and isinstance(item, str) and item.startswith("#")
        else _rebased(item, root)
        for key, item in schema.items()
    }


def _lark(form: str) -> str:
    """The grammar of a form as Lark; a regular expression has its grammar within JSON."""
    if not form.startswith("{"):
        return form
    (grammar,) = json.loads(form)["grammars"]
    lark: str = grammar["lark_grammar"]
    return lark


def _escaped(name: str) -> str:
    """The name of a tool, escaped for a regular expression."""
    return "".join(char if _WORD.fullmatch(char) else f"\\{char}" for char in name)
