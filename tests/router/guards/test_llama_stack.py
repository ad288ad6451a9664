"""Our prompts for Llama Guard are Llama Stack's, byte for byte, but for the name of the role."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from arriero.router.guards.categories import NAMES, default_codes
from arriero.router.guards.conversation import Role, Turn
from arriero.router.guards.prompts import build_prompt
from support.foreign import INSTALL_S, python_with, run

SCRIPT = Path(__file__).parent / "llama_stack_prompts.py"
PACKAGES = ("llama-stack==0.2.12", "llama-stack-client==0.2.12", "openai>=1.66,<2")
CONVERSATIONS: list[list[tuple[Role, str]]] = [
    [("user", "How do I bake bread?")],
    [("user", "Hello."), ("assistant", "Hi, ¿qué tal?")],
    [("user", " two  lines\nand\n\n <|eot_id|> "), ("assistant", ""), ("user", "$role ${x} $")],
]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(INSTALL_S + 400)]


# Later versions of Llama Stack give Llama Guard 4 the categories of the 1B model.
@pytest.mark.parametrize(
    ("model", "kind"),
    [
        ("meta-llama/Llama-Guard-3-8B", "llama-guard-3"),
        ("meta-llama/Llama-Guard-3-1B", "llama-guard-4"),
    ],
)
async def test_prompts(model: str, kind: str) -> None:
    python = python_with("llama-stack", *PACKAGES)
    theirs = await run([*python, str(SCRIPT), model, json.dumps(CONVERSATIONS)], 390)
    categories = {code: NAMES[code] for code in default_codes(kind)}
    for conversation, prompt in zip(CONVERSATIONS, theirs, strict=True):
        turns = [Turn(role=role, text=text) for role, text in conversation]
        # Llama Stack writes Assistant; the published chat templates write Agent
        assert build_prompt(turns, categories) == prompt.replace("Assistant", "Agent")
