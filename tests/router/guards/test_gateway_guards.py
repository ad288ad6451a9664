"""A gateway with a scripted guard: every API, policy and loss; moderations.

The guard condemns a conversation whose last message holds `bomb`.
"""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
from tokenizers import Tokenizer

from arriero.router.client.client import AsyncClient
from arriero.router.gateway import Gateway, GatewayConfig, GroupAddress
from arriero.router.link.server import LinkServer
from arriero.router.proto.arriero.v1 import inference_pb2 as pb
from arriero.router.tenants.safety import SafetyPolicy
from arriero.router.tenants.tenant import ANYONE, Tenant
from arriero.shards.engine.types import EngineRequest
from arriero.shards.errors import InvalidRequest, Unavailable
from support.eventually import eventually_async
from support.frontdoor import LLAMA3, FakeEngine, make_card
from support.guard_templates import GUARD3, GUARD4

GOOD = "the quick brown fox jumps over the lazy dog and runs away"
BAD = "the quick brown fox makes a bomb over the mountains and runs away"
PLAIN = [{"role": "user", "content": "Tell me a story."}]


@dataclass
class Guarded:
    """A gateway in front of a model and a guard."""

    gateway: Gateway
    client: AsyncClient
    http: httpx.AsyncClient
    model: FakeEngine
    guard: FakeEngine
    guard_link: LinkServer
    judged: list[str] = field(default_factory=list)


def judged_text(prompt: str) -> str:
    """The last turn in a guard's prompt."""
    talk = prompt.partition("<BEGIN CONVERSATION>\n\n")[2].partition("<END CONVERSATION>")[0]
    role = "Agent: " if "ONLY THE LAST Agent" in prompt else "User: "
    return talk.rpartition(role)[2].strip()


@asynccontextmanager
async def guarded(
    tokenizer: Tokenizer,
    said: str,
    policy: SafetyPolicy | None,
    *,
    template: str = GUARD3,
    code: str = "S1",
) -> AsyncIterator[Guarded]:
    words = tokenizer.encode(said, add_special_tokens=False).ids
    verdicts = {
        bad: tokenizer.encode(text, add_special_tokens=False).ids
        for bad, text in ((False, "\n\nsafe"), (True, f"\n\nunsafe\n{code}"))
    }
    judged: list[str] = []
    answers: dict[str, list[int]] = {}

    def speak(request: EngineRequest, index: int, position: int) -> int:
        return words[position] if position < len(words) else 1

    def judge(request: EngineRequest, index: int, position: int) -> int:
        if request.request_id not in answers:
            text = judged_text(tokenizer.decode(request.prompt, skip_special_tokens=False))
            judged.append(text)
            answers[request.request_id] = verdicts["bomb" in text]
        answer = answers[request.request_id]
        return answer[position] if position < len(answer) else 1

    cards = [
        make_card(tokenizer, LLAMA3, max_model_len=8192),
        make_card(tokenizer, template, model="guard", group="g1", max_model_len=8192),
    ]
    engines = [FakeEngine(speak), FakeEngine(judge)]
    links = [LinkServer(engine, card) for engine, card in zip(engines, cards, strict=True)]
    addresses = []
    for engine, link, card in zip(engines, links, cards, strict=True):
        engine.on_outputs = link.on_outputs
        addresses.append(GroupAddress(card.group, card.model, await link.start()))
    gateway = Gateway(
        GatewayConfig(
            http_address="127.0.0.1:0",
            lost_s=0.5,
            tenants=(Tenant(name=ANYONE, safety=policy),),
            guard="guard",
        )
    )
    port = await gateway.start()
    await gateway.set_groups(addresses)
    client = AsyncClient(f"127.0.0.1:{port}", timeout_s=60)
    http = httpx.AsyncClient(base_url=f"http://127.0.0.1:{gateway.http_port}", timeout=60)
    await eventually_async(lambda: len(gateway.linked()) == 2, 20)
    try:
        yield Guarded(gateway, client, http, *engines, links[1], judged)
    finally:
        await http.aclose()
        await client.close()
        await gateway.stop(0.5)
        for engine, link in zip(engines, links, strict=True):
            await link.stop(0.5)
            engine.close()


def policy(**changes: Any) -> SafetyPolicy:  # noqa: ANN401
    return SafetyPolicy(
        **{"guard": "guard", "window": 8, "overlap": 8, "timeout_s": 60.0} | changes
    )


def events(text: str) -> list[dict[str, Any]]:
    lines = [line[6:] for line in text.splitlines() if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


async def over_http(stack: Guarded, api: str, *, stream: bool) -> tuple[str, str]:
    """Shown text and reason of the end, of a call over HTTP."""
    body: dict[str, Any] = {"model": "tiny", "stream": stream}
    paths = {
        "chat": ("/v1/chat/completions", {"messages": PLAIN}),
        "completions": ("/v1/completions", {"prompt": "Tell me a story.", "max_tokens": 200}),
        "responses": ("/v1/responses", {"input": "Tell me a story."}),
        "messages": ("/v1/messages", {"messages": PLAIN, "max_tokens": 200}),
    }
    path, more = paths[api]
    answer = await stack.http.post(path, json=body | more)
    assert answer.status_code == 200, answer.text
    assert "bomb" not in answer.text
    found = events(answer.text) if stream else [answer.json()]
    text, reason = "", ""
    for entry in found:
        if api in ("chat", "completions"):
            for choice in entry["choices"]:
                part = choice.get("delta") or choice.get("message") or {}
                text += choice.get("text") or part.get("content") or ""
                reason = choice["finish_reason"] or reason
        elif api == "responses":
            whole = entry.get("response", entry if not stream else {})
            text += entry.get("delta", "")
            if not stream:
                text = whole["output"][0]["content"][0]["text"] if whole["output"] else ""
            reason = (whole.get("incomplete_details") or {}).get("reason") or reason
            reason = reason or ("stop" if whole.get("status") == "completed" else "")
        else:
            text += (entry.get("delta") or {}).get("text", "")
            text += "".join(block.get("text", "") for block in entry.get("content", ()))
            reason = (entry.get("delta") or entry).get("stop_reason") or reason
    return text, reason


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("said", [GOOD, BAD])
async def test_cut_over_every_api(llama_tokenizer: Tokenizer, said: str, stream: bool) -> None:
    filtered = {"messages": "refusal"}
    fine = {"messages": "end_turn"}
    async with guarded(llama_tokenizer, said, policy(output="cut")) as stack:
        for api in ("chat", "completions", "responses", "messages"):
            text, reason = await over_http(stack, api, stream=stream)
            if said == GOOD:
                assert (text, reason) == (GOOD, fine.get(api, "stop"))
            else:
                assert reason == filtered.get(api, "content_filter")
                assert BAD.startswith(text) and len(text) <= BAD.index("bomb")
        # steps that arrive together share a judgement, so only the least number is certain
        assert len(stack.judged) >= 4 and all(said.startswith(text) for text in stack.judged)


async def test_cut_over_grpc(llama_tokenizer: Tokenizer) -> None:
    async with guarded(llama_tokenizer, BAD, policy(output="cut")) as stack:
        for ids in (True, False):
            request = pb.ChatRequest(
                model="tiny", messages=[pb.Message(role="user", content="A story.")]
            )
            request.options.include_text, request.options.include_token_ids = not ids, ids
            request.sampling.n = 2
            found = [message async for message in stack.client._stub.Chat(request)]
            for index in range(2):
                outputs = [o for m in found for o in m.outputs if o.index == index]
                shown = "".join(output.text for output in outputs)
                shown += llama_tokenizer.decode([t for o in outputs for t in o.token_ids])
                assert BAD.startswith(shown.strip()) and "bom" not in shown
                assert outputs[-1].finish_reason == pb.FINISH_REASON_CONTENT_FILTER
            assert found[0].HasField("start") and found[-1].usage.completion_tokens > 8
            verdicts = [(v.subject, v.index, v.flagged) for v in found[-1].safety]
            assert sorted(verdicts) == [("output", 0, True), ("output", 1, True)]
        await eventually_async(lambda: not stack.model.running, 10)


async def test_input_refused_before_anything_is_shown(llama_tokenizer: Tokenizer) -> None:
    async with guarded(llama_tokenizer, GOOD, policy(input="refuse")) as stack:
        messages = [{"role": "user", "content": "How do I make a bomb?"}]
        for stream in (True, False):
            body = {"model": "tiny", "messages": messages, "stream": stream}
            answer = await stack.http.post("/v1/chat/completions", json=body)
            assert answer.status_code == 400
            assert answer.json()["error"]["code"] == "content_filter"
        assert (await over_http(stack, "chat", stream=True))[0] == GOOD
        with pytest.raises(InvalidRequest, match="judged as unsafe"):
            async for _ in stack.client.chat([{"role": "user", "content": "bomb"}], model="tiny"):
                pass
        await eventually_async(lambda: not stack.model.running, 10)


async def test_annotations(llama_tokenizer: Tokenizer) -> None:
    async with guarded(llama_tokenizer, BAD, policy(input="annotate", output="annotate")) as stack:
        body = {"model": "tiny", "messages": PLAIN}
        answer = (await stack.http.post("/v1/chat/completions", json=body)).json()
        assert answer["choices"][0]["message"]["content"] == BAD
        first, second = answer["safety"]
        assert (first["subject"], first["flagged"]) == ("input", False)
        assert (second["subject"], second["index"], second["flagged"]) == ("output", 0, True)
        assert second["categories"] == ["S1"] and 0 < second["score"] <= 1
        streamed = await stack.http.post("/v1/chat/completions", json=body | {"stream": True})
        assert [e["safety"] for e in events(streamed.text) if "safety" in e] == [answer["safety"]]


@pytest.mark.parametrize("on_loss", ["open", "closed"])
async def test_a_lost_guard_means_what_the_policy_says(
    llama_tokenizer: Tokenizer, on_loss: str
) -> None:
    settings = policy(input="refuse", output="cut", on_loss=on_loss, timeout_s=5)
    async with guarded(llama_tokenizer, GOOD, settings) as stack:
        await stack.guard_link.stop(0.1)
        await eventually_async(lambda: len(stack.gateway.linked()) == 1, 20)
        if on_loss == "open":
            assert (await over_http(stack, "chat", stream=False))[0] == GOOD
            return
        body = {"model": "tiny", "messages": PLAIN}
        answer = await stack.http.post("/v1/chat/completions", json=body)
        assert answer.status_code == 503 and "safety check" in answer.text
        with pytest.raises(Unavailable, match="safety check"):
            async for _ in stack.client.chat(PLAIN, model="tiny"):
                pass


async def test_a_guards_own_categories_count(llama_tokenizer: Tokenizer) -> None:
    """The template of Llama Guard 4 may list S14, which we leave out of lists of our own."""
    stacked = guarded(llama_tokenizer, GOOD, None, template=GUARD4, code="S14")
    async with stacked as stack:
        answer = await stack.http.post("/v1/moderations", json={"input": "a bomb"})
        (result,) = answer.json()["results"]
        assert result["flagged"] and result["categories"]["illicit"]


async def test_moderations(llama_tokenizer: Tokenizer) -> None:
    async with guarded(llama_tokenizer, GOOD, None) as stack:
        path = "/v1/moderations"
        answer = (await stack.http.post(path, json={"input": "a bomb"})).json()
        assert answer["model"] == "guard" and answer["id"].startswith("modr-")
        (result,) = answer["results"]
        assert result["flagged"] and result["categories"]["violence"]
        assert not result["categories"]["hate"] and result["category_scores"]["hate"] == 0
        assert 0 < result["category_scores"]["violence"] <= 1
        assert result["category_applied_input_types"]["violence"] == ["text"]
        parts = [{"type": "text", "text": "a llama"}, {"type": "text", "text": "a bomb"}]
        both = {"model": "omni-moderation-latest", "input": ["a fox", "a bomb"]}
        for body, flagged in ((both, [False, True]), ({"input": parts}, [True])):
            answer = (await stack.http.post(path, json=body)).json()
            assert [entry["flagged"] for entry in answer["results"]] == flagged
        own = {"input": "a bomb", "categories": {"X1": "Foxes"}}
        answer = (await stack.http.post(path, json=own)).json()
        assert not answer["results"][0]["flagged"], "S1 was not asked for"
        for wrong in ({"input": []}, {"input": "a", "model": "tiny"}, {"input": 3}):
            answer = await stack.http.post(path, json=wrong)
            assert answer.status_code == 400, answer.text
        answer = await stack.http.post(path, json={"input": "a", "model": "nobody"})
        assert answer.status_code == 404 and answer.json()["error"]["code"] == "model_not_found"
        # over gRPC: a conversation whose last message is the agent's
        talk = [
            pb.Message(role="user", content="Hello."),
            pb.Message(role="assistant", content="Take a bomb."),
        ]
        request = pb.ModerateRequest(model="guard", inputs=[pb.ModerateInput(messages=talk)])
        verdicts = (await stack.client.moderate(request)).verdicts
        assert verdicts[0].flagged and list(verdicts[0].categories) == ["S1"]
        assert {model.id: model.guard for model in await stack.client.models()} == {
            "guard": "llama-guard-3",
            "tiny": "",
        }


async def test_judgements_are_counted(llama_tokenizer: Tokenizer) -> None:
    policy = SafetyPolicy(guard="guard", input="annotate", output="cut", window=8)
    async with guarded(llama_tokenizer, BAD, policy) as stack:
        body = {"model": "tiny", "messages": PLAIN}
        answer = await stack.http.post("/v1/chat/completions", json=body)
        assert answer.json()["choices"][0]["finish_reason"] == "content_filter"
        inputs = {"input": ["all is well", "a bomb"]}
        assert (await stack.http.post("/v1/moderations", json=inputs)).status_code == 200
        wrong = {"input": "x", "model": "invented"}
        assert (await stack.http.post("/v1/moderations", json=wrong)).status_code == 503
        text = (await stack.http.get("/metrics")).text
        counts = {
            (policy, verdict): float(count)
            for policy, verdict, count in re.findall(
                r'arriero_guard_verdicts_total\{guard="guard",policy="(\w+)",tenant="anyone",'
                r'verdict="(\w+)"\} (\S+)',
                text,
            )
        }
        assert counts["input_annotate", "safe"] == 1
        assert counts["output_cut", "unsafe"] == 1
        assert counts["moderation", "safe"] == counts["moderation", "unsafe"] == 1
        assert "invented" not in text
        judged = re.search(r'arriero_guard_seconds_count\{guard="guard"\} (\S+)', text)
        assert judged is not None and float(judged[1]) == sum(counts.values())


async def test_a_guard_without_a_verdict_counts_as_lost(llama_tokenizer: Tokenizer) -> None:
    policy = SafetyPolicy(guard="guard", input="refuse", timeout_s=0.2)
    async with guarded(llama_tokenizer, GOOD, policy) as stack:
        await stack.guard_link.stop(0)
        body = {"model": "tiny", "messages": PLAIN}
        assert (await stack.http.post("/v1/chat/completions", json=body)).status_code == 503
        text = (await stack.http.get("/metrics")).text
        assert 'policy="input_refuse",tenant="anyone",verdict="lost"} 1.0' in text
