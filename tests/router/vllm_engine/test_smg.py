"""The smg gateway drives real groups through ours: its answers, its lost clients, a lost group."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
import pytest_asyncio
from tokenizers import Tokenizer

from arriero.shards.engine.types import EngineRequest
from support.eventually import eventually_async
from support.frontdoor import Policy
from support.smg import MODEL_NAME, SmgStack, missing, smg_stack

MODEL = os.environ.get("ARRIERO_TEST_MODEL", "")
pytestmark = [
    pytest.mark.skipif(bool(missing()), reason=missing() or "installed"),
    pytest.mark.skipif(not MODEL, reason="ARRIERO_TEST_MODEL names no checkpoint folder"),
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(3000),
]

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
GREEDY = {"model": MODEL_NAME, "temperature": 0}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stack(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[SmgStack]:
    async with smg_stack(MODEL, tmp_path_factory.mktemp("smg") / "smg.log") as started:
        yield started


async def post(stack: SmgStack, url: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
    response = await stack.client.post(f"{url}{path}", json=body)
    assert response.status_code == 200, (url, path, response.text)
    answer: dict[str, Any] = response.json()
    return answer


async def stream(stack: SmgStack, body: dict[str, Any], leave_after: int = 0) -> AsyncIterator[str]:
    """Text of a chat's chunks from smg; leaves after `leave_after` chunks, if given."""
    count = 0
    url = f"{stack.smg}/v1/chat/completions"
    async with stack.client.stream("POST", url, json={**body, "stream": True}) as response:
        assert response.status_code == 200
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                assert "error" not in line, line
                continue
            (choice,) = json.loads(line.removeprefix("data: "))["choices"]
            if choice["delta"].get("content"):
                yield choice["delta"]["content"]
                count += 1
            if leave_after and count >= leave_after:
                return


async def responses_text(stack: SmgStack, url: str, talk: list[dict[str, str]]) -> str:
    system = "".join(turn["content"] for turn in talk if turn["role"] == "system")
    body = {
        **GREEDY, "max_output_tokens": 12, "store": False,
        "input": [turn for turn in talk if turn["role"] != "system"],
        **({"instructions": system} if system else {}),
    }  # fmt: skip
    answer = await post(stack, url, "/v1/responses", body)
    parts = [part for item in answer["output"] for part in item["content"]]
    return "".join(part["text"] for part in parts)


async def messages_text(stack: SmgStack, url: str, talk: list[dict[str, str]]) -> str:
    system = "".join(turn["content"] for turn in talk if turn["role"] == "system")
    body = {
        **GREEDY, "max_tokens": 12,
        "messages": [turn for turn in talk if turn["role"] != "system"],
        **({"system": system} if system else {}),
    }  # fmt: skip
    answer = await post(stack, url, "/v1/messages", body)
    return "".join(block["text"] for block in answer["content"])


async def test_chat_responses_and_messages(stack: SmgStack) -> None:
    """The same text by every API, from smg and from our gateways."""
    texts = set()
    for url in (stack.smg, *stack.urls):
        body = {**GREEDY, "messages": QUESTION, "max_tokens": 12}
        answer = await post(stack, url, "/v1/chat/completions", body)
        texts.add(answer["choices"][0]["message"]["content"])
        assert answer["choices"][0]["finish_reason"] == "stop"
        assert answer["usage"]["completion_tokens"] == 8
        texts.add(await responses_text(stack, url, QUESTION))
        texts.add(await messages_text(stack, url, QUESTION))
    body = {**GREEDY, "messages": QUESTION, "max_tokens": 12}
    texts.add("".join([text async for text in stream(stack, body)]))
    assert texts == {"The capital of France is Paris."}


async def test_forms_tools_and_samples(stack: SmgStack) -> None:
    async def chat(**fields: object) -> dict[str, Any]:
        body = {**GREEDY, "messages": QUESTION, "max_tokens": 30, **fields}
        return await post(stack, stack.smg, "/v1/chat/completions", body)

    schema = {
        "type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}},
        "required": ["city"], "additionalProperties": False,
    }  # fmt: skip
    form = {"type": "json_schema", "json_schema": {"name": "city", "schema": schema}}
    answer = await chat(response_format=form)
    assert json.loads(answer["choices"][0]["message"]["content"])["city"] in ("Paris", "Rome")
    answer = await chat(regex="(Rome|Paris)!")
    assert answer["choices"][0]["message"]["content"] in ("Rome!", "Paris!")
    tool = {"type": "function", "function": {"name": "visit", "parameters": schema}}
    choice = {"type": "function", "function": {"name": "visit"}}
    answer = await chat(tools=[tool], tool_choice=choice)
    (call,) = answer["choices"][0]["message"]["tool_calls"]
    assert call["function"]["name"] == "visit"
    assert set(json.loads(call["function"]["arguments"])) == {"city"}
    seeded = [await chat(n=2, temperature=1, seed=7, max_tokens=6) for _ in range(2)]
    texts = [[choice["message"]["content"] for choice in each["choices"]] for each in seeded]
    assert texts[0] == texts[1] and len(set(texts[0])) == 2
    answer = await chat(stop=["Paris"])
    assert answer["choices"][0]["message"]["content"].strip() == "The capital of France is"
    answer = await chat(logprobs=True, top_logprobs=2, max_tokens=2)
    positions = answer["choices"][0]["logprobs"]["content"]
    assert [len(position["top_logprobs"]) for position in positions] == [2, 2]


async def test_clients_that_leave_free_their_blocks(stack: SmgStack) -> None:
    """Of 20 streams, 2 lose their client; the others end, and no block stays in use."""

    async def client(number: int) -> str:
        talk = [{"role": "user", "content": f"Tell me a story about the number {number}."}]
        body = {**GREEDY, "messages": talk, "max_tokens": 12 if number % 10 else 400}
        leave = 0 if number % 10 else 2
        return "".join([text async for text in stream(stack, body, leave)])

    texts = await asyncio.gather(*(client(number) for number in range(20)))
    assert all(texts)
    assert len(set(texts)) > 10
    await eventually_async(
        lambda: all(group.idle() for group in stack.groups),
        60,
        state=lambda: [group.engine.stats() for group in stack.groups],
    )
    from smg_grpc_proto import vllm_engine_pb2 as vllm
    from smg_grpc_proto import vllm_engine_pb2_grpc as rpc

    for worker in stack.workers:
        async with grpc.aio.insecure_channel(worker) as channel:
            info = await rpc.VllmEngineStub(channel).GetServerInfo(vllm.GetServerInfoRequest())
            assert info.active_requests == 0


QUESTIONS = (
    "What is the capital of Peru?",
    "Name three animals of the Andes.",
    "How do I boil an egg?",
    "Write a haiku about rain.",
    "What is 12 times 9?",
    "Translate 'good morning' into French.",
    "Who wrote Don Quixote?",
    "Why is the sky blue?",
    "Give me a synonym of happy.",
    "What does `print(1 + 1)` show in Python?",
    "¿Qué es un arriero?",
    "List the colours of a rainbow.",
    "数字の七は英語で何ですか?",
    "Is a tomato a fruit?",
    "Explain gravity to a child.\nUse short words.",
    "What comes after Tuesday?",
    "Say im_end, and go on.",
    "How far is the moon?  In km, please.",
    "   Spaces around   ",
    "Emoji: 🦙🏔️ — what do you see?",
    "Name a river in Brazil.",
    "What is a llama's young called?",
    "Write one sentence about salt.",
    "Which is larger, 0.9 or 0.11?",
    "Finish the proverb: a stitch in time",
)


def conversations(count: int) -> list[list[dict[str, str]]]:
    """Conversations of four shapes: a question; with a system message; two and three turns."""
    talks = []
    for number in range(count):
        question = QUESTIONS[number % len(QUESTIONS)]
        other = QUESTIONS[(number * 7 + 3) % len(QUESTIONS)]
        user = {"role": "user", "content": question}
        before = [
            {"role": "user", "content": other},
            {"role": "assistant", "content": "Let me think about that."},
        ]
        system = {"role": "system", "content": f"You are guide number {number}. Be brief."}
        shape = number // len(QUESTIONS) % 4
        talks.append(
            [[user], [system, user], [*before, user], [system, *before, *before, user]][shape]
        )
    return talks


async def compare(stack: SmgStack, talks: list[list[dict[str, str]]]) -> None:
    """Hold our text of `/v1/responses` and `/v1/messages` against smg's, over the same groups.

    No conversation has a special token as text: smg makes a special token of such text, and our
    gateway keeps it text.
    """
    room = asyncio.Semaphore(16)
    texts: list[str] = []
    different = []

    async def ask(number: int, talk: list[dict[str, str]]) -> None:
        async with room:
            ours = stack.urls[number % 2]
            for read in (responses_text, messages_text):
                pair = [await read(stack, url, talk) for url in (ours, stack.smg)]
                texts.append(pair[0])
                if pair[0] != pair[1]:
                    different.append((read.__name__, talk, *pair))

    await asyncio.gather(*(ask(*each) for each in enumerate(talks)))
    assert not different, (len(different), different[:5])
    assert len(texts) == 2 * len(talks) and all(texts)


def tells_the_prompt(tokenizer: Tokenizer) -> Policy:
    """Groups that answer with a digest of the prompt's tokens, in letters of several scripts."""
    letters = "aeiouñçßøλжд数字🦙👩‍👩‍👧 \n—"

    def policy(request: EngineRequest, index: int, position: int) -> int:
        digest = hashlib.sha256(repr(request.prompt).encode()).digest()
        words, tokens = "", list[int]()
        for byte in digest[:8]:  # whole letters: smg leaves out a letter that is cut
            words = (words + letters[byte % len(letters)]).lstrip()
            ids = tokenizer.encode(words.rstrip(), add_special_tokens=False).ids
            tokens = ids if len(ids) <= 11 else tokens
        return tokens[position] if position < len(tokens) else 2

    return policy


async def test_our_prompts_and_text_are_smgs(tmp_path: Path) -> None:
    """100 conversations over groups that tell the prompt: prompts and text are equal."""
    tokenizer = Tokenizer.from_file(f"{MODEL}/tokenizer.json")
    policy = tells_the_prompt(tokenizer)
    async with smg_stack(MODEL, tmp_path / "smg.log", policy) as scripted:
        await compare(scripted, conversations(100))


@pytest.mark.parametrize(
    "count", [pytest.param(5, id="5"), pytest.param(100, id="100", marks=pytest.mark.slow)]
)
async def test_our_text_is_smgs_text(stack: SmgStack, count: int) -> None:
    """Greedy answers of the model: equal to smg's, text for text."""
    talks = conversations(100)
    await compare(stack, talks[:: len(talks) // count])


async def test_a_group_that_dies_in_mid_stream_is_not_seen(stack: SmgStack) -> None:
    """The streams of the lost group go on in the other group; their text is that of a calm run."""
    talks = [
        [{"role": "user", "content": f"Write about {topic}."}]
        for topic in ("llamas", "rain", "salt", "a mule")
    ]
    bodies = [{**GREEDY, "messages": talk, "max_tokens": 24} for talk in talks]

    async def read(body: dict[str, Any], began: asyncio.Event) -> str:
        text = ""
        async for delta in stream(stack, body):
            text += delta
            began.set()
        return text

    calm = [asyncio.Event() for _ in bodies]
    expected = await asyncio.gather(*(read(*pair) for pair in zip(bodies, calm, strict=True)))
    began = [asyncio.Event() for _ in bodies]
    running = [asyncio.create_task(read(*pair)) for pair in zip(bodies, began, strict=True)]
    await asyncio.gather(*(event.wait() for event in began))
    busy = max(stack.groups, key=lambda group: group.engine.stats().num_running)
    assert busy.engine.stats().num_running
    await busy.die()
    assert await asyncio.gather(*running) == expected
    moved = sum(
        float(line.split()[-1])
        for gateway in stack.gateways
        for line in gateway.inference.metrics.export().decode().splitlines()
        if line.startswith("arriero_stream_moves_total{")
    )
    assert moved >= 1
