"""What an output must fit, as a client says it, to a grammar that the engine takes.

Every refusal is made here, before a request is queued: sizes and depths are looked at first, then
the grammar is compiled on fuel, with the same limits that the slices have. Knows forms and limits;
knows nothing of tokens' masks, which are `shards.grammar`'s.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from arriero.router.proto.arriero.v1 import inference_pb2 as pb
from arriero.shards.errors import InvalidRequest
from arriero.shards.grammar import Compiler

if TYPE_CHECKING:
    from arriero.router.card import ModelCard

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


def form_grammar(form: pb.StructuredOutput) -> str:
    """The grammar of a form; "" when there is none.

    Raises:
        InvalidRequest: the form breaks a limit.
    """
    kind = form.WhichOneof("form")
    if kind is None:
        return ""
    if kind == "choice":
        return _choice(form.choice.texts)
    if kind == "json_object":
        if not form.json_object:
            raise InvalidRequest(
                "json_object", "`json_object`=false is no form; set it, or leave it out"
            )
        return f"start: %json {_schema('json_object', {'type': 'object'})}\n"
    text: str = getattr(form, kind)
    _check_size(kind, text)
    if kind == "json_schema":
        return f"start: %json {_schema(kind, _load(kind, text))}\n"
    if kind == "regex":
        from llguidance import LLMatcher

        return LLMatcher.grammar_from_regex(text)
    return text


def call_grammar(tools: Sequence[Mapping[str, Any]], *, parallel: bool) -> str:
    """The grammar of one call of `tools` or, when `parallel`, of several.

    The form is the JSON that every Llama since 3.1 knows: {"name": …, "parameters": {…}}.

    Raises:
        InvalidRequest: the parameters of a tool break a limit.
    """
    several = f' ("; " call){{0,{MAX_CALLS - 1}}}' if parallel else ""
    lines = [f"start: call{several}", "call: " + " | ".join(f"call{i}" for i in range(len(tools)))]
    for number, tool in enumerate(tools):
        function = tool["function"]
        head = f'{{"name": {json.dumps(function["name"])}, "parameters": '
        schema = function["parameters"]
        if "type" not in schema and not ("$ref" in schema or "anyOf" in schema):
            schema = {**schema, "type": "object"}
        parameters = _schema(f"tools[{number}].parameters", schema)
        lines += [
            f'call{number}: {json.dumps(head)} parameters{number} "}}"',
            f"parameters{number}: %json {parameters}",
        ]
    return "\n".join(lines) + "\n"


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

    async def check(self, field: str, grammar: str) -> None:
        """Raise `InvalidRequest`, about `field`, unless `grammar` can be followed."""
        if not self._ends:
            raise InvalidRequest(
                field, f"`{field}`: model {self._model!r} has no end token to close the output with"
            )
        error = self._found.get(grammar)
        if error is None:
            error = await asyncio.to_thread(self._compile, grammar)
            self._found[grammar] = error
            if len(self._found) > MAX_CHECKED:
                self._found.popitem(last=False)
        if error:
            raise InvalidRequest(field, f"`{field}` cannot be followed: {error[:_REASON_CHARS]}")

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


def _schema(field: str, schema: Any) -> str:  # noqa: ANN401
    """A JSON Schema with our own white space, once its size and depth are looked at."""
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
    text = json.dumps({**schema, "x-guidance": {"whitespace_pattern": _SPACES}})
    _check_size(field, text)
    return text
