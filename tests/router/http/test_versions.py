"""Answers name their weights and give their token ids; vLLM's development paths."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

import httpx
import pytest
from tokenizers import Tokenizer

from arriero.router import templates
from arriero.router.gateway import GatewayConfig
from arriero.router.http.development import PATHS
from arriero.shards.errors import CheckpointError, Unauthenticated
from support.eventually import eventually_async
from support.frontdoor import Stack, echo, make_card, serve

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
MESSAGES = [{"role": "user", "content": "the quick brown fox"}]
BODIES: dict[str, dict[str, Any]] = {
    CHAT: {"messages": MESSAGES, "max_tokens": 4},
    COMPLETION: {"prompt": "the quick brown fox", "max_tokens": 4},
}
INIT: dict[str, dict[str, Any]] = {
    "/init_weight_transfer_engine": {
        "init_info": {
            "master_address": "127.0.0.1",
            "master_port": 9000,
            "rank_offset": 1,
            "world_size": 5,
        }
    }
}
UPDATE: dict[str, Any] = {
    "update_info": {"names": ["x"], "dtype_names": ["bfloat16"], "shapes": [[2, 3]]}
}
OLD, NEW = "a" * 32, "b" * 32


class Develop:
    """Stands for the operator."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, str | int]]] = []
        self.polls = 0
        self.error = ""

    async def __call__(
        self, authorization: str, action: str, fields: Mapping[str, str | int]
    ) -> dict[str, Any]:
        if authorization != "Bearer right":
            raise Unauthenticated("wrong token")
        self.calls.append((action, dict(fields)))
        if action == "push" and self.error:
            raise CheckpointError(self.error)
        self.polls += action == "status"
        model = {"model": "tiny", "version": 3, "settled": self.polls > 1, "error": ""}
        state = {"asleep": True, "paused": False, "num_slices": 4, "running": []}
        return {**state, "models": [model]}


@pytest.fixture
async def stack(llama_tokenizer: Tokenizer) -> AsyncIterator[Stack]:
    card = make_card(
        llama_tokenizer, templates.read("llama3.1"), digest=OLD, block_size=16, cache_root=b"o" * 16
    )
    config = GatewayConfig(http_address="127.0.0.1:0", models=("tiny",))
    async with serve(card, echo, config=config) as running:
        yield running


@pytest.fixture
async def ask(stack: Stack) -> AsyncIterator[httpx.AsyncClient]:
    url = f"http://127.0.0.1:{stack.gateway.http_port}"
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        yield client


async def chunks(ask: httpx.AsyncClient, path: str, **fields: Any) -> list[dict[str, Any]]:  # noqa: ANN401
    body = {"model": "tiny", "stream": True, **BODIES[path], **fields}
    answer = await ask.post(path, json=body)
    answer.raise_for_status()
    lines = [
        line.removeprefix("data: ") for line in answer.text.splitlines() if line[:5] == "data:"
    ]
    return [json.loads(line) for line in lines if line != "[DONE]"]


async def whole(ask: httpx.AsyncClient, path: str, **fields: Any) -> dict[str, Any]:  # noqa: ANN401
    answer = await ask.post(path, json={"model": "tiny", **BODIES[path], **fields})
    answer.raise_for_status()
    content: dict[str, Any] = answer.json()
    return content


@pytest.mark.parametrize("path", [CHAT, COMPLETION])
async def test_answers_name_the_weights_that_gave_them(
    stack: Stack, ask: httpx.AsyncClient, path: str
) -> None:
    assert (await whole(ask, path))["system_fingerprint"] == "fp_" + OLD[:16]
    stack.link.set_weights(NEW, b"r" * 16)
    await eventually_async(lambda: stack.gateway.inference.groups.groups()[0].card.digest == NEW)
    assert stack.gateway.inference.groups.groups()[0].card.cache_root == b"r" * 16
    assert (await whole(ask, path))["system_fingerprint"] == "fp_" + NEW[:16]
    names = {chunk.get("system_fingerprint") for chunk in await chunks(ask, path)}
    assert names == {"fp_" + NEW[:16]}


@pytest.mark.parametrize("path", [CHAT, COMPLETION])
async def test_token_ids_whole_and_in_chunks(ask: httpx.AsyncClient, path: str) -> None:
    plain = await whole(ask, path)
    assert "token_ids" not in plain["choices"][0] and "prompt_token_ids" not in plain
    answer = await whole(ask, path, return_token_ids=True)
    (choice,) = answer["choices"]
    prompt = (answer if path == CHAT else choice)["prompt_token_ids"]
    assert prompt and choice["token_ids"] == prompt[: len(choice["token_ids"])]  # `echo`
    assert len(choice["token_ids"]) == answer["usage"]["completion_tokens"] == 4
    parts = await chunks(ask, path, return_token_ids=True)
    ids = [token for part in parts for token in part["choices"][0].get("token_ids", [])]
    assert ids == choice["token_ids"]
    first = parts[0] if path == CHAT else parts[0]["choices"][0]
    assert first["prompt_token_ids"] == prompt
    later = [part if path == CHAT else part["choices"][0] for part in parts[1:]]
    assert all("prompt_token_ids" not in part for part in later)


async def test_token_ids_of_several_prompts_and_samples(ask: httpx.AsyncClient) -> None:
    prompts = ["the quick", "brown fox jumps over"]
    answer = await whole(ask, COMPLETION, prompt=prompts, n=2, return_token_ids=True)
    for number, choice in enumerate(answer["choices"]):
        assert choice["index"] == number
        assert choice["prompt_token_ids"] == answer["choices"][number // 2 * 2]["prompt_token_ids"]
        assert len(choice["token_ids"]) <= 4


async def test_tokens_of_logprobs_as_ids(stack: Stack, ask: httpx.AsyncClient) -> None:
    from arriero.shards.engine.types import SequenceOutput, TokenLogprobs

    take = stack.engine.on_outputs

    def with_rows(outputs: list[SequenceOutput]) -> None:
        for output in outputs:
            output.logprobs = tuple(
                TokenLogprobs(token=token, logprob=-0.5, top=((token, -0.5), (7, -1.0)))
                for token in output.tokens
            )
        take(outputs)

    stack.engine.on_outputs = with_rows
    wanted = {"return_token_ids": True, "return_tokens_as_token_ids": True}
    (choice,) = (await whole(ask, COMPLETION, logprobs=1, **wanted))["choices"]
    spelled = [f"token_id:{token}" for token in choice["token_ids"]]
    assert choice["logprobs"]["tokens"] == spelled
    assert list(choice["logprobs"]["top_logprobs"][0]) == [spelled[0], "token_id:7"]
    (choice,) = (await whole(ask, CHAT, logprobs=True, top_logprobs=1, **wanted))["choices"]
    rows = choice["logprobs"]["content"]
    assert [row["token"] for row in rows] == [f"token_id:{t}" for t in choice["token_ids"]]
    assert rows[0]["top_logprobs"][1]["token"] == "token_id:7"


async def test_development_paths_need_a_deployment_and_a_token(ask: httpx.AsyncClient) -> None:
    for path in PATHS:
        method = "GET" if path.startswith(("/is", "/get")) else "POST"
        body = {"/update_weights": {"path": "/w"}, **INIT}.get(path)
        assert (await ask.request(method, path, json=body)).status_code == 401
        answer = await ask.request(method, path, json=body, headers={"authorization": "Bearer x"})
        assert answer.status_code == 403  # no deployment behind this gateway


async def test_development_paths_in_the_shapes_of_vllm(llama_tokenizer: Tokenizer) -> None:
    from fastapi import FastAPI

    from arriero.router.http import errors
    from arriero.router.http.development import add_development

    app, develop = FastAPI(), Develop()
    errors.install(app)
    add_development(app, develop)
    headers = {"authorization": "Bearer right"}
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(
        transport=transport, base_url="http://t", headers=headers
    ) as client:
        assert (await client.post("/pause?mode=wait")).json() == {"status": "paused"}
        assert (await client.post("/sleep?level=2&mode=keep")).status_code == 200
        assert (await client.post("/sleep?level=0")).status_code == 200
        assert (await client.get("/is_sleeping")).json() == {"is_sleeping": True}
        assert (await client.get("/is_paused")).json() == {"is_paused": False}
        assert (await client.get("/get_world_size")).json() == {"world_size": 4}
        assert (await client.post("/wake_up")).status_code == 200
        assert (await client.post("/reset_prefix_cache?model=tiny")).status_code == 200
        develop.polls = 0
        answer = await client.post("/update_weights", json={"path": "/w/1", "model": "tiny"})
        assert answer.json() == {"status": "updated", "version": 3}
        assert [action for action, _ in develop.calls] == [
            *("pause", "sleep", "pause", "status", "status", "status", "wake", "resume"),
            *("flush", "push", "status", "status"),
        ]
        assert develop.calls[0][1] == {"model": "", "mode": "wait"}
        assert develop.calls[1][1] == {"model": "", "mode": "keep", "level": 2}
        assert (await client.post("/sleep?level=3")).status_code in (400, 422)


async def test_a_trainers_paths_in_the_shapes_of_vllm() -> None:
    from fastapi import FastAPI

    from arriero.router.http import errors
    from arriero.router.http.development import add_development

    app, develop = FastAPI(), Develop()
    errors.install(app)
    add_development(app, develop)
    headers = {"authorization": "Bearer right"}
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(
        transport=transport, base_url="http://t", headers=headers
    ) as client:

        async def post(path: str, body: Any = None) -> httpx.Response:  # noqa: ANN401
            return await client.post(path, json=body)

        answer = await post("/init_weight_transfer_engine", INIT["/init_weight_transfer_engine"])
        assert answer.json() == {"message": "Weight transfer initialized"}
        for body in (None, {"is_checkpoint_format": True}):
            answer = await post("/start_weight_update", body)
            assert answer.json() == {"message": "Weight update started"}
        assert (await post("/update_weights", UPDATE)).json() == {"message": "Weights updated"}
        answer = await post("/finish_weight_update", {"weight_version": 7})
        assert answer.json()["message"] == "Weight update finished"
        assert answer.json()["version"] == 3
        actions = [action for action, _ in develop.calls]
        assert actions[:5] == ["join", "start", "start", "announce", "receive"]
        assert actions[5] == "finish" and develop.calls[5][1]["weight_version"] == "7"
        info = json.loads(str(develop.calls[3][1]["info"]))
        assert info["names"] == ["x"] and info["shapes"] == [[2, 3]]
        wrong = {"update_info": UPDATE["update_info"] | {"shapes": []}}
        assert (await post("/update_weights", wrong)).status_code == 400
        wrong = {"update_info": UPDATE["update_info"], "path": "/w"}
        assert (await post("/update_weights", wrong)).status_code == 400
        assert (
            await post("/start_weight_update", {"is_checkpoint_format": False})
        ).status_code == 400
