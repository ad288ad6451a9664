"""`/v1/responses` over real sockets, asked by OpenAI's client."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import openai
import pytest
from pydantic import BaseModel
from tokenizers import Tokenizer

from arriero.router import templates
from arriero.router.gateway import GatewayConfig
from arriero.router.http.responses_api.store import ResponseStore, StoredResponse
from arriero.shards.engine.types import EngineRequest
from arriero.shards.errors import NotFound
from support.frontdoor import Stack, make_card, serve

CALL = '{"name": "get_weather", "parameters": {"city": "La Paz"}}'
RESULT = "sunny in La Paz"
ANSWER = "It is sunny."
TOOL: Any = {
    "type": "function",
    "name": "get_weather",
    "description": "The weather in a city.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
        "additionalProperties": False,
    },
    "strict": True,
}
QUESTION = "How is the weather in La Paz?"


class Report(BaseModel):
    city: str
    sunny: bool


@pytest.fixture
async def weather(llama_tokenizer: Tokenizer) -> AsyncIterator[Stack]:
    """A model that calls the tool, answers once it has the result, and reports when asked to.

    It never ends when asked to go ON.
    """
    call, answer, report = (
        llama_tokenizer.encode(text, add_special_tokens=False).ids
        for text in (CALL, ANSWER, '{"city": "La Paz", "sunny": true}')
    )

    def policy(request: EngineRequest, index: int, position: int) -> int:
        prompt = llama_tokenizer.decode(request.prompt)
        if "ENDLESS" in prompt:
            return answer[position % len(answer)]
        words = answer if RESULT in prompt or "get_weather" not in prompt else call
        words = report if "REPORT" in prompt else words
        return words[position] if position < len(words) else 1

    card = make_card(llama_tokenizer, templates.read("llama3.1"), max_model_len=8192)
    config = GatewayConfig(http_address="127.0.0.1:0", models=("tiny",))
    async with serve(card, policy, config=config, step_s=0.002) as stack:
        yield stack


def url(stack: Stack) -> str:
    return f"http://127.0.0.1:{stack.gateway.http_port}"


@pytest.fixture
async def api(weather: Stack) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(
        base_url=f"{url(weather)}/v1", api_key="none", max_retries=0
    ) as client:
        yield client


@pytest.fixture
async def http(weather: Stack) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=url(weather), timeout=60) as client:
        yield client


def events(text: str) -> list[dict[str, Any]]:
    return [
        json.loads(block.partition("data: ")[2])
        for block in text.split("\n\n")
        if "data: " in block
    ]


async def test_create_chain_and_delete(weather: Stack, api: openai.AsyncOpenAI) -> None:
    first = await api.responses.create(model="tiny", input=QUESTION, instructions="Be brief.")
    assert (first.status, first.output_text, first.model) == ("completed", ANSWER, "tiny")
    assert first.usage is not None
    assert first.usage.input_tokens == len(weather.engine.submitted[-1].prompt)
    assert first.usage.input_tokens_details.cached_tokens == 16
    counted = await api.responses.input_tokens.count(
        model="tiny", input=QUESTION, instructions="Be brief."
    )
    assert counted.input_tokens == first.usage.input_tokens
    assert (await api.responses.retrieve(first.id)).output_text == ANSWER
    second = await api.responses.create(
        model="tiny", input="And tomorrow?", previous_response_id=first.id
    )
    shown = Tokenizer.from_str(weather.link._card.tokenizer_json.decode()).decode(
        weather.engine.submitted[-1].prompt
    )
    assert QUESTION in shown and ANSWER in shown and "And tomorrow?" in shown
    assert "Be brief." not in shown  # instructions are not inherited
    items = await api.responses.input_items.list(second.id)
    (item,) = items.data
    assert item.model_dump()["content"][0]["text"] == "And tomorrow?"
    await api.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        await api.responses.retrieve(first.id)
    with pytest.raises(openai.BadRequestError) as gone:
        await api.responses.create(model="tiny", input="x", previous_response_id=first.id)
    assert gone.value.code == "previous_response_not_found"
    unstored = await api.responses.create(model="tiny", input=QUESTION, store=False)
    with pytest.raises(openai.NotFoundError):
        await api.responses.retrieve(unstored.id)


async def test_the_tool_loop(weather: Stack, api: openai.AsyncOpenAI) -> None:
    whole = await api.responses.create(model="tiny", input=QUESTION, tools=[TOOL])
    (call,) = whole.output
    assert call.type == "function_call" and call.name == "get_weather"
    assert json.loads(call.arguments) == {"city": "La Paz"}
    # the client sends the whole conversation back, as dumps with nulls
    back: Any = [
        {"role": "user", "content": QUESTION},
        call.model_dump(),
        {"type": "function_call_output", "call_id": call.call_id, "output": RESULT},
    ]
    done = await api.responses.create(model="tiny", input=back, tools=[TOOL], store=False)
    assert done.output_text == ANSWER
    # or the result alone
    chained = await api.responses.create(
        model="tiny", input=back[2:], tools=[TOOL], previous_response_id=whole.id
    )
    assert chained.output_text == ANSWER


async def test_streams(api: openai.AsyncOpenAI) -> None:
    async with api.responses.stream(model="tiny", input=QUESTION) as stream:
        kinds = [event.type async for event in stream]
        final = await stream.get_final_response()
    assert final.output_text == ANSWER
    deltas = [kind for kind in kinds if kind == "response.output_text.delta"]
    assert [kind for kind in kinds if kind not in deltas] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    async with api.responses.stream(model="tiny", input=QUESTION, tools=[TOOL]) as stream:
        kinds = [event.type async for event in stream]
        final = await stream.get_final_response()
    assert kinds[2:] == [
        "response.output_item.added",
        "response.function_call_arguments.delta",
        "response.function_call_arguments.done",
        "response.output_item.done",
        "response.completed",
    ]
    (call,) = final.output
    assert call.type == "function_call" and json.loads(call.arguments) == {"city": "La Paz"}


async def test_parse(weather: Stack, api: openai.AsyncOpenAI) -> None:
    parsed = await api.responses.parse(model="tiny", input="REPORT please", text_format=Report)
    assert parsed.output_parsed == Report(city="La Paz", sunny=True)
    assert '"sunny"' in weather.engine.submitted[-1].params.grammar


async def test_incomplete(api: openai.AsyncOpenAI) -> None:
    cut = await api.responses.create(model="tiny", input=QUESTION, max_output_tokens=2)
    assert cut.status == "incomplete" and cut.incomplete_details is not None
    assert cut.incomplete_details.reason == "max_output_tokens"
    assert cut.usage is not None and cut.usage.output_tokens == 2


async def test_a_stream_is_resumed(http: httpx.AsyncClient) -> None:
    body = {"model": "tiny", "input": QUESTION, "stream": True}
    whole = events((await http.post("/v1/responses", json=body)).text)
    assert [event["sequence_number"] for event in whole] == list(range(len(whole)))
    response_id = whole[0]["response"]["id"]
    rest = await http.get(f"/v1/responses/{response_id}?stream=true&starting_after=3")
    assert events(rest.text) == whole[4:]
    # the connection breaks off in mid-stream; the response goes on
    body["input"], body["max_output_tokens"] = "ENDLESS", 200
    async with http.stream("POST", "/v1/responses", json=body) as stream:
        seen = [line async for line in _some(stream.aiter_lines(), 30)]
    before = events("\n\n".join(line for line in seen if line.startswith("data: ")))
    response_id, last = before[0]["response"]["id"], before[-1]["sequence_number"]
    rest = await http.get(f"/v1/responses/{response_id}?stream=true&starting_after={last}")
    after = events(rest.text)
    assert after[0]["sequence_number"] == last + 1
    assert after[-1]["type"] == "response.incomplete"
    text = "".join(
        event["delta"] for event in before + after if event["type"].endswith("text.delta")
    )
    (item,) = after[-1]["response"]["output"]
    assert item["content"][0]["text"] == text


async def _some(lines: AsyncIterator[str], most: int) -> AsyncIterator[str]:
    async for line in lines:
        yield line
        most -= 1
        if not most:
            return


async def test_background_and_cancel(weather: Stack, api: openai.AsyncOpenAI) -> None:
    begun = await api.responses.create(model="tiny", input="ENDLESS", background=True)
    assert begun.status == "in_progress"
    with pytest.raises(openai.BadRequestError, match="wait until it is completed"):
        await api.responses.create(model="tiny", input="x", previous_response_id=begun.id)
    cancelled = await api.responses.cancel(begun.id)
    assert cancelled.status == "cancelled"
    async with asyncio.timeout(20):
        while weather.engine.running:
            await asyncio.sleep(0.01)
    done = await api.responses.create(model="tiny", input=QUESTION, background=True)
    async with asyncio.timeout(20):
        while (got := await api.responses.retrieve(done.id)).status == "in_progress":
            await asyncio.sleep(0.01)
    assert got.output_text == ANSWER


@pytest.mark.parametrize(
    ("changes", "field", "words"),
    [
        ({"input": []}, "input", "`input`"),
        ({"input": [{"type": "web_search_call"}]}, "input[0].type", '"web_search_call"'),
        ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role", "must be one of"),
        ({"tools": [{"type": "function"}]}, "tools[0].name", "is needed"),
        ({"tools": [TOOL, TOOL]}, "tools", "`tools[1].name`"),
        ({"max_output_tokens": 9000}, "max_output_tokens", "maximum context length"),
        ({"top_logprobs": 21}, "top_logprobs", "20"),
        ({"conversation": "c"}, "conversation", "not supported"),
        ({"tool_choice": "required"}, "tool_choice", "offer `tools`"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format.schema", "go together"),
        ({"background": True, "store": False}, "background", "needs `store`"),
    ],
)
async def test_refusals(
    http: httpx.AsyncClient, changes: dict[str, Any], field: str, words: str
) -> None:
    answer = await http.post("/v1/responses", json={"model": "tiny", "input": "x"} | changes)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, field)
    assert words in error["message"] and error["code"]


async def test_log_probabilities(weather: Stack, api: openai.AsyncOpenAI) -> None:
    include: Any = ["message.output_text.logprobs"]
    given: Any = {"model": "tiny", "input": "x", "include": include, "temperature": 0}
    first = await api.responses.create(**given, top_logprobs=2)
    part: Any = first.output[0].content[0]  # type: ignore[union-attr]
    assert part.logprobs and first.top_logprobs == 2
    assert "".join(row.token for row in part.logprobs).startswith(part.text)
    assert all(row.logprob == -0.5 and len(row.top_logprobs) == 2 for row in part.logprobs)
    events: list[Any] = [event async for event in await api.responses.create(**given, stream=True)]
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    (done,) = [event for event in events if event.type == "response.output_text.done"]
    assert all(event.logprobs for event in deltas)
    sent = [row.token for event in deltas for row in event.logprobs]
    rows = [row.token for row in done.logprobs]
    assert rows == [row.token for row in part.logprobs] and rows[: len(sent)] == sent
    plain: Any = await api.responses.create(model="tiny", input="x")
    assert not plain.output[0].content[0].logprobs
    assert [request.params.logprobs for request in weather.engine.submitted] == [2, 0, None]


async def test_tools_that_a_server_would_run_are_left_out(weather: Stack) -> None:
    body = {
        "model": "tiny",
        "input": QUESTION,
        "tools": [{"type": "web_search", "external_web_access": True}, {"type": "namespace"}],
        "tool_choice": "auto",
    }
    async with httpx.AsyncClient(base_url=url(weather)) as http:
        answer = await http.post("/v1/responses", json=body)
    assert answer.status_code == 200 and answer.json()["tools"] == []


class Archive:
    """Keeps responses in memory, for two gateways."""

    def __init__(self) -> None:
        self.values: dict[tuple[str, str], bytes] = {}

    async def put(self, key: tuple[str, str], value: bytes) -> None:
        self.values[key] = value

    async def get(self, key: tuple[str, str]) -> bytes | None:
        return self.values.get(key)

    async def delete(self, key: tuple[str, str]) -> None:
        self.values.pop(key, None)


def stored(number: int, *, tenant: str = "a", size: int = 10) -> StoredResponse:
    response = {"id": f"resp_{number}", "status": "completed", "output": [], "background": False}
    return StoredResponse(tenant, response, [], [{"role": "user", "content": "x" * size}])


async def test_the_store_is_bounded_and_private() -> None:
    store = ResponseStore(max_responses=3, max_bytes=5000)
    for number in range(5):
        await store.end(stored(number))
    for number in range(2):
        with pytest.raises(NotFound):
            await store.get("a", f"resp_{number}")
    assert (await store.get("a", "resp_4")).response["id"] == "resp_4"
    with pytest.raises(NotFound):
        await store.get("b", "resp_4")
    await store.end(stored(5, size=4900))
    with pytest.raises(NotFound):
        await store.get("a", "resp_4")
    old = ResponseStore(max_age_s=0.01)
    await old.end(stored(6))
    await asyncio.sleep(0.02)
    with pytest.raises(NotFound, match="at most 0 s"):
        await old.get("a", "resp_6")


async def test_another_gateway_goes_on() -> None:
    archive = Archive()
    first, second = ResponseStore(archive), ResponseStore(archive)
    await first.end(stored(1))
    kept = await second.get("a", "resp_1")
    assert kept.ended and kept.conversation == stored(1).items
    with pytest.raises(NotFound):
        await second.get("b", "resp_1")
    await second.delete(kept)
    assert not archive.values
