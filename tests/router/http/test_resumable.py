"""Streams over HTTP that go on at another gateway after the loss of the first."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from tokenizers import Tokenizer

from arriero.router.gateway import Gateway, GatewayConfig
from arriero.router.http import resumable_answers
from arriero.router.http.numbered_events import ChoicePosition, read_id
from arriero.router.http.responses_api.store import Key
from arriero.router.http.resumable_answers import LocalArchive
from arriero.router.tenants.keys import add_key
from arriero.shards.engine.sequence import sample_seed
from arriero.shards.engine.types import EngineRequest
from arriero.shards.errors import InvalidRequest
from support.frontdoor import LLAMA3, Policy, make_card
from support.gateways import Gateways, serve_by

ASK = [{"role": "user", "content": "what do llamas carry?"}]
CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
RESUMABLE = {"x-resumable": "1"}
CALL = '{"name": "get_weather", "parameters": {"city": "La Paz"}}'
BODIES: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": (CHAT, {"messages": ASK, "max_tokens": 60, "seed": 5}),
    "samples": (CHAT, {"messages": ASK, "max_tokens": 40, "n": 3, "seed": 7}),
    "logprobs": (
        CHAT,
        {"messages": ASK, "max_tokens": 40, "logprobs": True, "top_logprobs": 2, "seed": 5},
    ),
    "usage": (
        CHAT,
        {"messages": ASK, "max_tokens": 40, "seed": 5, "stream_options": {"include_usage": True}},
    ),
    "text": (
        TEXT,
        {"prompt": "the quick brown", "max_tokens": 60, "echo": True, "logprobs": 1, "seed": 5},
    ),
    "prompts": (TEXT, {"prompt": ["the quick", "brown fox jumps"], "max_tokens": 40, "seed": 5}),
    "tokens": (TEXT, {"prompt": [60, 61, 62], "max_tokens": 40, "echo": True, "seed": 5}),
}


def by_seed_and_position(request: EngineRequest, index: int, position: int) -> int:
    """As the contract asks: a function of seed, prompt and position alone; ends nowhere."""
    seed = sample_seed(request.params.seed or 0, index)
    return 60 + (seed * 31 + len(request.prompt) * 7 + position * 11) % 300


@dataclass
class SharedArchive:
    """The part of an archive that one gateway reaches; a killed gateway notes nothing more."""

    shared: LocalArchive
    alive: bool = True
    num_notes: int = 0
    only_starts: bool = False

    async def put(self, key: Key, value: bytes) -> None:
        if self.alive and not (self.only_starts and key[1].endswith("/tokens")):
            self.num_notes += 1
            await self.shared.put(key, value)

    async def get(self, key: Key) -> bytes | None:
        return await self.shared.get(key)

    async def delete(self, key: Key) -> None:
        await self.shared.delete(key)


@dataclass
class Two:
    """Two gateways with one archive, over one group."""

    served: Gateways
    archives: list[SharedArchive]
    keys: list[str] = field(default_factory=list)

    async def kill(self, number: int) -> None:
        self.archives[number].alive = False
        await self.served.kill(number)

    def http(self, number: int, key: str = "", **headers: str) -> httpx.AsyncClient:
        if key:
            headers["authorization"] = f"Bearer {key}"
        return self.served.http(number, headers=headers)


def two(
    tokenizer: Tokenizer,
    policy: Policy = by_seed_and_position,
    *,
    step_s: float = 0.004,
    keys: Path | None = None,
    resumable_s: float = 60.0,
    template: str = LLAMA3,
) -> Any:  # noqa: ANN401  # a context
    shared = LocalArchive()
    archives = [SharedArchive(shared), SharedArchive(shared)]
    config = GatewayConfig(http_address="127.0.0.1:0", keys=keys, resumable_s=resumable_s)

    class Context:
        async def __aenter__(self) -> Two:
            card = make_card(tokenizer, template, max_model_len=4096)
            self.inner = serve_by(
                [card], policy, config, config, step_s=step_s,
                make=lambda number, config: Gateway(config, archive=archives[number]),
            )  # fmt: skip
            served = await self.inner.__aenter__()
            for number in (0, 1) if keys is None else ():
                await served.warm(number)
            return Two(served, archives)

        async def __aexit__(self, *error: Any) -> None:  # noqa: ANN401
            await self.inner.__aexit__(*error)

    return Context()


@dataclass
class Received:
    """What a client has of an answer."""

    event_id: str = ""
    events: list[dict[str, Any]] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    done: bool = False

    @property
    def answer_id(self) -> str:
        return str(self.events[0]["id"])

    def shown(self) -> list[dict[str, Any]]:
        """The events without what differs between two requests, a choice in each."""
        return [{"choices": event["choices"], "usage": event.get("usage")} for event in self.events]

    async def read(self, response: httpx.Response, most: int | None = None) -> None:
        """Read events, up to a number or to the end."""
        event_id = ""
        count = 0
        async for line in response.aiter_lines():
            if line.startswith("id: "):
                event_id = line.removeprefix("id: ")
            elif line == "data: [DONE]":
                self.done = True
            elif line.startswith("data: "):
                self.events.append(json.loads(line.removeprefix("data: ")))
                assert "error" not in self.events[-1], line
                if event_id:
                    self.event_id = event_id
                    self.ids.append(event_id)
                event_id = ""
                count += 1
                if count == most:
                    return


def by_choice(events: list[dict[str, Any]]) -> dict[int, list[dict[str, Any]]]:
    """The events' choices in order, for each choice: the order of choices may differ."""
    choices: dict[int, list[dict[str, Any]]] = {}
    for event in events:
        for choice in event["choices"]:
            choices.setdefault(choice["index"], []).append(choice)
    return choices


def joined(events: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """Text, log-probabilities and end of each choice."""
    whole: dict[int, dict[str, Any]] = {}
    for index, parts in by_choice(events).items():
        text = [part.get("text") or part.get("delta", {}).get("content") or "" for part in parts]
        rows: list[Any] = []
        for part in parts:
            logprobs = part["logprobs"] or {}
            rows += logprobs.get("content") or list(
                zip(*(logprobs.get(name, ()) for name in ("tokens", "text_offset")), strict=True)
            )
        calls = [call for part in parts for call in part.get("delta", {}).get("tool_calls", ())]
        whole[index] = {
            "text": "".join(text),
            "rows": rows,
            "calls": [(call["index"], call["function"]) for call in calls],
            "roles": [part["delta"]["role"] for part in parts if part.get("delta", {}).get("role")],
            "end": [part["finish_reason"] for part in parts if part["finish_reason"]],
        }
    return whole


async def undisturbed(both: Two, path: str, body: dict[str, Any], **headers: str) -> Received:
    whole = Received()
    async with both.http(1, **headers) as ask:
        async with ask.stream("POST", path, json=body | {"stream": True}) as response:
            assert response.status_code == 200, await response.aread()
            await whole.read(response)
    assert whole.done
    return whole


@pytest.mark.parametrize("noted", ["nothing", "some"])
@pytest.mark.parametrize("kind", BODIES)
async def test_a_killed_gateways_stream_goes_on_at_another(
    llama_tokenizer: Tokenizer, kind: str, noted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resumable_answers, "NOTE_S", 0.02)
    path, body = BODIES[kind]
    async with two(llama_tokenizer) as both:
        both.archives[0].only_starts = noted == "nothing"
        expected = await undisturbed(both, path, body)
        received = Received()
        async with both.http(0) as ask:
            request = ask.stream("POST", path, json=body | {"stream": True}, headers=RESUMABLE)
            async with request as response:
                assert response.headers["x-resumable"] == "60"
                await received.read(response, 17)
                await both.kill(0)
        before = len(received.events)
        assert not received.done and before == 17
        async with both.http(1) as ask:
            headers = {"last-event-id": received.event_id}
            request = ask.stream("GET", f"{path}/{received.answer_id}", headers=headers)
            async with request as response:
                assert response.status_code == 200, await response.aread()
                await received.read(response)
        assert received.done and len(received.events) > before
        assert joined(received.events) == joined(expected.events)
        assert {event["id"] for event in received.events} == {received.answer_id}
        assert len(set(received.ids)) == len(received.ids), "an event came twice"
        usage = (
            [event["usage"] for event in (received.events[-1], expected.events[-1])]
            if (kind == "usage")
            else [0, 0]
        )
        assert usage[0] == usage[1]


async def test_a_client_that_lost_its_connection_reads_on(llama_tokenizer: Tokenizer) -> None:
    """At the same gateway, by a second POST of the same body, as clients that retry do."""
    body = {"messages": ASK, "max_tokens": 80, "seed": 5, "stream": True}
    async with two(llama_tokenizer) as both:
        expected = await undisturbed(both, CHAT, body)
        num_before = len(both.served.engines[0].submitted)
        received = Received()
        for _ in range(4):
            headers = RESUMABLE | ({"last-event-id": received.event_id} if received.ids else {})
            async with both.http(0) as ask:
                async with ask.stream("POST", CHAT, json=body, headers=headers) as response:
                    await received.read(response, 10)
        async with both.http(0) as ask:
            headers = {"last-event-id": received.event_id}
            async with ask.stream("POST", CHAT, json=body, headers=headers) as response:
                await received.read(response)
        assert joined(received.events) == joined(expected.events)
        assert len(set(received.ids)) == len(received.ids)
        assert len(both.served.engines[0].submitted) == num_before + 1, "nothing ran twice"


async def test_to_and_fro_between_two_gateways_that_live(llama_tokenizer: Tokenizer) -> None:
    path, body = BODIES["samples"]
    async with two(llama_tokenizer) as both:
        expected = await undisturbed(both, path, body)
        received = Received()
        async with both.http(0) as ask:
            request = ask.stream("POST", path, json=body | {"stream": True}, headers=RESUMABLE)
            async with request as response:
                await received.read(response, 10)
        for turn in range(8):
            async with both.http((turn + 1) % 2) as ask:
                headers = {"last-event-id": received.event_id}
                request = ask.stream("GET", f"{path}/{received.answer_id}", headers=headers)
                async with request as response:
                    assert response.status_code == 200, await response.aread()
                    await received.read(response, 11 if turn < 7 else None)
        assert joined(received.events) == joined(expected.events)
        assert len(set(received.ids)) == len(received.ids)


async def test_only_its_own_tenant_resumes_a_stream(
    llama_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    path = tmp_path / "keys.yaml"
    owner, second = add_key(path, "acme"), add_key(path, "acme")
    other, scoped = add_key(path, "umbrella"), add_key(path, "acme", models=["another"])
    body = {"messages": ASK, "max_tokens": 60, "stream": True}
    async with two(llama_tokenizer, keys=path) as both:
        received = Received()
        async with both.http(0, owner) as ask:
            async with ask.stream("POST", CHAT, json=body, headers=RESUMABLE) as response:
                await received.read(response, 10)
        there = f"{CHAT}/{received.answer_id}"
        headers = {"last-event-id": received.event_id}
        for number in (0, 1):
            for key, status in ((other, 404), (scoped, 404), ("", 401)):
                async with both.http(number, key) as ask:
                    refused = await ask.get(there, headers=headers)
                    assert refused.status_code == status, refused.text
                    assert "llamas" not in refused.text
                    again = await ask.post(CHAT, json=body, headers=headers)
                    assert again.status_code == status, again.text
        async with both.http(0, other) as ask:
            refused = await ask.get(there, headers=headers)
            assert refused.json()["error"]["code"] == "answer_not_found"
        await both.kill(0)
        async with both.http(1, second) as ask, ask.stream("GET", there, headers=headers) as rest:
            assert rest.status_code == 200
            await received.read(rest)
        assert received.done


async def test_an_answer_that_has_ended_can_be_read_to_its_end(
    llama_tokenizer: Tokenizer,
) -> None:
    body = {"messages": ASK, "max_tokens": 12, "stream": True, "n": 2,
            "stream_options": {"include_usage": True}}  # fmt: skip
    async with two(llama_tokenizer) as both:
        whole = Received()
        async with both.http(0) as ask:
            async with ask.stream("POST", CHAT, json=body, headers=RESUMABLE) as response:
                await whole.read(response)
        for number in (0, 1):
            rest = Received()
            async with both.http(number) as ask:
                headers = {"last-event-id": whole.event_id}
                there = f"{CHAT}/{whole.answer_id}"
                async with ask.stream("GET", there, headers=headers) as response:
                    await rest.read(response)
                assert rest.done and rest.ids == []
                assert [event["usage"] for event in rest.events] == [whole.events[-1]["usage"]]
                async with ask.stream("GET", there) as response:  # without an id: from the start
                    rest = Received()
                    await rest.read(response)
                assert joined(rest.events) == joined(whole.events)


async def test_calls_of_tools_are_not_cut(llama_tokenizer: Tokenizer) -> None:
    from importlib import resources

    from arriero.router import templates

    template = resources.files(templates).joinpath("llama3.1.jinja").read_text()
    said = llama_tokenizer.encode(CALL, add_special_tokens=False).ids

    def calling(request: EngineRequest, index: int, position: int) -> int:
        return said[position] if position < len(said) else 1

    tool = {"type": "function", "function": {"name": "get_weather", "parameters": {}}}
    body = {"messages": ASK, "tools": [tool], "max_tokens": 100, "stream": True, "n": 2}
    async with two(llama_tokenizer, calling, template=template, step_s=0.01) as both:
        expected = await undisturbed(both, CHAT, body)
        received = Received()
        async with both.http(0) as ask:
            async with ask.stream("POST", CHAT, json=body, headers=RESUMABLE) as response:
                await received.read(response, 1)
        await both.kill(0)
        async with both.http(1) as ask:
            headers = {"last-event-id": received.event_id}
            there = f"{CHAT}/{received.answer_id}"
            async with ask.stream("GET", there, headers=headers) as response:
                await received.read(response)
        assert joined(received.events) == joined(expected.events)
        assert joined(received.events)[0]["end"] == ["tool_calls"]


async def test_streams_end_when_nobody_comes_back(llama_tokenizer: Tokenizer) -> None:
    body = {"messages": ASK, "max_tokens": 4000, "stream": True}
    async with two(llama_tokenizer, resumable_s=0.3, step_s=0.02) as both:
        engine = both.served.engines[0]
        received = Received()
        async with both.http(0) as ask:
            async with ask.stream("POST", CHAT, json=body, headers=RESUMABLE) as response:
                await received.read(response, 3)
        await asyncio.sleep(0.1)
        assert engine.running, "the stream goes on without its client"
        async with asyncio.timeout(5):
            while engine.running:
                await asyncio.sleep(0.02)
        await asyncio.sleep(0.4)
        for number in (0, 1):
            async with both.http(number) as ask:
                gone = await ask.get(f"{CHAT}/{received.answer_id}")
                assert gone.status_code == 404 and "kept for 0.3 s" in gone.text


async def test_refusals(llama_tokenizer: Tokenizer) -> None:
    body = {"messages": ASK, "max_tokens": 4, "stream": True}
    async with two(llama_tokenizer) as both, both.http(0) as ask:
        for wrong in ("x", "chatcmpl-1f", "chatcmpl-1f:a", "../../x:1", "chatcmpl-1f:1;2"):
            refused = await ask.post(CHAT, json=body, headers={"last-event-id": wrong})
            assert refused.status_code == 400 and "Last-Event-ID" in refused.text
        missing = await ask.get(f"{CHAT}/chatcmpl-1f", headers={"last-event-id": "chatcmpl-1f:3"})
        assert missing.status_code == 404
        other = await ask.get(f"{CHAT}/chatcmpl-2f", headers={"last-event-id": "chatcmpl-1f:3"})
        assert other.status_code == 400
        whole = Received()
        async with ask.stream("POST", CHAT, json=body, headers=RESUMABLE) as response:
            await whole.read(response)
        several = {"last-event-id": f"{whole.answer_id}:1,1"}
        refused = await ask.get(f"{CHAT}/{whole.answer_id}", headers=several)
        assert refused.status_code == 400 and "names 2 choices; the answer has 1" in refused.text
        # without `stream`, and without the header, everything is as it was
        assert (await ask.post(CHAT, json=body | {"stream": False}, headers=RESUMABLE)).json()
        plain = await ask.post(CHAT, json=body)
        assert "\nid:" not in plain.text and "x-resumable" not in plain.headers
    async with two(llama_tokenizer, resumable_s=0) as both, both.http(0) as ask:
        refused = await ask.post(CHAT, json=body, headers=RESUMABLE)
        assert refused.status_code == 400 and "`gateway.resumable_s` is 0" in refused.text


async def test_the_usual_client_reads_numbered_events(llama_tokenizer: Tokenizer) -> None:
    async with two(llama_tokenizer) as both:
        port = both.served.gateways[0].http_port
        async with openai.AsyncOpenAI(
            base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0
        ) as ask:
            stream = await ask.chat.completions.create(
                model="tiny", messages=ASK, stream=True, max_tokens=20, extra_headers=RESUMABLE
            )  # type: ignore[call-overload]
            chunks = [chunk async for chunk in stream]
        assert chunks[-1].choices[0].finish_reason == "length"


def test_ids_are_read() -> None:
    finished, all_text = ChoicePosition(9, finished=True), ChoicePosition(4, all_text=True)
    expected = (ChoicePosition(17), finished, all_text)
    assert read_id("chatcmpl-1f:17,9f,4t") == ("chatcmpl-1f", expected)
    assert read_id("cmpl-1f:0r") == ("cmpl-1f", (ChoicePosition(role=True),))
    with pytest.raises(InvalidRequest, match="names 2 choices"):
        read_id("cmpl-1f:17,9f", 3)
