"""`/v1/messages` over real sockets, asked by Anthropic's client."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from pydantic import BaseModel
from tokenizers import Tokenizer

from arriero.router import templates
from arriero.router.gateway import GatewayConfig
from arriero.shards.engine.types import EngineRequest
from support.frontdoor import Stack, make_card, serve

anthropic = pytest.importorskip("anthropic", reason="anthropic is not installed: arriero[clients]")

CALL = '{"name": "get_weather", "parameters": {"city": "La Paz"}}'
RESULT = "sunny in La Paz"
ANSWER = "It is sunny."
TOOL: Any = {
    "name": "get_weather",
    "description": "The weather in a city.",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
    },
}
QUESTION: Any = {"role": "user", "content": "How is the weather in La Paz?"}


class Report(BaseModel):
    city: str
    sunny: bool


@pytest.fixture
async def weather(llama_tokenizer: Tokenizer) -> AsyncIterator[Stack]:
    """A model that calls the tool, answers once it has the result, and reports when asked to."""
    call, answer, report = (
        llama_tokenizer.encode(text, add_special_tokens=False).ids
        for text in (CALL, ANSWER, '{"city": "La Paz", "sunny": true}')
    )

    def policy(request: EngineRequest, index: int, position: int) -> int:
        prompt = llama_tokenizer.decode(request.prompt)
        words = answer if RESULT in prompt or "get_weather" not in prompt else call
        words = report if "REPORT" in prompt else words
        return words[position] if position < len(words) else 1

    card = make_card(llama_tokenizer, templates.read("llama3.1"), max_model_len=8192)
    config = GatewayConfig(http_address="127.0.0.1:0", models=("tiny",))
    async with serve(card, policy, config=config) as stack:
        yield stack


def url(stack: Stack) -> str:
    return f"http://127.0.0.1:{stack.gateway.http_port}"


@pytest.fixture
async def api(weather: Stack) -> AsyncIterator[anthropic.AsyncAnthropic]:
    async with anthropic.AsyncAnthropic(
        base_url=url(weather), api_key="none", max_retries=0
    ) as client:
        yield client


def ask(**changes: Any) -> dict[str, Any]:  # noqa: ANN401
    return {"model": "tiny", "max_tokens": 100, "messages": [QUESTION]} | changes


async def test_create(weather: Stack, api: anthropic.AsyncAnthropic) -> None:
    message = await api.messages.create(**ask(system="Be brief."))
    assert [block.model_dump() for block in message.content if block.type == "text"] == [
        {"citations": None, "text": ANSWER, "type": "text"}
    ]
    assert (message.stop_reason, message.role, message.model) == ("end_turn", "assistant", "tiny")
    usage = message.usage
    assert usage.cache_read_input_tokens == 16
    assert message._request_id
    counted = await api.messages.count_tokens(model="tiny", messages=[QUESTION], system="Be brief.")
    assert (
        counted.input_tokens == usage.input_tokens + 16 == len(weather.engine.submitted[-1].prompt)
    )


async def test_tools_plain_and_streamed(weather: Stack, api: anthropic.AsyncAnthropic) -> None:
    whole = await api.messages.create(**ask(tools=[TOOL]))
    (call,) = whole.content
    assert whole.stop_reason == "tool_use" and call.type == "tool_use"
    assert (call.name, call.input) == ("get_weather", {"city": "La Paz"})
    async with api.messages.stream(**ask(tools=[TOOL])) as stream:
        kinds = [event.type async for event in stream]
        streamed = await stream.get_final_message()
    assert kinds[0] == "message_start" and kinds[-1] == "message_stop"
    assert streamed.content[0].model_dump(exclude={"id"}) == call.model_dump(exclude={"id"})
    back = [
        QUESTION,
        {"role": "assistant", "content": [call.model_dump() | {"caller": {"type": "direct"}}]},
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": call.id, "content": RESULT},
                {"type": "text", "text": "Well?", "cache_control": {"type": "ephemeral"}},
            ],
        },
    ]
    async with api.messages.stream(**ask(tools=[TOOL], messages=back)) as stream:
        texts = [text async for text in stream.text_stream]
        final = await stream.get_final_message()
    assert "".join(texts) == ANSWER and final.stop_reason == "end_turn"
    assert final.usage.input_tokens + 16 == len(weather.engine.submitted[-1].prompt)


async def test_parse(weather: Stack, api: anthropic.AsyncAnthropic) -> None:
    asked = ask(messages=[{"role": "user", "content": "REPORT please"}])
    parsed = await api.messages.parse(**asked, output_format=Report)
    assert parsed.parsed_output == Report(city="La Paz", sunny=True)
    assert '"sunny"' in weather.engine.submitted[-1].params.grammar


async def test_stops_and_limits(weather: Stack, api: anthropic.AsyncAnthropic) -> None:
    stopped = await api.messages.create(**ask(stop_sequences=[" sunny"]))
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", " sunny")
    cut = await api.messages.create(**ask(max_tokens=2))
    assert cut.stop_reason == "max_tokens" and cut.usage.output_tokens == 2
    await api.messages.create(**ask(max_tokens=20_000))  # lowered to the room
    submitted = weather.engine.submitted[-1]
    assert submitted.params.max_tokens == 8192 - len(submitted.prompt)
    # a call that is cut off is text: a client would run it
    half = await api.messages.create(**ask(tools=[TOOL], max_tokens=9))
    assert half.stop_reason == "max_tokens" and [b.type for b in half.content] == ["text"]


async def test_the_assistants_turn_is_continued(
    weather: Stack, api: anthropic.AsyncAnthropic
) -> None:
    begun = {"role": "assistant", "content": "It is"}
    await api.messages.create(**ask(messages=[QUESTION, begun]))
    prompt = weather.engine.submitted[-1].prompt
    shown = Tokenizer.from_str(weather.link._card.tokenizer_json.decode()).decode(
        prompt, skip_special_tokens=False
    )
    assert shown.endswith("It is")


@pytest.mark.parametrize(
    ("changes", "status", "kind", "words"),
    [
        ({"messages": []}, 400, "invalid_request_error", "messages"),
        ({"max_tokens": 0}, 400, "invalid_request_error", "`max_tokens`=0"),
        ({"model": "other"}, 404, "not_found_error", "other"),
        ({"tools": [TOOL | {"name": "a b"}]}, 400, "invalid_request_error", "`tools[0].name`"),
        ({"tools": [{"name": "a"}]}, 400, "invalid_request_error", "`tools[0].input_schema`"),
        ({"container": "c"}, 400, "invalid_request_error", "`container` is not supported"),
        ({"nope": 1}, 400, "invalid_request_error", "`nope` is not supported"),
        (
            {"messages": [{"role": "user", "content": [{"type": "video"}]}]},
            400,
            "invalid_request_error",
            "`messages[0].content[0].type`",
        ),
        (
            {"system": "x", "messages": [QUESTION, {"role": "user", "content": "x\ud800"}]},
            400,
            "invalid_request_error",
            "`messages[1].content`",
        ),
        (
            {"messages": [{"role": "user", "content": "llama " * 9000}]},
            400,
            "invalid_request_error",
            "maximum context length is 8192",
        ),
    ],
)
async def test_refusals(
    weather: Stack, changes: dict[str, Any], status: int, kind: str, words: str
) -> None:
    async with httpx.AsyncClient(base_url=url(weather)) as http:
        answer = await http.post("/v1/messages", content=json.dumps(ask(**changes)))
    said = answer.json()
    assert (answer.status_code, said["type"], said["error"]["type"]) == (status, "error", kind)
    assert words in said["error"]["message"] and said["request_id"]


async def test_malformed_bodies(weather: Stack) -> None:
    async with httpx.AsyncClient(base_url=url(weather)) as http:
        for body in (b"{", b"[]", b""):
            answer = await http.post("/v1/messages", content=body)
            assert answer.status_code == 400 and answer.json()["type"] == "error"
        assert (await http.get("/v1/messages")).json()["type"] == "error"
