"""The safety policy of a tenant: which guard judges inputs and outputs, and what follows.

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
class SafetyPolicy:
    """What a guard checks for a tenant.

    Attributes:
        guard: id of the served guard model.
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
        on_loss: "closed" treats an input or output without a verdict (guard lost, slow, or without
            a clear answer) as an error; "open" lets it pass.
        timeout_s: seconds after which a judgement counts as lost.
    """

    guard: str
    input: InputAction = "off"
    output: OutputAction = "off"
    categories: Mapping[str, str] = field(default_factory=dict)
    window: int = 32
    overlap: int = 64
    on_loss: LossAction = "closed"
    timeout_s: float = 10.0

    @property
    def checks(self) -> bool:
        """Whether anything is checked."""
        return self.input != "off" or self.output != "off"
