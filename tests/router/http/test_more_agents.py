"""More libraries of agents, live: dspy, an MCP server's tools, and a stream that is read on."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import openai
import pytest
from tokenizers import Tokenizer

from support.scripted import ANSWER, QUESTION, base_url, scripted

pytestmark = pytest.mark.filterwarnings("ignore")  # what the libraries warn of is theirs

MCP_SERVER = Path(__file__).parent / "clients" / "mcp_server.py"
FIELDS = f"[[ ## answer ## ]]\n{ANSWER}\n\n[[ ## completed ## ]]"


@pytest.mark.parametrize("said", [FIELDS, f'{{"answer": "{ANSWER}"}}'], ids=["fields", "json"])
async def test_dspy(
    llama_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, said: str
) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # or its import asks the network
    monkeypatch.setenv("DSPY_CACHEDIR", str(tmp_path))
    dspy = pytest.importorskip("dspy", reason="dspy is not installed: arriero[clients]")
    adapter = dspy.ChatAdapter() if said == FIELDS else dspy.JSONAdapter()
    async with scripted(llama_tokenizer, first=said) as stack:
        model = dspy.LM(
            "openai/tiny", api_base=base_url(stack), api_key="none", cache=False, num_retries=0
        )
        with dspy.context(lm=model, adapter=adapter):
            told = await dspy.Predict("question -> answer").acall(question=QUESTION)
        assert told.answer == ANSWER
        assert len(stack.engine.submitted) == 1


@pytest.mark.parametrize("interface", ["OpenAIChatCompletionsModel", "OpenAIResponsesModel"])
async def test_openai_agents_with_an_mcp_server(llama_tokenizer: Tokenizer, interface: str) -> None:
    reason = "openai-agents is not installed: arriero[clients]"
    agents = pytest.importorskip("agents", reason=reason)
    from agents.mcp import MCPServerStdio

    agents.set_tracing_disabled(True)
    params: Any = {"command": sys.executable, "args": [str(MCP_SERVER)]}
    async with (
        scripted(llama_tokenizer) as stack,
        openai.AsyncOpenAI(base_url=base_url(stack), api_key="none", max_retries=0) as ask,
        MCPServerStdio(params=params, client_session_timeout_seconds=60) as server,
    ):
        model = getattr(agents, interface)(model="tiny", openai_client=ask)
        agent = agents.Agent(name="guide", model=model, mcp_servers=[server])
        told = await agents.Runner.run(agent, QUESTION)
        assert told.final_output == ANSWER
        first = stack.engine.submitted[0]
        assert "get_weather" in llama_tokenizer.decode(first.prompt)


async def test_the_openai_sdk_reads_a_stream_on(llama_tokenizer: Tokenizer) -> None:
    async with (
        scripted(llama_tokenizer, first=ANSWER) as stack,
        openai.AsyncOpenAI(base_url=base_url(stack), api_key="none", max_retries=0) as ask,
    ):
        stream = await ask.responses.create(model="tiny", input=QUESTION, stream=True)
        events = [event async for event in stream]
        first: Any = events[0]
        for after in (0, 3, len(events) - 2):
            rest = await ask.responses.retrieve(
                first.response.id, stream=True, starting_after=after
            )
            assert [event async for event in rest] == events[after + 1 :]
        whole = await ask.responses.retrieve(first.response.id)
        assert whole.output_text == ANSWER
