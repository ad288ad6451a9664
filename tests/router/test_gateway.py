"""The gateway over real sockets, with a policy in the engine's place."""

from __future__ import annotations

from tokenizers import Tokenizer

from arriero.router.proto.arriero.v1 import inference_pb2 as pb
from support.frontdoor import LLAMA3, echo, make_card, serve


async def collect(stream) -> tuple[str, list[int], list[pb.GenerateResponse]]:
    responses = [response async for response in stream]
    text = "".join(o.text for r in responses for o in r.outputs)
    ids = [i for r in responses for o in r.outputs for i in o.token_ids]
    return text, ids, responses


async def test_echoes_text_token_by_token(llama_tokenizer: Tokenizer) -> None:
    said = "the quick 🦙 señor — 日本語\n"
    async with serve(make_card(llama_tokenizer, LLAMA3), echo) as stack:
        text, ids, responses = await collect(
            stack.client.generate(said, add_special_tokens=False, request_id="mine", seed=7)
        )
    expected = llama_tokenizer.encode(said, add_special_tokens=False).ids
    assert text == said
    assert ids == [*expected, 1]
    assert responses[0].start.request_id == "mine"
    assert responses[0].start.seed == 7
    assert not any(r.HasField("usage") for r in responses[:-1])
    usage = responses[-1].usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(expected), len(expected) + 1)
    last = responses[-1].outputs[0]
    assert (last.finish_reason, last.stop_token_id) == (pb.FINISH_REASON_STOP, 1)
