"""Structured outputs: from the form in a request to a grammar for the engine.

All refusals happen here, before a request is queued: first by size and depth, then by compiling the
grammar with the slices' own limits on work ("fuel"). Keywords of a JSON Schema that no mask can
enforce are left out and reported; a pattern or a grammar that is the form itself is enforced in
full or refused. Knows forms and limits; knows nothing of token masks (see
`shards.worker.grammar_masks`).
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
"""Largest number of objects and lists in a schema."""
MAX_MINIMUM = 10_000
"""Largest `minItems`, `minLength` or `minProperties`; no output reaches more."""
MAX_CALLS = 16
"""Largest number of calls in an answer that must call tools."""
MAX_CACHED_CHECKS = 256
"""Largest number of grammars with a cached result of the check."""

_SPACES = r"( |\n {0,16})"
"""White space between JSON tokens: enough for indentation, too little for an endless run."""
_REASON_CHARS = 300
MAX_NOTE_CHARS = 2000
"""Largest number of characters of the header that lists keywords without enforcement."""
_MALFORMED = (
    "unclosed character class",
    "unclosed group",
    "unopened group",
    "missing expression",
)
"""Words of llguidance's errors for texts that are no regular expression in any dialect.

Other errors are about constructs that no mask can enforce, or spellings of other dialects.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Form:
    """A form that the output must fit.

    Attributes:
        field: field of the request, for errors.
        grammar: grammar for the engine.
        loose: the grammar with `oneOf` read as `anyOf`, for branches that no mask can tell apart;
            "" for a form without `oneOf`.
        not_enforced: keywords of a schema that the grammar does not enforce, with their places.
    """

    field: str
    grammar: str
    loose: str = ""
    not_enforced: tuple[str, ...] = ()


def described(not_enforced: Sequence[str]) -> str:
    """The keywords without enforcement as the value of a header: ASCII, of limited length."""
    text = "; ".join(not_enforced)
    if len(text) > MAX_NOTE_CHARS:
        text = f"{text[:MAX_NOTE_CHARS]} and more; {len(not_enforced)} in all"
    return "".join(c if " " <= c <= "~" else ascii(c)[1:-1] for c in text)


def read_form(form: pb.StructuredOutput) -> Form | None:
    """The form of a request; None when the request has no form.

    Raises:
        InvalidRequest: the form exceeds a limit.
    """
    kind = form.WhichOneof("form")
    if kind is None:
        return None
    if kind == "choice":
        return Form(field=kind, grammar=_choice(form.choice.texts))
    if kind == "json_object":
        if not form.json_object:
            raise InvalidRequest(
                "json_object", "`json_object`=false is no form; set true, or leave the field out"
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
    """The form of a call of `tools` or, with `parallel`, of several calls.

    A call is the JSON of all Llamas since 3.1: {"name": …, "parameters": {…}}.

    Raises:
        InvalidRequest: the parameters of a tool exceed a limit.
    """
    several = f' ("; " call){{0,{MAX_CALLS - 1}}}' if parallel else ""
    lines = [f"start: call{several}", "call: " + " | ".join(f"call{i}" for i in range(len(tools)))]
    for number, tool in enumerate(tools):
        head = f'{{"name": {json.dumps(tool["function"]["name"])}, "parameters": '
        lines.append(f'call{number}: {json.dumps(head)} parameters{number} "}}"')
    return form_of_schemas("tools", parameter_schemas(tools), lines)


def parameter_schemas(tools: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, Any]]:
    """The rule `parametersN` for the arguments of each tool, in the format of `form_of_schemas`."""
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
        wrap: turns number and schema of an entry in `schemas` into the schema of the rule.

    Raises:
        InvalidRequest: a schema exceeds a limit.
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
    """A function that tells whether a mask can enforce a pattern of a schema.

    The function raises `InvalidRequest` for a text that is no regular expression in any dialect.
    """

    def can_enforce(pattern: str, at: str) -> bool:
        from llguidance import LLMatcher

        error = LLMatcher.validate_grammar(LLMatcher.grammar_from_regex(pattern))
        if not error:
            return True
        if any(words in error for words in _MALFORMED):
            reason = " ".join(error.split())[:_REASON_CHARS]
            raise InvalidRequest(
                field,
                f"`{field}`: the pattern at {at[:256]} is no regular expression: {reason}; correct "
                "the pattern",
            )
        return False

    return can_enforce


class GrammarCheck:
    """Compiles grammars for a model, to refuse grammars that the slices cannot follow.

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
        self._errors: OrderedDict[str, str] = OrderedDict()  # by grammar; "" for a good grammar
        self._lock = threading.Lock()

    def warm(self) -> None:
        """Prepare the compiler, so that the first check is as fast as later checks; thread-safe.

        Raises:
            CheckpointError: grammars cannot use the tokenizer.
        """
        with self._lock:
            self._compiler.warm()

    async def check(self, field: str, form: Form) -> Form:
        """The form with a grammar that the slices can follow.

        Raises:
            InvalidRequest: about `field`; the slices cannot follow the grammar.
        """
        if not self._ends:
            raise InvalidRequest(
                field,
                f"`{field}`: model {self._model!r} has no end token, so the output could not end; "
                f"leave `{field}` out",
            )
        error = await self._error(form.grammar)
        if form.loose and "oneOf" in error:
            error = await self._error(form.loose)
            notes = (*form.not_enforced, "oneOf (several of its schemas may fit at once)")
            form = replace(form, grammar=form.loose, not_enforced=notes)
        if error:
            raise InvalidRequest(
                field, f"`{field}` cannot be enforced: {error[:_REASON_CHARS]}; change the form"
            )
        return form

    async def _error(self, grammar: str) -> str:
        error = self._errors.get(grammar)
        if error is None:
            error = await asyncio.to_thread(self._compile, grammar)
            self._errors[grammar] = error
            if len(self._errors) > MAX_CACHED_CHECKS:
                self._errors.popitem(last=False)
        return error

    def _compile(self, grammar: str) -> str:
        with self._lock:
            matcher = self._compiler.matcher(grammar)
            if not matcher.is_error():
                matcher.compute_bitmask()  # patterns spend their fuel here
            return matcher.get_error()


def _choice(texts: Sequence[str]) -> str:
    if not 1 <= len(texts) <= MAX_CHOICES:
        raise InvalidRequest(
            "choice", f"`choice` has {len(texts)} entries; give 1 to {MAX_CHOICES}"
        )
    if not all(texts):
        raise InvalidRequest("choice", "`choice` has an empty text; leave the text out")
    _check_size("choice", "".join(texts))
    # JSON strings are strings of Lark too.
    return "start: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in texts) + "\n"


def _check_size(field: str, text: str) -> None:
    size = len(text.encode())
    if not text or size > MAX_FORM_BYTES:
        raise InvalidRequest(field, f"`{field}` has {size} bytes; give 1 to {MAX_FORM_BYTES}")


def _load(field: str, text: str) -> Any:  # noqa: ANN401
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(field, f"`{field}` is not JSON: {error}; correct the text") from None


def _check_minimums(field: str, level: Sequence[Any]) -> None:
    for node in level:
        for name in ("minItems", "minLength", "minProperties"):
            minimum = node.get(name) if isinstance(node, dict) else None
            if isinstance(minimum, int) and minimum > MAX_MINIMUM:
                raise InvalidRequest(
                    field,
                    f"`{field}` has `{name}`={minimum}; the limit is {MAX_MINIMUM}: lower `{name}`",
                )


def _check_schema(field: str, schema: Any) -> None:  # noqa: ANN401
    """Refuse a JSON Schema that is too large or too deep."""
    if not isinstance(schema, dict):
        kind = type(schema).__name__
        raise InvalidRequest(field, f"`{field}` is a {kind}; give a JSON Schema that is an object")
    level: list[Any] = [schema]
    num_nodes = depth = 0
    while level:
        depth += 1
        num_nodes += len(level)
        if depth > MAX_DEPTH or num_nodes > MAX_PROPERTIES:
            raise InvalidRequest(
                field,
                f"`{field}` is nested deeper than {MAX_DEPTH} levels or has more than "
                f"{MAX_PROPERTIES} objects and lists; simplify the schema",
            )
        _check_minimums(field, level)
        children = (node.values() if isinstance(node, dict) else node for node in level)
        level = [item for items in children for item in items if isinstance(item, dict | list)]
    if "x-guidance" in schema:
        raise InvalidRequest(
            field, f"`{field}` has `x-guidance`, which is not supported; leave `x-guidance` out"
        )
    _check_size(field, json.dumps(schema))
