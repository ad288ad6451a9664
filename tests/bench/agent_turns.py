"""Turns of agents that write much of their earlier answers again: loads for `speculation.py`.

The recorded sessions of `tests/assets/agent_turns.json` are three agents, eight turns each: one
writes the same file with a small change in each turn, one calls a tool, one fills in a form; the
last two are held to a JSON schema. A turn's prompt has the instruction and the wish of that turn,
not the earlier answers, so the text that comes again cannot be copied from the prompt; it can only
be copied from what the agent wrote before. Nothing is forced: the answers are the model's own
greedy ones, up to its end token.

Each round of a measurement has a salt of its own, so that it begins without earlier outputs. The
first turns of a session (`LEARNED`) only fill the memory; every measured turn has a prompt that
this memory has never seen.

Knows prompts and repetition; knows nothing of speeds.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from arriero.shards.config.sampling_params import SamplingParams

FILE = Path(__file__).parents[1] / "assets" / "agent_turns.json"
LEARNED = 2
"""Turns at the start of a session that are not measured."""
_GRAM = 4
"""Tokens in a row that count as text that stood there before."""


@dataclass(frozen=True)
class Session:
    """The turns of an agent.

    Attributes:
        name: what the agent does.
        prompts: token ids of each turn.
        grammar: grammar of the answers; empty for free text.
    """

    name: str
    prompts: list[list[int]]
    grammar: str

    def sampling(self, output: int) -> SamplingParams:
        """Parameters of a turn: greedy, up to the end token or `output` tokens."""
        return SamplingParams(temperature=0.0, max_tokens=output, seed=0, grammar=self.grammar)


def sessions(tokenizer: Tokenizer) -> list[Session]:
    """The recorded sessions, in the chat template of SmolLM2."""
    made = []
    for session in json.loads(FILE.read_text())["sessions"]:
        texts = [
            f"<|im_start|>system\n{session['system']}<|im_end|>\n"
            f"<|im_start|>user\n{session['ask'].format(turn)}<|im_end|>\n<|im_start|>assistant\n"
            for turn in session["turns"]
        ]
        schema = session.get("schema")
        made.append(
            Session(
                session["name"],
                [tokenizer.encode(text, add_special_tokens=False).ids for text in texts],
                f"start: %json {json.dumps(schema)}\n" if schema else "",
            )
        )
    return made


def repeated(output: Sequence[int], sources: Sequence[Sequence[int]]) -> float:
    """Share of an output's tokens that end four tokens in a row of some source."""
    grams = {tuple(text[i : i + _GRAM]) for text in sources for i in range(len(text) - _GRAM + 1)}
    ends = range(_GRAM, len(output) + 1)
    return sum(tuple(output[end - _GRAM : end]) in grams for end in ends) / max(1, len(ends))
