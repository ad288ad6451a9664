"""Speculation at the front door: what a request may ask for, and what its usage and metrics say."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families
from tokenizers import Tokenizer

from arriero.router.gateway import Gateway, GatewayConfig, GroupAddress
from arriero.router.link.server import LinkServer
from arriero.shards.engine.stats import EngineStats, SpeculationStats
from arriero.shards.engine.types import SequenceOutput
from support.eventually import eventually_async
from support.frontdoor import LLAMA3, FakeEngine, endless, make_card

NUM_TOKENS, DRAFTED, ACCEPTED = 5, 4, 1
"""Each token of the fake engine comes with a draft of four tokens, of which one was right."""
ASK: list[Any] = [{"role": "user", "content": "say it again"}]
DETAILS = {
    "accepted_prediction_tokens": NUM_TOKENS * ACCEPTED,
    "rejected_prediction_tokens": NUM_TOKENS * (DRAFTED - ACCEPTED),
}
METRICS = {
    ("arriero_group_drafts_total", ""): 10,
    ("arriero_group_drafted_tokens_total", "accepted"): 18,
    ("arriero_group_drafted_tokens_total", "rejected"): 6,
    ("arriero_group_accepted_tokens_total", "1"): 9,
    ("arriero_group_accepted_tokens_total", "2"): 9,
}


class DraftingEngine(FakeEngine):
    """Says that it drafted, unless the request turns drafts off."""

    def stats(self) -> EngineStats:
        drafts = SpeculationStats(drafts=10, drafted=24, accepted=18, by_position=[9, 9])
        return EngineStats(steps=self.steps, speculation=drafts)

    def _step(self, request_id: str, index: int) -> SequenceOutput:
        off = self.running[request_id].speculation == "off"
        output = super()._step(request_id, index)
        if not off:
            output.num_drafted, output.num_accepted = DRAFTED, ACCEPTED
        return output


@dataclass
class Served:
    """A gateway with HTTP over a drafting engine."""

    engine: DraftingEngine
    openai: openai.AsyncOpenAI
    http: httpx.AsyncClient


@pytest.fixture
async def served(llama_tokenizer: Tokenizer) -> AsyncIterator[Served]:
    engine = DraftingEngine(endless)
    link = LinkServer(engine, make_card(llama_tokenizer, LLAMA3))
    engine.on_outputs = link.on_outputs
    gateway = Gateway(GatewayConfig(http_address="127.0.0.1:0", models=("tiny",), lost_s=0.5))
    await gateway.start()
    await gateway.set_groups([GroupAddress("g0", "tiny", await link.start())])
    await eventually_async(lambda: gateway.ready, 20)
    url = f"http://127.0.0.1:{gateway.http_port}"
    sdk = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    async with httpx.AsyncClient(base_url=url) as http, sdk:
        yield Served(engine, sdk, http)
    await gateway.stop(0.5)
    await link.stop(0.5)
    engine.close()


async def test_the_usage_of_chats_counts_drafts(served: Served) -> None:
    create = served.openai.chat.completions.create
    answer = await create(model="tiny", messages=ASK, max_tokens=NUM_TOKENS)
    assert answer.usage is not None and answer.usage.completion_tokens_details is not None
    assert answer.usage.completion_tokens == NUM_TOKENS
    assert DETAILS.items() <= answer.usage.completion_tokens_details.model_dump().items()
    both = await create(model="tiny", messages=ASK, max_tokens=NUM_TOKENS, n=2)
    assert both.usage is not None and both.usage.completion_tokens_details is not None
    counts = both.usage.completion_tokens_details
    assert counts.accepted_prediction_tokens == 2 * NUM_TOKENS * ACCEPTED
    stream = await create(
        model="tiny",
        messages=ASK,
        max_tokens=NUM_TOKENS,
        stream=True,
        stream_options={"include_usage": True},
    )
    last = [chunk async for chunk in stream][-1]
    assert last.usage is not None and last.usage.completion_tokens_details is not None
    assert DETAILS.items() <= last.usage.completion_tokens_details.model_dump().items()


async def test_the_usage_of_completions_counts_drafts(served: Served) -> None:
    create = served.openai.completions.create
    answer = await create(model="tiny", prompt="it", max_tokens=NUM_TOKENS)
    assert answer.usage is not None and answer.usage.completion_tokens_details is not None
    assert DETAILS.items() <= answer.usage.completion_tokens_details.model_dump().items()
    stream = await create(
        model="tiny",
        prompt="it",
        max_tokens=NUM_TOKENS,
        stream=True,
        stream_options={"include_usage": True},
    )
    last = [chunk async for chunk in stream][-1]
    assert last.usage is not None and last.usage.completion_tokens_details is not None
    assert DETAILS.items() <= last.usage.completion_tokens_details.model_dump().items()


async def test_the_usage_of_responses_counts_drafts(served: Served) -> None:
    body: dict[str, Any] = {"model": "tiny", "input": "it", "max_output_tokens": NUM_TOKENS}
    answer = await served.http.post("/v1/responses", json=body)
    assert answer.status_code == 200, answer.text
    details = {"reasoning_tokens": 0} | DETAILS
    assert answer.json()["usage"]["output_tokens_details"] == details
    stream = await served.http.post("/v1/responses", json=body | {"stream": True})
    events = [line for line in stream.text.splitlines() if line.startswith("data: {")]
    last = json.loads(events[-1].removeprefix("data: "))
    assert last["response"]["usage"]["output_tokens_details"] == details


BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": ASK, "max_tokens": NUM_TOKENS},
    "/v1/completions": {"prompt": "it", "max_tokens": NUM_TOKENS},
}


OTHER_BODIES: dict[str, dict[str, Any]] = {
    "/v1/responses": {"input": "it", "max_output_tokens": NUM_TOKENS},
    "/v1/messages": {"messages": ASK, "max_tokens": NUM_TOKENS},
}


@pytest.mark.parametrize("path", OTHER_BODIES)
async def test_other_apis_choose_the_kind_of_drafts(served: Served, path: str) -> None:
    body = OTHER_BODIES[path] | {"model": "tiny"}
    for kind in ("off", "ngram"):
        answer = await served.http.post(path, json=body | {"speculation": {"kind": kind}})
        assert answer.status_code == 200, answer.text
        assert served.engine.submitted[-1].speculation == kind
    count = len(served.engine.submitted)
    for wrong in ({"kind": "medusa"}, {}, {"kind": "off", "tokens": 3}, "off"):
        answer = await served.http.post(path, json=body | {"speculation": wrong})
        assert answer.status_code == 400 and "`speculation" in answer.text, answer.text
    assert len(served.engine.submitted) == count


@pytest.mark.parametrize("path", BODIES)
async def test_a_request_turns_drafts_off(served: Served, path: str) -> None:
    more = {"speculation": {"kind": "off"}, "prediction": {"type": "content", "content": "it"}}
    answer = await served.http.post(path, json=BODIES[path] | more)
    assert answer.status_code == 200, answer.text
    assert "completion_tokens_details" not in answer.json()["usage"], "nothing was drafted"
    (request,) = served.engine.submitted
    assert (request.speculation, request.prediction) == ("off", ())


@pytest.mark.parametrize("path", BODIES)
async def test_a_prediction_is_text_or_parts(
    served: Served, path: str, llama_tokenizer: Tokenizer
) -> None:
    words = "the quick brown fox"
    whole: Any = {"type": "content", "content": words}
    parts = [{"type": "text", "text": part} for part in (words[:7], words[7:])]
    for prediction in (whole, {"type": "content", "content": parts}):
        answer = await served.http.post(path, json=BODIES[path] | {"prediction": prediction})
        assert answer.status_code == 200, answer.text
        got = served.engine.submitted[-1]
        tokens = llama_tokenizer.encode(words, add_special_tokens=False).ids
        assert (got.speculation, got.prediction) == ("", tuple(tokens))


async def test_the_openai_client_sends_a_prediction(
    served: Served, llama_tokenizer: Tokenizer
) -> None:
    await served.openai.chat.completions.create(
        model="tiny",
        messages=ASK,
        max_tokens=1,
        prediction={"type": "content", "content": "the quick"},
        extra_body={"speculation": {"kind": "ngram"}},
    )
    (request,) = served.engine.submitted
    tokens = llama_tokenizer.encode("the quick", add_special_tokens=False).ids
    assert (request.speculation, request.prediction) == ("ngram", tuple(tokens))


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize(
    ("field", "value", "param"),
    [
        ("speculation", {"kind": "medusa"}, "speculation.kind"),
        ("speculation", {}, "speculation.kind"),
        ("speculation", {"kind": "off", "tokens": 3}, "speculation.tokens"),
        ("speculation", "off", "speculation"),
        ("prediction", {"type": "content"}, "prediction.content"),
        ("prediction", {"type": "text", "content": "it"}, "prediction.type"),
        ("prediction", {"type": "content", "content": 7}, "prediction.content"),
        ("prediction", {"type": "content", "content": "x" * (4 << 20)}, "prediction"),
    ],
)
async def test_what_is_refused_is_named(
    served: Served, path: str, field: str, value: object, param: str
) -> None:
    answer = await served.http.post(path, json=BODIES[path] | {field: value})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == param and f"`{param}`" in error["message"], json.dumps(error)
    assert not served.engine.submitted


async def test_metrics_count_drafts(served: Served) -> None:
    async def exported() -> dict[tuple[str, str], float]:
        page = (await served.http.get("/metrics")).text
        return {
            (sample.name, sample.labels.get("outcome") or sample.labels.get("position", "")): (
                sample.value
            )
            for family in text_string_to_metric_families(page)
            for sample in family.samples
            if sample.labels.get("group") == "g0"
        }

    answer = await served.http.post("/v1/completions", json=BODIES["/v1/completions"])
    assert answer.status_code == 200
    async with asyncio.timeout(10):
        while not METRICS.items() <= (await exported()).items():
            await asyncio.sleep(0.05)
