"""The marks that models put around and before calls: the registry of `ToolCallParser`.

A wrap stands around calls that are JSON or Python (`<tool_call>{…}</tool_call>`); a head stands
before the arguments of one call and names its tool (`<function=name>{…}`). To teach the parser
another mark is to add a line here. Knows marks; knows nothing of how text arrives.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

OPENERS = ("<|python_tag|>", "<|python_start|>")
"""Tags of Llama's own; what follows one and is no call is code."""
ENDERS = ("<|eom_id|>", "<|eot_id|>", "<|eot|>", "<|python_end|>")


@dataclass(frozen=True, slots=True)
class Wrap:
    """Marks around calls.

    Attributes:
        opening: the text before them.
        closing: the text after them, which may be missing; "" for none.
        label: a word may stand behind the opening, such as a fence's language.
        sure: what stands within is meant as a call whatever its name; else it must name a tool on
            offer, and its object begins as a call's does.
        line_start: only at the start of a line.
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
    Wrap("<functioncall>", "</functioncall>"),  # tuned on glaive-function-calling
    Wrap("<tools>", "</tools>", sure=False),  # Hermes' own mark of the offer, given back
    Wrap("[TOOL_CALLS]"),
    Wrap("functools", line_start=True),
    Wrap("```", "```", label=True, sure=False),
)


@dataclass(frozen=True, slots=True)
class Head:
    """What names a tool before its arguments, a JSON object.

    Attributes:
        opening: the text it begins with.
        pattern: matches from the opening to the arguments' brace; group 1 is the name. It matches
            every beginning of itself that holds the opening.
        closing: the text after the arguments, which may be missing; "" for none.
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
