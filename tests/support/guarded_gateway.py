"""A gateway with a scripted guard and a scripted Prompt Guard, and a model that says one text.

The guard condemns a conversation whose last message holds `bomb`.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
from tokenizers import Tokenizer

from arriero.router.client.client import AsyncClient
from arriero.router.gateway import Gateway, GatewayConfig, GroupAddress
from arriero.router.guards.injections import ScoreTexts
from arriero.router.link.server import LinkServer
from arriero.router.tenants.safety import SafetyPolicy
from arriero.router.tenants.tenant import ANYONE, Tenant
from arriero.shards.engine.types import EngineRequest
from arriero.shards.errors import Unavailable
from support.eventually import eventually_async
from support.frontdoor import LLAMA3, FakeEngine, make_card
from support.guard_templates import GUARD3

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


class ScriptedPromptGuard:
    """Scores texts with `Ignore all` at 0.9, others at 0.1; notes the texts of each call.

    Args:
        delay_s: seconds of a call.
        lost: raise an error in each call.
    """

    def __init__(self, *, delay_s: float = 0.0, lost: bool = False) -> None:
        self.calls: list[tuple[str, ...]] = []
        self._delay_s, self._lost = delay_s, lost

    async def __call__(self, texts: Sequence[str], timeout_s: float) -> list[float]:
        self.calls.append(tuple(texts))
        await asyncio.sleep(self._delay_s)
        if self._lost:
            raise Unavailable("no replica answers")
        return [0.9 if "Ignore all" in text else 0.1 for text in texts]


@asynccontextmanager
async def guarded(
    tokenizer: Tokenizer,
    said: str,
    policy: SafetyPolicy | None,
    *,
    template: str = GUARD3,
    code: str = "S1",
    model_template: str = LLAMA3,
    score_texts: ScoreTexts | None = None,
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
        make_card(tokenizer, model_template, max_model_len=8192),
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
        ),
        score_texts=score_texts,
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
