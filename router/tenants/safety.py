"""The safety policy of a tenant: what judges inputs and outputs, and what follows.

Knows settings and their limits; knows nothing of guards, prompts and streams.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

InputAction = Literal["off", "annotate", "refuse"]
OutputAction = Literal["off", "annotate", "cut"]
LossAction = Literal["open", "closed"]


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptGuardPolicy:
    """What Prompt Guard checks for a tenant: injections in texts of users and tools.

    Attributes:
        input: "annotate" adds the verdict to the answer; "refuse" refuses the request; "off" does
            not check.
        threshold: probability of an injection, 0 to 1, from which on a text is unsafe.
    """

    input: InputAction
    threshold: float = 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class SafetyPolicy:
    """What guards check for a tenant.

    Attributes:
        guard: id of the served guard model; "" where only Prompt Guard checks.
        input: "annotate" adds the verdict on the input to the answer; "refuse" refuses the request
            of an unsafe input; "off" does not check.
        output: "annotate" adds the verdict on the output to the answer; "cut" shows nothing before
            a guard has judged it, and ends an unsafe output; "off" does not check.
        categories: categories to check, by code; empty for the guard's own. The text of a code is
            its name: {"S1": "Violent Crimes", "X1": "Advice on lock picking"}; an empty text takes
            Meta's name of the code.
        window: output tokens between two judgements under "cut".
        overlap: characters at the end of judged text that stay hidden until the next judgement
            under "cut"; a condemned expression of at most so many characters is never shown in
            part.
        prompt_guard: what Prompt Guard checks; None for nothing.
        on_loss: "closed" treats an input or output without a verdict (guard lost, slow, or without
            a clear answer) as an error; "open" lets it pass.
        timeout_s: seconds after which a judgement counts as lost.
    """

    guard: str = ""
    input: InputAction = "off"
    output: OutputAction = "off"
    categories: Mapping[str, str] = field(default_factory=dict)
    window: int = 32
    overlap: int = 64
    prompt_guard: PromptGuardPolicy | None = None
    on_loss: LossAction = "closed"
    timeout_s: float = 10.0

    @property
    def checks(self) -> bool:
        """Whether anything is checked."""
        return self.input != "off" or self.output != "off" or self.checks_injections

    @property
    def checks_injections(self) -> bool:
        """Whether Prompt Guard is asked."""
        return self.prompt_guard is not None and self.prompt_guard.input != "off"
