"""A gateway with a scripted guard: every API, policy and loss; moderations.

The guard condemns a conversation whose last message holds `bomb`.
"""

from __future__ import annotations

import re

import pytest
from tokenizers import Tokenizer

from arriero.router.proto.arriero.v1 import inference_pb2 as pb
from arriero.router.tenants.safety import SafetyPolicy
from arriero.shards.errors import InvalidRequest, Unavailable
from support.eventually import eventually_async
from support.guard_templates import GUARD4
from support.guarded_gateway import BAD, GOOD, PLAIN, events, guarded, over_http, policy


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
        assert (await stack.http.post("/v1/moderations", json=wrong)).status_code == 404
        no_guard = {"input": "x", "model": "tiny"}
        assert (await stack.http.post("/v1/moderations", json=no_guard)).status_code == 400
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
        assert 'guard="tiny"' not in text, "a model that is no guard was not lost"
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
