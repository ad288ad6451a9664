"""Grammars of answers that may call: held from the moment that a call begins.

Text runs free up to the beginning of a call of a strict tool; from there on its arguments fit the
tool's schema, and then text runs free again. With a form as well, the answer is calls or fits the
form. Knows the spellings of calls (`tools.parser` reads them); knows nothing of requests.

The beginning is a lazy lexeme of llguidance: the shortest text that ends in it wins over free text.
Spellings whose arguments are not written as JSON, `[f(a=1)]` and `f.call(a=1)`, and objects that do
not begin with the name, cannot be held to a schema: text may not contain them for a strict tool.

Source: llguidance's syntax.md, "Lazy lexemes" and "Structural tags".
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from arriero.router.grammar import MAX_CALLS, object_rules, parameters_rule

_WORD = re.compile(r"[A-Za-z0-9_-]")
_JSON = "start: %json"
"""How the grammar of a form of JSON begins."""
_KEYS = "type|function|parameters|arguments"


def strict_grammar(tools: Sequence[Mapping[str, Any]], *, tags: Sequence[str] = ()) -> str:
    """The grammar of free text in which every call of `tools` fits its schema.

    Args:
        tools: the strict ones, as templates take them.
        tags: special tokens after which a call may begin, of those that the tokenizer has.

    Raises:
        InvalidRequest: the parameters of a tool break a limit.
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
            parameters_rule(number, tool),
        ]
    return "\n".join(lines) + "\n"


def calls_or_form(tools: Sequence[Mapping[str, Any]], form: str, *, parallel: bool) -> str:
    """The grammar of an answer that is calls of `tools`, or else fits a form.

    Args:
        tools: as templates take them.
        form: the form's grammar. An object that fits it and looks like a call is taken for a call.
        parallel: whether there may be several calls.

    Raises:
        InvalidRequest: the parameters of a tool break a limit.
    """
    several = f' ("; " call){{0,{MAX_CALLS - 1}}}' if parallel else ""
    rules = ["start: calls | form", f"calls: call{several}", *object_rules(tools)]
    if form.startswith(_JSON):
        return "\n".join([*rules, "form: %json" + form.removeprefix(_JSON)])
    grammars = [
        {"name": "answer", "lark_grammar": "\n".join([*rules, "form: @own", ""])},
        {"name": "own", "lark_grammar": _lark(form)},
    ]
    return json.dumps({"grammars": grammars})


def _lark(form: str) -> str:
    """A form's grammar as Lark: that of a regular expression comes as JSON around it."""
    if not form.startswith("{"):
        return form
    (grammar,) = json.loads(form)["grammars"]
    lark: str = grammar["lark_grammar"]
    return lark


def _escaped(name: str) -> str:
    """A tool's name in a regular expression."""
    return "".join(char if _WORD.fullmatch(char) else f"\\{char}" for char in name)
