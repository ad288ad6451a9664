"""The marks that models put around and before calls, as a registry for `ToolCallParser`.

A wrap goes around calls in JSON or Python (`<tool_call>{…}</tool_call>`); a head goes before the
arguments of a call and names the tool (`<function=name>{…}`). A new mark is a new line here. Knows
marks; knows nothing of streams.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

OPENERS = ("<|python_tag|>", "<|python_start|>")
"""Llama's own tags before calls; other text after a tag is code."""
ENDERS = ("<|eom_id|>", "<|eot_id|>", "<|eot|>", "<|python_end|>")
"""Llama's own tags after calls and code."""


@dataclass(frozen=True, slots=True)
class Wrap:
    """Marks around calls.

    Attributes:
        opening: text before the calls.
        closing: text after the calls, which may be missing; "" for none.
        label: a word may follow the opening, such as a fence's language.
        sure: the text within is a call whatever the name; otherwise the text must name an offered
            tool, and an object must begin as a call.
        line_start: the wrap counts only at the start of a line.
    """

    opening: str
    closing: str = ""
    label: bool = False
    sure: bool = True
    line_start: bool = False


WRAPS = (
    Wrap("<tool_call>", "</tool_call>"),  # Hermes, Groq's tool-use models
    Wrap("<tool_calls>", "</tool_calls>"),
    Wrap("<|tool_call|>", "<|/tool_call|>"),  # also without a closing
    Wrap("<|tool_call_start|>", "<|tool_call_end|>"),
    Wrap("<|tool_calls|>", "<|/tool_calls|>"),
    Wrap("<function_call>", "</function_call>"),
    Wrap("<functioncall>", "</functioncall>"),  # models trained on glaive-function-calling
    Wrap("<tools>", "</tools>", sure=False),  # Hermes' own mark around offered tools
    Wrap("[TOOL_CALLS]"),
    Wrap("functools", line_start=True),
    Wrap("```", "```", label=True, sure=False),
)


@dataclass(frozen=True, slots=True)
class Head:
    """A mark with the name of a tool, before the arguments as a JSON object.

    Attributes:
        opening: beginning of the mark.
        pattern: matches from the opening to the brace of the arguments; group 1 is the name. The
            pattern also matches a mark that is cut off anywhere after the opening.
        closing: text after the arguments, which may be missing; "" for none.
    """

    opening: str
    pattern: re.Pattern[str]
    closing: str = ""


HEADS = (
    Head("<function=", re.compile(r"<function=\s*([\w.-]*)\s*>?\s*"), "</function>"),  # Llama 3.1
    Head(
        "[TOOL_CALLS]",
        re.compile(r"\[TOOL_CALLS\]\s*([\w.-]*)\s*(?:\[(?:A(?:R(?:G(?:S\]?)?)?)?)?)?\s*"),
    ),
)
