"""What a model says beside its calls reaches the client, whole and streamed alike."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from tokenizers import Tokenizer

from arriero.router import templates
from arriero.router.gateway import GatewayConfig
from arriero.shards.engine.types import EngineRequest
from support.frontdoor import make_card, serve

CITY = '{"city": "La Paz"}'
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}}
    for name in ("get_weather", "brave_search")
]
CALL = f'{{"name": "get_weather", "parameters": {CITY}}}'
# what the model says and what cuts it off; content, calls and finish reason
SAID: list[tuple[str, dict[str, Any], str | None, list[tuple[str, str]], str]] = [
    (CALL[:-1], {}, None, [("get_weather", CITY)], "tool_calls"),
    (CALL[:-2], {}, None, [("get_weather", CITY)], "tool_calls"),
    (f"I look.\n{CALL[:-1]}", {}, "I look.\n", [("get_weather", CITY)], "tool_calls"),
    (CALL[:-5], {}, CALL[:-5], [], "stop"),
    (CALL, {"tools": None}, CALL, [], "stop"),
    (
        f"<tool_call>{CALL}</tool_call>",
        {"tools": None},
        f"<tool_call>{CALL}</tool_call>",
        [],
        "stop",
    ),
    (f"<tool_call>\n{CALL}\n</tool_call> ok", {}, " ok", [("get_weather", CITY)], "tool_calls"),
    (f"```json\n{CALL}\n```", {}, None, [("get_weather", CITY)], "tool_calls"),
    (
        'brave_search.call(query="llamas")',
        {},
        None,
        [("brave_search", '{"query": "llamas"}')],
        "tool_calls",
    ),
    (CALL, {"cut": CALL[:-5]}, None, [("get_weather", CITY[:-4])], "length"),
    (CALL, {"cut": CALL[:-2]}, None, [("get_weather", CITY[:-1])], "length"),
    (CALL, {"cut": CALL[:14]}, CALL[:14], [], "length"),
    (CALL, {"stop": ["Paz"]}, CALL[:-6], [], "stop"),
    (
        f"[{CALL}, {CALL}]",
        {"cut": f"[{CALL}, {CALL[:-5]}"},
        None,
        [("get_weather", CITY), ("get_weather", CITY[:-4])],
        "length",
    ),
]


@pytest.mark.parametrize("case", SAID, ids=[str(number) for number in range(len(SAID))])
async def test_words_reach_the_client(llama_tokenizer: Tokenizer, case: Any) -> None:  # noqa: ANN401
    text, fields, content, calls, reason = case
    spoken = llama_tokenizer.encode(text, add_special_tokens=False).ids
    body: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}], "tools": TOOLS}
    body |= {name: value for name, value in fields.items() if name != "cut"}
    if "cut" in fields:
        cut = llama_tokenizer.encode(fields["cut"], add_special_tokens=False).ids
        spoken, body["max_tokens"] = [*cut, 50], len(cut)

    def policy(request: EngineRequest, index: int, position: int) -> int:
        return spoken[position] if position < len(spoken) else 1

    card = make_card(llama_tokenizer, templates.read("llama3.1"), max_model_len=4096)
    config = GatewayConfig(http_address="127.0.0.1:0")
    async with (
        serve(card, policy, config=config) as stack,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{stack.gateway.http_port}") as ask,
    ):
        whole = (await ask.post("/v1/chat/completions", json=body)).json()["choices"][0]
        message = whole["message"]
        assert message["content"] == content
        got = [
            (call["function"]["name"], call["function"]["arguments"])
            for call in message.get("tool_calls", ())
        ]
        assert got == calls
        assert whole["finish_reason"] == reason
        streamed = await ask.post("/v1/chat/completions", json=body | {"stream": True})
        said, named, last = "", {}, None
        for line in streamed.text.splitlines():
            if not line.startswith("data: {"):
                continue
            (choice,) = json.loads(line[6:])["choices"]
            said += choice["delta"].get("content") or ""
            last = choice["finish_reason"] or last
            for call in choice["delta"].get("tool_calls", ()):
                assert call["index"] not in named and call["id"]
                named[call["index"]] = (call["function"]["name"], call["function"]["arguments"])
        assert (said, list(named.values()), last) == (content or "", calls, reason)
