"""Agents of the libraries that people use, live: tools marked strict, forms, their own dumps.

Each has failed once on what its library sends by itself. The model is scripted; what a grammar does
to a real one is tested in test_structured.py.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
from pydantic import BaseModel
from tokenizers import Tokenizer

from support.frontdoor import Stack
from support.scripted import ANSWER, QUESTION, REPORT, base_url, scripted

pytestmark = pytest.mark.filterwarnings("ignore")  # what the libraries warn of is theirs


class Report(BaseModel):
    city: str
    sunny: bool


class Place(BaseModel):
    city: str


def get_weather(city: str) -> str:
    """The weather in a city."""
    return f"sunny in {city}"


@pytest.fixture
async def weather(llama_tokenizer: Tokenizer) -> AsyncIterator[Stack]:
    async with scripted(llama_tokenizer) as stack:
        yield stack


def grammars(stack: Stack) -> list[str]:
    return [request.params.grammar for request in stack.engine.submitted]


async def test_openai_parse(weather: Stack) -> None:
    tool = openai.pydantic_function_tool(Place, name="get_weather", description="The weather.")
    talk: list[Any] = [{"role": "user", "content": QUESTION}]
    async with openai.AsyncOpenAI(base_url=base_url(weather), api_key="none", max_retries=0) as ask:
        parsed = await ask.chat.completions.parse(model="tiny", messages=talk, tools=[tool])
        message = parsed.choices[0].message
        assert message.tool_calls is not None
        (call,) = message.tool_calls
        assert call.function.parsed_arguments == Place(city="La Paz")
        # the whole dump goes back, `parsed` and `parsed_arguments` in it
        talk += [
            message.model_dump(),
            {"role": "tool", "tool_call_id": call.id, "content": get_weather("La Paz")},
        ]
        last = await ask.chat.completions.parse(model="tiny", messages=talk, tools=[tool])
        assert last.choices[0].message.content == ANSWER
        async with ask.chat.completions.stream(
            model="tiny", messages=talk[:1], tools=[tool]
        ) as stream:
            streamed = await stream.get_final_completion()
        (call,) = streamed.choices[0].message.tool_calls or ()
        assert call.function.parsed_arguments == Place(city="La Paz")
    assert all("[lazy]" in grammar for grammar in grammars(weather))


async def test_pydantic_ai(llama_tokenizer: Tokenizer) -> None:
    pytest.importorskip("pydantic_ai", reason="pydantic-ai is not installed: arriero[clients]")
    from pydantic_ai import Agent, NativeOutput
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    async with scripted(llama_tokenizer) as stack:
        provider = OpenAIProvider(base_url=base_url(stack), api_key="none")
        model = OpenAIChatModel("tiny", provider=provider)
        told = await Agent(model, tools=[get_weather]).run(QUESTION)
        assert told.output == ANSWER
    async with scripted(llama_tokenizer, then=REPORT) as stack:
        provider = OpenAIProvider(base_url=base_url(stack), api_key="none")
        model = OpenAIChatModel("tiny", provider=provider)
        agent = Agent(model, tools=[get_weather], output_type=NativeOutput(Report))
        assert (await agent.run(QUESTION)).output == Report(city="La Paz", sunny=True)
        assert all("calls | form" in grammar for grammar in grammars(stack))


@pytest.mark.parametrize("interface", ["OpenAIChatCompletionsModel", "OpenAIResponsesModel"])
async def test_openai_agents(llama_tokenizer: Tokenizer, interface: str) -> None:
    agents = pytest.importorskip(
        "agents", reason="openai-agents is not installed: arriero[clients]"
    )
    agents.set_tracing_disabled(True)
    tool = agents.function_tool(get_weather)
    for kind, then, due in (
        (None, ANSWER, ANSWER),
        (Report, REPORT, Report(city="La Paz", sunny=True)),
    ):
        async with (
            scripted(llama_tokenizer, then=then) as stack,
            openai.AsyncOpenAI(base_url=base_url(stack), api_key="none", max_retries=0) as ask,
        ):
            model = getattr(agents, interface)(model="tiny", openai_client=ask)
            agent = agents.Agent(name="guide", model=model, tools=[tool], output_type=kind)
            told = await agents.Runner.run(agent, QUESTION)
            assert told.final_output == due
            stream = agents.Runner.run_streamed(agent, QUESTION)
            async for _ in stream.stream_events():
                pass
            assert stream.final_output == due


async def test_langchain_strict(llama_tokenizer: Tokenizer) -> None:
    pytest.importorskip("langchain_openai", reason="langchain-openai is not installed")
    from langchain_core.messages import HumanMessage, ToolMessage
    from langchain_core.tools import tool
    from langchain_openai import ChatOpenAI

    async with scripted(llama_tokenizer) as stack:
        chat = ChatOpenAI(
            model="tiny",
            base_url=base_url(stack),
            api_key="none",  # type: ignore[arg-type]
            max_retries=0,
        )
        bound = chat.bind_tools([tool(get_weather)], strict=True)
        talk: list[Any] = [HumanMessage(QUESTION)]
        answer: Any = await bound.ainvoke(talk)
        (call,) = answer.tool_calls
        talk += [answer, ToolMessage(get_weather(**call["args"]), tool_call_id=call["id"])]
        assert (await bound.ainvoke(talk)).content == ANSWER
        parts = [part async for part in bound.astream(talk[:1])]
        assert any(part.tool_call_chunks for part in parts)
    async with scripted(llama_tokenizer, first=REPORT) as stack:
        chat = ChatOpenAI(model="tiny", base_url=base_url(stack), api_key="none", max_retries=0)  # type: ignore[arg-type]
        formed = chat.with_structured_output(Report, method="json_schema", strict=True)
        assert await formed.ainvoke(QUESTION) == Report(city="La Paz", sunny=True)


async def test_litellm_sends_its_own_dump_back(
    weather: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # or its import asks the network
    litellm = pytest.importorskip("litellm", reason="litellm is not installed: arriero[clients]")
    given = {"model": "openai/tiny", "api_base": base_url(weather), "api_key": "none"}
    function = {"name": "get_weather", "parameters": Place.model_json_schema(), "strict": True}
    tools = [{"type": "function", "function": function}]
    talk: list[Any] = [{"role": "user", "content": QUESTION}]
    first = await litellm.acompletion(messages=talk, tools=tools, max_retries=0, **given)
    dump = first.choices[0].message.model_dump()
    assert "provider_specific_fields" in dump or "function_call" in dump
    (call,) = dump["tool_calls"]
    city = json.loads(call["function"]["arguments"])["city"]
    dump["provider_specific_fields"] = {"refusal": None}
    talk += [dump, {"role": "tool", "tool_call_id": call["id"], "content": get_weather(city)}]
    last = await litellm.acompletion(messages=talk, tools=tools, max_retries=0, **given)
    assert last.choices[0].message.content == ANSWER
    talk += [last.choices[0].message.model_dump(), {"role": "user", "content": "Thanks."}]
    assert (await litellm.acompletion(messages=talk, **given)).choices[0].message.content
    with pytest.raises(litellm.ContextWindowExceededError):
        await litellm.acompletion(messages=talk, max_tokens=10_000_000, max_retries=0, **given)
