"""Chat templates: the checkpoint's own Jinja, run in a sandbox.

The sandbox has the extensions of Hugging Face's templates (`raise_exception`, `strftime_now`,
`tojson` that keeps non-ASCII, loop controls, the `generation` block, trimmed blocks) and limits the
size of the output and the time of a run. Knows Jinja; knows nothing of tokens.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from arriero.shards.errors import CheckpointError, InvalidRequest

MAX_CHARS = 64 * 1024 * 1024
"""Largest number of characters of a template's output."""
MAX_SECONDS = 20.0
"""Largest number of seconds of a run; checked after each piece of output."""
MAX_REPEAT = 1_000_000
"""Largest length of a string or list that `*` may produce."""
MAX_EXPONENT = 64
"""Largest exponent of `**`."""

_OUTSIDE_ASCII = re.compile("[^\x00-\x7f\ue000-\uf8ff]")

_WORD = re.compile(r"\w+")


class TemplateError(InvalidRequest):
    """The template refused the conversation, or failed."""

    def __init__(self, message: str) -> None:
        super().__init__("messages", message)


class ChatTemplate:
    """A compiled template; safe to use from several threads at once.

    Args:
        source: Jinja source.

    Raises:
        CheckpointError: the source does not compile.
    """

    def __init__(self, source: str) -> None:
        try:
            self._template = _environment().from_string(source)
        except (jinja2.TemplateError, RecursionError) as error:
            raise CheckpointError(
                f"chat template does not compile: {error}; correct the Jinja source"
            ) from error
        self.source = source
        self._words = frozenset(_WORD.findall(source))

    def reads(self, name: str) -> bool:
        """Whether the source contains the name of a variable."""
        return name in self._words

    @property
    def knows_tools(self) -> bool:
        """Whether the source contains the variable `tools`."""
        return self.reads("tools")

    def render(self, variables: Mapping[str, Any]) -> str:
        """The conversation as text.

        Raises:
            TemplateError: the template raised an error, or exceeded `MAX_CHARS` or `MAX_SECONDS`.
        """
        deadline_s = time.monotonic() + MAX_SECONDS
        parts: list[str] = []
        size = 0
        try:
            for part in self._template.generate(variables):
                parts.append(part)
                size += len(part)
                if size > MAX_CHARS:
                    raise TemplateError(
                        f"the chat template wrote more than {MAX_CHARS} characters; shorten the "
                        "conversation"
                    )
                if time.monotonic() > deadline_s:
                    raise TemplateError(
                        f"the chat template ran longer than {MAX_SECONDS:g} s; shorten the "
                        "conversation"
                    )
        except InvalidRequest:
            raise
        except Exception as error:  # a template can raise any exception of Python
            raise TemplateError(f"the chat template failed: {error}") from error
        return "".join(parts)


class _Generation(Extension):
    """The `generation` block marks the assistant's words for training; here it has no effect."""

    tags = {"generation"}  # noqa: RUF012  # as the base class declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Parse to the body of the block."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Environment(ImmutableSandboxedEnvironment):
    """A sandbox that also limits the operators `*` and `**`, whose results can be huge."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(
        self,
        context: jinja2.runtime.Context,
        operator: str,
        left: Any,  # noqa: ANN401
        right: Any,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        """Refuse products above `MAX_REPEAT` items and exponents above `MAX_EXPONENT`."""
        for sequence, factor in ((left, right), (right, left)):
            if isinstance(sequence, str | list | tuple) and isinstance(factor, int):
                if len(sequence) * factor > MAX_REPEAT:
                    raise OverflowError(f"a product has more than {MAX_REPEAT} items")
        if operator == "**" and isinstance(right, int | float) and abs(right) > MAX_EXPONENT:
            raise OverflowError(f"an exponent is above {MAX_EXPONENT}")
        return super().call_binop(context, operator, left, right)


def _environment() -> _Environment:
    environment = _Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[LoopControlExtension, _Generation]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(f"the chat template refuses the conversation: {message}")


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _tojson(
    value: Any,  # noqa: ANN401
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    text = json.dumps(
        value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys
    )
    # Private-use characters stay unescaped: they may be marks (see `special_token_guard`).
    return _OUTSIDE_ASCII.sub(lambda c: json.dumps(c[0])[1:-1], text) if ensure_ascii else text
