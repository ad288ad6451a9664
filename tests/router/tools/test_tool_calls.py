"""Tool calls through gRPC: offered by the template, found in the text, returned as messages."""

from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer

from arriero.router import templates
from arriero.router.proto.arriero.v1 import inference_pb2 as pb
from arriero.shards.engine.types import EngineRequest
from arriero.shards.errors import InvalidRequest
from support.frontdoor import make_card, serve

CALL = '{"name": "get_weather", "parameters": {"city": "La Paz"}}'
TOOL = pb.Tool(name="get_weather", description="The weather.", parameters='{"type": "object"}')
ASK = [{"role": "user", "content": "Is it sunny in La Paz?"}]


async def test_calls_are_found_and_given_back(llama_tokenizer: Tokenizer) -> None:
    words = llama_tokenizer.encode(f"<|python_tag|>{CALL}", add_special_tokens=False).ids

    def policy(request: EngineRequest, index: int, position: int) -> int:
        return words[position] if position < len(words) else 1

    card = make_card(llama_tokenizer, templates.read("llama3.1"), max_model_len=4096)
    async with serve(card, policy) as stack:
        answers = [one async for one in stack.client.chat(ASK, tools=[TOOL])]
        outputs = [output for answer in answers for output in answer.outputs]
        (call,) = [call for output in outputs for call in output.tool_calls]
        assert (call.name, json.loads(call.arguments)) == ("get_weather", {"city": "La Paz"})
        assert "".join(output.text for output in outputs) == ""
        assert outputs[-1].finish_reason == pb.FINISH_REASON_STOP

        back = [
            *ASK,
            {"role": "assistant", "tool_calls": [call]},
            {"role": "tool", "content": "sunny", "tool_call_id": call.id},
        ]
        [_ async for _ in stack.client.chat(back, tools=[TOOL])]
        shown = llama_tokenizer.decode(stack.engine.submitted[-1].prompt)
        assert '"city": "La Paz"' in shown and "sunny" in shown

        cut = [one async for one in stack.client.chat(ASK, tools=[TOOL], max_tokens=5)]
        last = cut[-1].outputs[0]
        assert last.finish_reason == pb.FINISH_REASON_LENGTH and not last.text
        assert CALL.startswith(last.truncated_tool_call) and last.truncated_tool_call

        bad = [
            ([pb.Tool(name="a b")], "letters, digits"),
            ([TOOL, TOOL], "occurs twice"),
            ([pb.Tool(name="a", parameters="[]")], "not an object"),
            ([pb.Tool(name="a", parameters="{")], "not JSON"),
            ([pb.Tool(name=f"t{i}") for i in range(129)], "the limit is 128"),
        ]
        for tools, words_of in bad:
            with pytest.raises(InvalidRequest, match=words_of):
                [_ async for _ in stack.client.chat(ASK, tools=tools)]
        with pytest.raises(InvalidRequest, match="include_text"):
            [_ async for _ in stack.client.chat(ASK, tools=[TOOL], include_text=False)]
