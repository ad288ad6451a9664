"""What an output must fit, as a client says it, to a grammar that the engine takes.

Every refusal is made here, before a request is queued: sizes and depths are looked at first, then
the grammar is compiled on fuel, with the same limits that the slices have. Words of a JSON Schema
that no mask can hold are left out and named; a pattern or a grammar that is the form itself is
taken whole or refused. Knows forms and limits; knows nothing of tokens' masks, which are
`shards.grammar`'s.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from arriero.router.proto.arriero.v1 import inference_pb2 as pb
from arriero.router.text.json_schema import Relaxed
from arriero.shards.errors import InvalidRequest
from arriero.shards.worker.grammar_masks import Compiler

if TYPE_CHECKING:
    from arriero.router.text.model_card import ModelCard

MAX_FORM_BYTES = 64 * 1024
MAX_CHOICES = 1024
MAX_DEPTH = 64
MAX_PROPERTIES = 4096
"""Most objects and lists of a schema."""
MAX_LEAST = 10_000
"""Largest `minItems`, `minLength` or `minProperties`: more would never be reached."""
MAX_CALLS = 16
"""Most calls of an answer that must call."""
MAX_CHECKED = 256

_SPACES = r"( |\n {0,16})"
"""White space between JSON's signs: enough to indent by, and no room for a model to lose itself."""
_REASON_CHARS = 300
MAX_NOTE_CHARS = 2000
"""Longest list of what is not enforced, in an answer's header."""
_MALFORMED = (
    "unclosed character class",
    "unclosed group",
    "unopened group",
    "missing expression",
)
"""Words of an error that say: a regular expression in no dialect. Other errors are of constructs
that no mask can hold, or of other dialects' spellings."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Form:
    """A form that the output must fit.

    Attributes:
        field: of the request, that errors name.
        grammar: as the engine takes it.
        loose: the same with `oneOf` read as `anyOf`, for where no mask can tell its branches apart;
            "" without any.
        not_enforced: what of a schema the grammar lacks, each with its place.
    """

    field: str
    grammar: str
    loose: str = ""
    not_enforced: tuple[str, ...] = ()


def described(not_enforced: Sequence[str]) -> str:
    """What is not enforced, as the value of a header: ASCII, of bounded length."""
    text = "; ".join(not_enforced)
    if len(text) > MAX_NOTE_CHARS:
        text = f"{text[:MAX_NOTE_CHARS]} and more; {len(not_enforced)} in all"
    return "".join(c if " " <= c <= "~" else ascii(c)[1:-1] for c in text)


def read_form(form: pb.StructuredOutput) -> Form | None:
    """What a form asks for; None when there is none.

    Raises:
        InvalidRequest: the form breaks a limit.
    """
    kind = form.WhichOneof("form")
    if kind is None:
        return None
    if kind == "choice":
        return Form(field=kind, grammar=_choice(form.choice.texts))
    if kind == "json_object":
        if not form.json_object:
            raise InvalidRequest(
                "json_object", "`json_object`=false is no form; set it, or leave it out"
            )
        return form_of_schemas(kind, [("start", kind, {"type": "object"})])
    text: str = getattr(form, kind)
    _check_size(kind, text)
    if kind == "json_schema":
        return form_of_schemas(kind, [("start", kind, _load(kind, text))])
    if kind == "regex":
        from llguidance import LLMatcher

        text = LLMatcher.grammar_from_regex(text)
    return Form(field=kind, grammar=text)


def call_form(tools: Sequence[Mapping[str, Any]], *, parallel: bool) -> Form:
    """The form of one call of `tools` or, when `parallel`, of several.

    It is the JSON that every Llama since 3.1 knows: {"name": …, "parameters": {…}}.

    Raises:
        InvalidRequest: the parameters of a tool break a limit.
    """
    several = f' ("; " call){{0,{MAX_CALLS - 1}}}' if parallel else ""
    lines = [f"start: call{several}", "call: " + " | ".join(f"call{i}" for i in range(len(tools)))]
    for number, tool in enumerate(tools):
        head = f'{{"name": {json.dumps(tool["function"]["name"])}, "parameters": '
        lines.append(f'call{number}: {json.dumps(head)} parameters{number} "}}"')
    return form_of_schemas("tools", parameter_schemas(tools), lines)


def parameter_schemas(tools: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, Any]]:
    """The rule `parametersN` for the arguments of each tool, as `form_of_schemas` takes it."""
    return [
        (f"parameters{number}", f"tools[{number}].parameters", _parameters(tool))
        for number, tool in enumerate(tools)
    ]


def _parameters(tool: Mapping[str, Any]) -> dict[str, Any]:
    schema: dict[str, Any] = tool["function"]["parameters"]
    if "type" not in schema and not ("$ref" in schema or "anyOf" in schema):
        return {**schema, "type": "object"}
    return schema


def form_of_schemas(
    field: str,
    schemas: Sequence[tuple[str, str, Any]],
    lines: Sequence[str] = (),
    wrap: Callable[[int, dict[str, Any]], dict[str, Any]] | None = None,
) -> Form:
    """A form of rules that are JSON Schemas.

    Args:
        field: see `Form`.
        schemas: name of the rule, field of the schema, and the schema.
        lines: other rules.
        wrap: gives the schema of a rule from the number and the schema of its entry in `schemas`.

    Raises:
        InvalidRequest: a schema breaks a limit.
    """
    rules: list[tuple[str, dict[str, Any]]] = []
    not_enforced: list[str] = []
    for number, (rule, where, schema) in enumerate(schemas):
        _check_schema(where, schema)
        relaxed = Relaxed(schema, _pattern_check(where))
        rules.append((rule, relaxed.schema if wrap is None else wrap(number, relaxed.schema)))
        prefix = "" if where == field else f"{where}: "
        not_enforced += [f"{prefix}{words}" for words in relaxed.not_enforced]

    def grammar(**options: bool) -> str:
        guided = {"x-guidance": {"whitespace_pattern": _SPACES} | options}
        texts = [f"{rule}: %json {json.dumps(schema | guided)}" for rule, schema in rules]
        return "\n".join([*lines, *texts]) + "\n"

    strict = grammar()
    return Form(
        field=field,
        grammar=strict,
        loose=grammar(coerce_one_of=True) if '"oneOf"' in strict else "",
        not_enforced=tuple(not_enforced),
    )


def _pattern_check(field: str) -> Callable[[str, str], bool]:
    """What tells whether a mask can hold a pattern of a schema.

    It raises `InvalidRequest` for one that is no pattern in any dialect.
    """

    def holds(pattern: str, at: str) -> bool:
        from llguidance import LLMatcher

        error = LLMatcher.validate_grammar(LLMatcher.grammar_from_regex(pattern))
        if not error:
            return True
        if any(words in error for words in _MALFORMED):
            reason = " ".join(error.split())[:_REASON_CHARS]
            raise InvalidRequest(
                field, f"`{field}`: the pattern at {at[:256]} is no regular expression: {reason}"
            )
        return False

    return holds


class GrammarCheck:
    """Compiles grammars for one model, to refuse those that the slices could not follow.

    Args:
        card: gives tokenizer, vocabulary and end tokens.
    """

    def __init__(self, card: ModelCard) -> None:
        self._compiler = Compiler(
            card.tokenizer_json.decode(),
            vocab_size=card.vocab_size,
            eos_token_ids=card.eos_token_ids,
        )
        self._ends = bool(card.eos_token_ids)
        self._model = card.model
        self._found: OrderedDict[str, str] = OrderedDict()
        self._one_at_a_time = threading.Lock()

    def warm(self) -> None:
        """Make the first check as fast as any; may be called from any thread.

        Raises:
            CheckpointError: the tokenizer cannot be used for grammars.
        """
        with self._one_at_a_time:
            self._compiler.warm()

    async def check(self, field: str, form: Form) -> Form:
        """The form as it can be followed.

        Raises:
            InvalidRequest: about `field`; it cannot.
        """
        if not self._ends:
            raise InvalidRequest(
                field, f"`{field}`: model {self._model!r} has no end token to close the output with"
            )
        error = await self._error(form.grammar)
        if form.loose and "oneOf" in error:
            error = await self._error(form.loose)
            notes = (*form.not_enforced, "oneOf (any of its schemas may fit, also several)")
            form = replace(form, grammar=form.loose, not_enforced=notes)
        if error:
            raise InvalidRequest(field, f"`{field}` cannot be followed: {error[:_REASON_CHARS]}")
        return form

    async def _error(self, grammar: str) -> str:
        error = self._found.get(grammar)
        if error is None:
            error = await asyncio.to_thread(self._compile, grammar)
            self._found[grammar] = error
            if len(self._found) > MAX_CHECKED:
                self._found.popitem(last=False)
        return error

    def _compile(self, grammar: str) -> str:
        with self._one_at_a_time:
            matcher = self._compiler.matcher(grammar)
            if not matcher.is_error():
                matcher.compute_bitmask()  # patterns cost their fuel here
            return matcher.get_error()


def _choice(texts: Sequence[str]) -> str:
    if not 1 <= len(texts) <= MAX_CHOICES:
        raise InvalidRequest(
            "choice", f"`choice` has {len(texts)} entries; give 1 to {MAX_CHOICES}"
        )
    if not all(texts):
        raise InvalidRequest("choice", "`choice` holds an empty text; leave it out")
    _check_size("choice", "".join(texts))
    # as JSON, whose strings Lark reads alike
    return "start: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in texts) + "\n"


def _check_size(field: str, text: str) -> None:
    size = len(text.encode())
    if not text or size > MAX_FORM_BYTES:
        raise InvalidRequest(field, f"`{field}` has {size} bytes; give 1 to {MAX_FORM_BYTES}")


def _load(field: str, text: str) -> Any:  # noqa: ANN401
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(field, f"`{field}` is not JSON: {error}") from None


def _check_least(field: str, level: Sequence[Any]) -> None:
    for one in level:
        for name in ("minItems", "minLength", "minProperties"):
            least = one.get(name) if isinstance(one, dict) else None
            if isinstance(least, int) and least > MAX_LEAST:
                raise InvalidRequest(
                    field, f"`{field}` has `{name}`={least}; the most is {MAX_LEAST}; lower it"
                )


def _check_schema(field: str, schema: Any) -> None:  # noqa: ANN401
    """Look at a JSON Schema's size and depth."""
    if not isinstance(schema, dict):
        raise InvalidRequest(field, f"`{field}` is no JSON Schema; give an object")
    level: list[Any] = [schema]
    num_nodes = depth = 0
    while level:
        depth += 1
        num_nodes += len(level)
        if depth > MAX_DEPTH or num_nodes > MAX_PROPERTIES:
            raise InvalidRequest(
                field,
                f"`{field}` is nested deeper than {MAX_DEPTH} or has more than {MAX_PROPERTIES} "
                "objects and lists; make it simpler",
            )
        _check_least(field, level)
        items = (one.values() if isinstance(one, dict) else one for one in level)
        level = [item for some in items for item in some if isinstance(item, dict | list)]
    if "x-guidance" in schema:
        raise InvalidRequest(field, f"`{field}` holds `x-guidance`, which is not supported")
    _check_size(field, json.dumps(schema))
