"""Clients whose packages do not fit into our environment, live, each in one of its own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from support.foreign import BUILD, INSTALL_S, node_with, python_with, run
from support.scripted import ANSWER, QUESTION, REPORT, base_url, scripted

CLIENTS = Path(__file__).parent / "clients"
START_S = 390
"""For a client whose imports alone take ten seconds of computing: two starts in a test's time."""
CALL = ["get_weather", {"city": "La Paz"}]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(INSTALL_S + 200)]


async def test_instructor(llama_tokenizer: Tokenizer) -> None:
    python = python_with("instructor", "instructor>=1.11")
    script = str(CLIENTS / "instructor_client.py")
    report = json.loads(REPORT)
    for form, tool in (("whole", "Report"), ("parts", "PartialReport")):
        call = json.dumps({"name": tool, "parameters": report})
        for modes, said in ((["TOOLS", "TOOLS_STRICT"], call), (["JSON_SCHEMA"], REPORT)):
            async with scripted(llama_tokenizer, first=said) as stack:
                told = await run([*python, script, base_url(stack), form, *modes])
            assert told == dict.fromkeys(modes, report), form


async def test_llama_index(llama_tokenizer: Tokenizer) -> None:
    python = python_with("llama-index", "llama-index-llms-openai-like>=0.5")
    async with scripted(llama_tokenizer) as stack:
        told = await run([*python, str(CLIENTS / "llama_index_client.py"), base_url(stack)])
    assert told == {"call": CALL, "answer": ANSWER, "streamed": ANSWER}


async def test_llama_stack(llama_tokenizer: Tokenizer) -> None:
    packages = ("llama-stack==0.2.12", "llama-stack-client==0.2.12", "openai>=1.66,<2")
    script = str(CLIENTS / "llama_stack_adapter.py")
    command = [*python_with("llama-stack", *packages), script]
    known = {"model": "tiny", "health": "OK"}
    async with scripted(llama_tokenizer) as stack:
        came = await run([*command, base_url(stack), "tools"], START_S)
    assert came == {
        **known,
        "call": CALL,
        "streamed_call": {"text": "", "calls": [CALL]},
        "answer": ANSWER,
        "streamed": {"text": ANSWER, "calls": []},
    }
    async with scripted(llama_tokenizer, first=REPORT) as stack:
        came = await run([*command, base_url(stack), "form"], START_S)
        forms = [request.params.grammar for request in stack.engine.submitted]
    report = json.loads(REPORT)
    assert came == {**known, "form": report, "passed_on": report}
    assert forms[0] and not forms[1]


async def test_the_ai_sdk(llama_tokenizer: Tokenizer) -> None:
    node = node_with("ai@6", "@ai-sdk/openai-compatible@2", "@ai-sdk/openai@3")
    script = BUILD / "node" / "ai_sdk_client.mjs"  # beside its packages, where Node looks for them
    shutil.copy(CLIENTS / "ai_sdk_client.mjs", script)
    async with scripted(llama_tokenizer) as stack:
        told = await run([*node, str(script), base_url(stack)])
    expected = {"loop": ANSWER, "calls": [CALL], "streamed": ANSWER, "usage": True}
    assert told == {"chat": expected, "responses": expected}
    questions = [request.prompt for request in stack.engine.submitted]
    assert len(questions) == 8
    assert all(QUESTION in llama_tokenizer.decode(prompt) for prompt in questions)
