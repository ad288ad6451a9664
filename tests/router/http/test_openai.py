"""The HTTP interface over real sockets, asked by the clients that people use."""

from __future__ import annotations

import asyncio
import inspect
import json
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib import resources

import httpx
import openai
import pytest
from huggingface_hub import InferenceClient
from tokenizers import Tokenizer

from arriero.router import templates
from arriero.router.gateway import GatewayConfig, GroupAddress
from arriero.router.http import app as app_module
from arriero.router.http import (
    cache_fields,
    cache_hints,
    completion_calls,
    token_fields,
    translate,
)
from arriero.router.http import request_schemas as bodies
from arriero.shards.engine.types import EngineRequest
from support.eventually import eventually_async
from support.frontdoor import LLAMA3, Stack, echo, endless, make_card, serve

CONFIG = GatewayConfig(http_address="127.0.0.1:0", models=("tiny",), lost_s=0.5)
ASK = [{"role": "user", "content": "what do llamas carry?"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    },
}
TEMPLATE = resources.files(templates).joinpath("llama3.1.jinja").read_text()
CALL = '{"name": "get_weather", "parameters": {"city": "La Paz"}}'


def url(stack: Stack) -> str:
    return f"http://127.0.0.1:{stack.gateway.http_port}"


def client(stack: Stack) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{url(stack)}/v1", api_key="none", max_retries=0)


def saying(tokenizer: Tokenizer, *texts: str) -> Callable[[EngineRequest, int, int], int]:
    """Sample i says text i, then ends."""
    spoken = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]

    def policy(request: EngineRequest, index: int, position: int) -> int:
        words = spoken[index % len(spoken)]
        return words[position] if position < len(words) else 1

    return policy


@asynccontextmanager
async def saying_stack(tokenizer: Tokenizer, *texts: str) -> AsyncIterator[Stack]:
    card = make_card(tokenizer, TEMPLATE, max_model_len=4096)
    async with serve(card, saying(tokenizer, *texts), config=CONFIG) as stack:
        yield stack


@pytest.fixture
async def echoing(llama_tokenizer: Tokenizer) -> AsyncIterator[Stack]:
    async with serve(make_card(llama_tokenizer, LLAMA3), echo, config=CONFIG) as stack:
        yield stack


@pytest.fixture
async def running(llama_tokenizer: Tokenizer) -> AsyncIterator[Stack]:
    card = make_card(llama_tokenizer, LLAMA3, max_model_len=100_000)
    async with serve(card, endless, step_s=0.002, config=CONFIG) as stack:
        yield stack


async def test_chat(llama_tokenizer: Tokenizer) -> None:
    async with (
        saying_stack(llama_tokenizer, "llamas carry packs", "the guía 🦙") as stack,
        client(stack) as ask,
    ):
        answer = await ask.chat.completions.create(model="tiny", messages=ASK, n=2, seed=5)
        assert [choice.message.content for choice in answer.choices] == [
            "llamas carry packs",
            "the guía 🦙",
        ]
        assert {choice.finish_reason for choice in answer.choices} == {"stop"}
        assert answer.model == "tiny" and answer.object == "chat.completion"
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == len(stack.engine.submitted[0].prompt)
        assert answer.usage.total_tokens == (
            answer.usage.prompt_tokens + answer.usage.completion_tokens
        )
        assert stack.engine.submitted[0].params.seed == 5


async def test_stream_adds_up_to_the_whole(llama_tokenizer: Tokenizer) -> None:
    texts = ("llamas carry packs — 日本語", "so 🦙🦙 it is")
    async with saying_stack(llama_tokenizer, *texts) as stack, client(stack) as ask:
        stream = await ask.chat.completions.create(
            model="tiny", messages=ASK, n=2, stream=True, stream_options={"include_usage": True}
        )
        said = ["", ""]
        reasons: list[str | None] = [None, None]
        chunks = [chunk async for chunk in stream]
        for chunk in chunks:
            for choice in chunk.choices:
                said[choice.index] += choice.delta.content or ""
                reasons[choice.index] = choice.finish_reason or reasons[choice.index]
        assert tuple(said) == texts and reasons == ["stop", "stop"]
        roles = [c for chunk in chunks for c in chunk.choices if c.delta.role is not None]
        assert [(c.delta.role, c.delta.content) for c in roles] == [("assistant", "")] * 2
        assert chunks[0].choices[0].delta.role == "assistant"
        assert chunks[-1].choices == [] and chunks[-1].usage is not None
        assert all(chunk.usage is None for chunk in chunks[:-1])
        assert chunks[-1].usage.prompt_tokens == len(stack.engine.submitted[0].prompt)


async def test_stop_and_length(echoing: Stack) -> None:
    async with client(echoing) as ask:
        answer = await ask.completions.create(
            model="tiny", prompt="the quick brown fox", stop=["brown"], temperature=0
        )
        assert answer.choices[0].text == "the quick "
        assert answer.choices[0].finish_reason == "stop"
        answer = await ask.completions.create(model="tiny", prompt="the quick fox", max_tokens=1)
        assert answer.choices[0].finish_reason == "length"
        chat = await ask.chat.completions.create(
            model="tiny", messages=ASK, max_completion_tokens=2
        )
        assert chat.usage is not None and chat.usage.completion_tokens == 2


async def test_sampling_fields_arrive(echoing: Stack) -> None:
    extra = {
        "top_k": 3,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "min_tokens": 2,
        "ignore_eos": True,
        "stop_token_ids": [11],
        "allowed_token_ids": [7, 8],
        "banned_token_ids": [9],
        "priority": 3,
    }
    own = {
        "temperature": 0.5,
        "top_p": 0.7,
        "presence_penalty": 0.3,
        "frequency_penalty": -0.3,
        "seed": 1,
        "max_tokens": 4,
    }
    async with client(echoing) as ask:
        await ask.completions.create(
            model="tiny", prompt=[60, 61, 62], logit_bias={"7": 1.5}, extra_body=extra, **own
        )
    (request,) = echoing.engine.submitted
    assert request.prompt == (60, 61, 62) and request.priority == 3
    assert request.params.logit_bias == {7: 1.5}
    for name, value in (extra | own).items():
        if name != "priority":
            got = getattr(request.params, name)
            assert got == (tuple(value) if isinstance(value, list) else value), name


async def test_tools_whole_and_streamed(llama_tokenizer: Tokenizer) -> None:
    async with (
        saying_stack(llama_tokenizer, f"well\n{CALL}; {CALL}") as stack,
        client(stack) as ask,
    ):
        answer = await ask.chat.completions.create(model="tiny", messages=ASK, tools=[WEATHER])
        choice = answer.choices[0]
        assert choice.finish_reason == "tool_calls"
        assert choice.message.tool_calls is not None
        calls = [one.function for one in choice.message.tool_calls if one.type == "function"]
        assert [one.name for one in calls] == ["get_weather"] * 2
        assert json.loads(calls[0].arguments) == {"city": "La Paz"}
        assert (choice.message.content or "").strip() == "well"
        shown = llama_tokenizer.decode(stack.engine.submitted[0].prompt)
        assert "The weather in a city." in shown

        stream = await ask.chat.completions.create(
            model="tiny", messages=ASK, tools=[WEATHER], stream=True
        )
        found: dict[int, dict[str, str]] = {}
        content = ""
        async for chunk in stream:
            delta = chunk.choices[0].delta
            content += delta.content or ""
            for call in delta.tool_calls or ():
                one = found.setdefault(call.index, {"name": "", "arguments": ""})
                assert call.function is not None
                one["name"] += call.function.name or ""
                one["arguments"] += call.function.arguments or ""
            reason = chunk.choices[0].finish_reason
        assert reason == "tool_calls"
        assert [one["arguments"] for one in found.values()] == [calls[0].arguments] * 2
        assert content == choice.message.content

        # the answer, and the tool's, go back into the conversation
        back = [
            *ASK,
            choice.message.model_dump(),
            {"role": "tool", "tool_call_id": choice.message.tool_calls[0].id, "content": "sunny"},
        ]
        await ask.chat.completions.create(model="tiny", messages=back, tools=[WEATHER])
        shown = llama_tokenizer.decode(stack.engine.submitted[-1].prompt)
        assert '"city": "La Paz"' in shown and "sunny" in shown


async def test_tool_options(llama_tokenizer: Tokenizer) -> None:
    async with saying_stack(llama_tokenizer, f"{CALL}; {CALL}") as stack, client(stack) as ask:
        one = await ask.chat.completions.create(
            model="tiny", messages=ASK, tools=[WEATHER], parallel_tool_calls=False
        )
        assert len(one.choices[0].message.tool_calls or ()) == 1
        assert one.choices[0].finish_reason == "tool_calls"
        none = await ask.chat.completions.create(
            model="tiny", messages=ASK, tools=[WEATHER], tool_choice="none"
        )
        assert none.choices[0].message.content == f"{CALL}; {CALL}"
        assert none.choices[0].message.tool_calls is None
        cut = await ask.chat.completions.create(
            model="tiny", messages=ASK, tools=[WEATHER], max_tokens=20
        )
        assert cut.choices[0].finish_reason == "length"
        assert not cut.choices[0].message.content
        with pytest.raises(openai.BadRequestError, match="not among `tools`"):
            await ask.chat.completions.create(
                model="tiny",
                messages=ASK,
                tools=[WEATHER],
                tool_choice={"type": "function", "function": {"name": "other"}},
            )
        some = {"mode": "required", "tools": [{"type": "function", "function": {"name": "other"}}]}
        with pytest.raises(openai.BadRequestError, match="not among `tools`"):
            await ask.chat.completions.create(
                model="tiny",
                messages=ASK,
                tools=[WEATHER],
                tool_choice={"type": "allowed_tools", "allowed_tools": some},
            )


async def test_tools_need_a_template_that_shows_them(echoing: Stack) -> None:
    async with client(echoing) as ask:
        with pytest.raises(openai.BadRequestError, match="cannot show tools") as refused:
            await ask.chat.completions.create(model="tiny", messages=ASK, tools=[WEATHER])
        assert refused.value.param == "tools"


async def test_chat_logprobs(llama_tokenizer: Tokenizer) -> None:
    async with saying_stack(llama_tokenizer, "llamas 🦙") as stack, client(stack) as ask:
        answer = await ask.chat.completions.create(
            model="tiny", messages=ASK, logprobs=True, top_logprobs=2
        )
        logprobs = answer.choices[0].logprobs
        assert logprobs is not None and logprobs.content is not None
        spelled = b"".join(bytes(row.bytes or []) for row in logprobs.content[:-1])
        assert spelled.decode() == "llamas 🦙"
        assert all(row.logprob == -0.5 and len(row.top_logprobs) == 2 for row in logprobs.content)


async def test_completion_echo_and_logprobs(echoing: Stack) -> None:
    async with client(echoing) as ask:
        answer = await ask.completions.create(
            model="tiny", prompt="the quick", echo=True, logprobs=1, max_tokens=3
        )
        choice = answer.choices[0]
        assert choice.text.startswith("the quick")
        told = choice.logprobs
        assert told is not None and told.tokens and told.token_logprobs and told.text_offset
        num_prompt = len(echoing.engine.submitted[0].prompt)
        assert len(told.tokens) == len(told.token_logprobs) == num_prompt + 3
        assert told.token_logprobs[0] is None and told.token_logprobs[1] == -0.5


async def test_several_prompts_whole_and_streamed(echoing: Stack) -> None:
    prompts = ["the quick", "brown fox", "lazy dog"]
    async with client(echoing) as ask:
        extra = {"add_special_tokens": False}
        answer = await ask.completions.create(model="tiny", prompt=prompts, n=2, extra_body=extra)
        assert [choice.text for choice in answer.choices] == [p for p in prompts for _ in "12"]
        assert [choice.index for choice in answer.choices] == list(range(6))
        stream = await ask.completions.create(
            model="tiny", prompt=prompts, n=2, stream=True, extra_body=extra
        )
        said = [""] * 6
        async for chunk in stream:
            for choice in chunk.choices:
                said[choice.index] += choice.text
        assert said == [choice.text for choice in answer.choices]


async def test_models(echoing: Stack) -> None:
    async with client(echoing) as ask:
        assert [one.id async for one in ask.models.list()] == ["tiny"]
        assert (await ask.models.retrieve("tiny")).owned_by == "arriero"
        with pytest.raises(openai.NotFoundError) as refused:
            await ask.models.retrieve("meta/none")
        assert refused.value.code == "model_not_found"


async def test_tokens_there_and_back(echoing: Stack, llama_tokenizer: Tokenizer) -> None:
    async with httpx.AsyncClient(base_url=url(echoing)) as ask:
        said = (await ask.post("/tokenize", json={"prompt": "the quick 🦙"})).json()
        assert said["tokens"] == llama_tokenizer.encode("the quick 🦙").ids
        assert (said["count"], said["max_model_len"]) == (len(said["tokens"]), 512)
        told = await ask.post(
            "/detokenize", json={"tokens": said["tokens"], "skip_special_tokens": True}
        )
        assert told.json() == {"prompt": "the quick 🦙"}
        laid_out = (await ask.post("/tokenize", json={"messages": ASK})).json()["tokens"]
        await ask.post("/v1/chat/completions", json={"messages": ASK})
        assert tuple(laid_out) == echoing.engine.submitted[-1].prompt


async def test_hugging_face_client(llama_tokenizer: Tokenizer) -> None:
    async with saying_stack(llama_tokenizer, "llamas carry packs") as stack:

        def ask() -> str:
            with InferenceClient(base_url=f"{url(stack)}/v1", api_key="none") as hub:
                stream = hub.chat.completions.create(
                    model="tiny", messages=ASK, stream=True, max_tokens=50
                )
                return "".join(chunk.choices[0].delta.content or "" for chunk in stream)

        assert await asyncio.to_thread(ask) == "llamas carry packs"


BAD = [
    ({"messages": ASK, "functions": [{"name": "f"}]}, "functions", "not supported: give `tools`"),
    ({"messages": ASK, "fancy": 1}, "fancy", "`fancy` is not supported; leave it out"),
    ({"messages": ASK, "audio": {"voice": "x"}}, "audio", "not supported"),
    ({}, "messages", "`messages` is needed"),
    ({"messages": []}, "messages", "at least one"),
    ({"messages": ASK, "temperature": "hot"}, "temperature", "valid number"),
    ({"messages": ASK, "temperature": -1}, "temperature", "at least 0"),
    ({"messages": ASK, "top_logprobs": 3}, "top_logprobs", "needs `logprobs`"),
    ({"messages": ASK, "max_tokens": 3, "max_completion_tokens": 4}, "max_tokens", "differ"),
    ({"messages": ASK, "max_tokens": 8.5}, "max_tokens", "8.5"),
    ({"messages": ASK, "max_tokens": "8"}, "max_tokens", "integer"),
    ({"messages": ASK, "max_tokens": True}, "max_tokens", "integer"),
    ({"messages": ASK, "max_tokens": 0}, "max_tokens", "at least 1"),
    ({"messages": ASK, "top_k": -2}, "top_k", "at least 0"),
    ({"messages": ASK, "stop": ["x"] * 65}, "stop", "send at most 64"),
    ({"messages": ASK, "n": 1000}, "n", "128"),
    ({"messages": ASK, "max_tokens": 100_000}, "max_tokens", "or lower `max_tokens` to"),
    ({"messages": ASK, "logit_bias": {"x": 1}}, "logit_bias.x", "logit_bias"),
    ({"messages": ASK, "logit_bias": {"99999999": 1}}, "logit_bias", "ids run from 0"),
    ({"messages": ASK, "response_format": {"type": "xml"}}, "response_format.type", "json_object"),
    (
        {"messages": ASK, "response_format": {"type": "json_schema"}},
        "response_format.json_schema",
        "go together",
    ),
    (
        {"messages": ASK, "structured_outputs": {"regex": "a", "choice": ["a"]}},
        "structured_outputs.regex",
        "exactly one of",
    ),
    (
        {"messages": ASK, "guided_regex": "a", "guided_choice": ["a"]},
        "guided_choice",
        "exclude each other",
    ),
    ({"messages": ASK, "guided_regex": "a", "ignore_eos": True}, "ignore_eos", "exclude each"),
    ({"messages": ASK, "tool_choice": "required"}, "tool_choice", "offer `tools`"),
    ({"messages": [{"role": "root", "content": "x"}]}, "messages", "must be one of"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, None, "surrogate"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "messages[0].content[0].image_url.url",
        "is needed",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]},
        "messages[0].content[0]",
        '"input_audio" is not supported',
    ),
    ({"messages": ASK, "tool_choice": {"type": "x"}}, "tool_choice.type", "function"),
]


@pytest.mark.parametrize(("body", "param", "words"), BAD)
async def test_refusals_name_the_field(
    echoing: Stack, body: dict[str, object], param: str | None, words: str
) -> None:
    async with httpx.AsyncClient(base_url=url(echoing)) as ask:
        raw = json.dumps(body)
        answer = await ask.post(
            "/v1/chat/completions", content=raw, headers={"content-type": "application/json"}
        )
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert words in error["message"]
    assert param is None or error["param"] == param
    assert error["param"] and error["code"]
    assert error["type"] == "invalid_request_error"


async def test_statuses(echoing: Stack) -> None:
    async with client(echoing) as ask, httpx.AsyncClient(base_url=url(echoing)) as raw:
        with pytest.raises(openai.NotFoundError):
            await ask.chat.completions.create(model="none", messages=ASK)
        echoing.engine.max_queued = 0
        for stream in (False, True):
            with pytest.raises(openai.RateLimitError) as full:
                await ask.chat.completions.create(model="tiny", messages=ASK, stream=stream)
            assert full.value.response.headers["retry-after"] == "4"
        echoing.engine.max_queued = 100
        answer = await raw.post("/v1/chat/completions", content=b"{nope")
        assert answer.status_code == 400 and "not JSON" in answer.json()["error"]["message"]
        assert (await raw.get("/v1/none")).status_code == 404
        assert (await raw.get("/v1/completions")).json()["error"]["type"]
        big = await raw.post("/tokenize", content=b" " * (33 * 1024 * 1024))
        assert big.status_code == 413 and "error" in big.json()
        named = await raw.get("/v1/models", headers={"x-request-id": "mine"})
        assert named.headers["x-request-id"] == "mine"
        await echoing.gateway.set_groups([])
        with pytest.raises(openai.InternalServerError, match="being replaced") as gone:
            await ask.chat.completions.create(model="tiny", messages=ASK)
        assert gone.value.status_code == 503
        assert (await raw.get("/health")).status_code == 503


async def test_internal_faults_show_no_traceback(
    echoing: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("secret")

    monkeypatch.setattr("arriero.router.inference.read_options", fail)
    async with httpx.AsyncClient(base_url=url(echoing)) as ask:
        answer = await ask.post("/v1/chat/completions", json={"messages": ASK})
    assert answer.status_code == 500
    error = answer.json()["error"]
    assert "secret" not in answer.text and answer.headers["x-request-id"] in error["message"]


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_is_cancelled(running: Stack, stream: bool) -> None:
    body = {"prompt": ["a", "b"], "stream": stream}
    async with httpx.AsyncClient(base_url=url(running)) as ask:
        if stream:
            async with ask.stream("POST", "/v1/completions", json=body) as answer:
                async for _ in answer.aiter_lines():
                    break
                assert len(running.engine.running) == 2
        else:
            with pytest.raises(httpx.ReadTimeout):
                await ask.post("/v1/completions", json=body, timeout=0.3)
    await eventually_async(lambda: not running.engine.running, 5)
    assert len(running.engine.cancelled) == 2


async def test_a_group_lost_midway_ends_the_stream_in_an_error(running: Stack) -> None:
    async with client(running) as ask:
        stream = await ask.completions.create(model="tiny", prompt="a", stream=True)
        await anext(stream)
        await running.gateway.set_groups([])
        with pytest.raises(openai.APIError, match="removed the group"):
            async for _ in stream:
                pass


async def test_health_and_metrics(echoing: Stack) -> None:
    async with httpx.AsyncClient(base_url=url(echoing)) as ask:
        healthy = await ask.get("/health")
        assert healthy.status_code == 200 and healthy.json()["status"] == "ok"
        for _ in range(2):
            await ask.post("/v1/chat/completions", json={"messages": ASK})
        await ask.post("/v1/chat/completions", json={"messages": []})
        page = (await ask.get("/metrics")).text
    lines = dict(line.rsplit(" ", 1) for line in page.splitlines() if line[0] != "#")
    num_prompt = len(echoing.engine.submitted[0].prompt)
    tokens = 2 * (num_prompt + 1)
    assert float(lines['arriero_prompt_tokens_total{model="tiny"}']) == 2 * num_prompt
    assert float(lines['arriero_generation_tokens_total{model="tiny"}']) == tokens
    assert float(lines['arriero_requests_total{model="tiny"}']) == 2
    assert float(lines['arriero_request_failures_total{kind="InvalidRequest"}']) == 1
    assert float(lines['arriero_time_to_first_token_seconds_count{model="tiny"}']) == 2
    assert float(lines['arriero_prefix_cache_hit_tokens_total{model="tiny"}']) == 32
    for name in ("requests_waiting", "requests_running"):
        assert f'arriero_{name}{{group="g0",model="tiny"}}' in lines
    assert 'arriero_kv_blocks{group="g0",model="tiny",state="used"}' in lines


async def test_the_schema_says_what_is_taken(echoing: Stack) -> None:
    async with httpx.AsyncClient(base_url=url(echoing)) as ask:
        schema = (await ask.get("/openapi.json")).json()
    assert {"/v1/chat/completions", "/v1/completions", "/tokenize", "/health"} <= set(
        schema["paths"]
    )
    answers = schema["paths"]["/v1/chat/completions"]["post"]["responses"]
    assert "422" not in answers and "429" in answers
    fields = schema["components"]["schemas"]["ChatBody"]["properties"]
    assert all("description" in field for name, field in fields.items())


async def test_both_listeners_share_the_groups(echoing: Stack) -> None:
    texts = []
    async for message in echoing.client.chat(ASK):
        texts += [output.text for output in message.outputs]
    async with client(echoing) as ask:
        answer = await ask.chat.completions.create(model="tiny", messages=ASK)
    assert answer.choices[0].message.content == "".join(texts)
    await echoing.gateway.set_groups([GroupAddress("g0", "tiny", echoing.link_address)])


@pytest.mark.parametrize("kind", ["chat", "completion"])
async def test_every_field_of_the_api_is_honoured_or_refused_by_name(
    echoing: Stack, kind: str
) -> None:
    """The fields are the SDK's own; what honours them is found in the code that reads bodies."""
    if kind == "chat":
        from openai.types.chat import completion_create_params as params

        path, body, least = "/v1/chat/completions", bodies.ChatBody, {"messages": ASK}
    else:
        from openai.types import completion_create_params as params  # type: ignore[no-redef]

        path, body, least = "/v1/completions", bodies.CompletionBody, {"prompt": "a"}
    fields = set(params.CompletionCreateParamsBase.__annotations__) | {"stream"}
    modules = (translate, app_module, completion_calls, cache_hints, cache_fields, token_fields)
    read = "".join(map(inspect.getsource, modules))
    unread = {name for name in body.model_fields if not re.search(rf"\b{name}\b", read)}
    assert unread <= {"best_of"}  # only as much as `n`, which the schema says
    assert fields <= set(body.model_fields) | set(body.others), "a field in no class"
    refused = sorted(name for name in fields if name in body.others)
    assert refused, "the walk found no fields"
    async with httpx.AsyncClient(base_url=url(echoing)) as ask:
        for name in refused:
            answer = await ask.post(path, json={**least, "max_tokens": 2, name: "x"})
            if body.others[name].takes("x"):
                assert answer.status_code == 200, (name, answer.text)
                continue
            assert answer.status_code == 400, (name, answer.text)
            assert answer.json()["error"]["param"] == name
