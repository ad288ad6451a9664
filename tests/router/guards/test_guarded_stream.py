"""The guarded stream on messages: every cut, tool calls, samples, lost guards. No sockets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import pytest

from arriero.router.guards.conversation import Turn
from arriero.router.guards.guarded_stream import GuardedStream
from arriero.router.guards.verdict import GuardLost, Verdict
from arriero.router.proto.arriero.v1 import inference_pb2 as pb
from arriero.router.response import Message, TextDelta
from arriero.router.tenants.safety import SafetyPolicy
from arriero.shards.errors import InvalidRequest, Unavailable

TURNS = (Turn(role="user", text="Hello."),)


class StubGuard:
    """Condemns `bomb` in the last turn; notes what it has judged."""

    def __init__(self, *, delay_s: float = 0.0, lost_after: int | None = None) -> None:
        self.judged: list[str] = []
        self._delay_s, self._lost_after = delay_s, lost_after

    async def __call__(self, turns: Sequence[Turn]) -> Verdict:
        if self._lost_after is not None and len(self.judged) >= self._lost_after:
            raise GuardLost("the guard is gone")
        self.judged.append(turns[-1].text)
        await asyncio.sleep(self._delay_s)
        bad = "bomb" in turns[-1].text
        return Verdict(flagged=bad, categories=("S1",) if bad else (), score=0.9 if bad else 0.1)


async def answer(deltas: Sequence[str], closed: list[bool]) -> AsyncGenerator[Message]:
    """A token for each delta; the first message has the start, the last the usage."""
    try:
        for number, text in enumerate(deltas):
            last = number == len(deltas) - 1
            if number and not last:
                yield TextDelta(0, (number,), text)
                continue
            output = pb.Output(index=0, text=text, token_ids=[number])
            message = pb.GenerateResponse(outputs=[output])
            if not number:
                message.start.prompt_tokens = 5
            if last:
                message.outputs[0].finish_reason = pb.FINISH_REASON_STOP
                message.usage.completion_tokens = len(deltas)
            yield message
    finally:
        closed.append(True)


def policy(**changes: Any) -> SafetyPolicy:  # noqa: ANN401
    return SafetyPolicy(**{"guard": "g", "window": 2, "overlap": 3} | changes)


async def shown(
    deltas: Sequence[str], guard: StubGuard, settings: SafetyPolicy
) -> list[pb.GenerateResponse]:
    closed: list[bool] = []
    stream = GuardedStream(settings, guard, TURNS, 1)
    found = []
    async for message in stream.run(answer(deltas, closed)):
        found.append(message.to_wire() if isinstance(message, TextDelta) else message)
    assert closed == [True]
    return found


async def test_every_cut() -> None:
    text = "aa bomb z"
    for mask in range(2 ** (len(text) - 1)):
        deltas, start = [], 0
        for at in range(1, len(text) + 1):
            if at == len(text) or mask >> (at - 1) & 1:
                deltas.append(text[start:at])
                start = at
        found = await shown(deltas, StubGuard(), policy(output="cut"))
        seen = "".join(output.text for message in found for output in message.outputs)
        assert text.startswith(seen) and len(seen) <= text.index("bomb")
        last = found[-1].outputs[0]
        assert last.finish_reason == pb.FINISH_REASON_CONTENT_FILTER
        assert found[0].start.prompt_tokens == 5 and found[-1].HasField("usage")
        assert sum(message.HasField("start") for message in found) == 1


async def test_safe_output_is_whole_and_in_order() -> None:
    deltas = [f"w{number} " for number in range(9)]
    guard = StubGuard()
    found = await shown(deltas, guard, policy(output="cut"))
    outputs = [output for message in found for output in message.outputs]
    assert [output.text for output in outputs] == deltas
    assert [token for output in outputs for token in output.token_ids] == list(range(9))
    assert outputs[-1].finish_reason == pb.FINISH_REASON_STOP
    assert found[-1].usage.completion_tokens == 9 and not found[-1].safety
    assert guard.judged[-1] == "".join(deltas) and len(guard.judged) == 5


async def test_calls_of_tools_are_judged() -> None:
    async def calls() -> AsyncGenerator[Message]:
        message = pb.GenerateResponse()
        output = message.outputs.add(index=0, text="see", finish_reason=pb.FINISH_REASON_STOP)
        output.tool_calls.add(name="make", arguments='{"what": "bomb"}')
        output.tool_call_offsets.append(3)
        message.usage.completion_tokens = 9
        message.start.prompt_tokens = 1
        yield message

    guard = StubGuard()
    stream = GuardedStream(policy(output="cut"), guard, TURNS, 1)
    (message,) = [message async for message in stream.run(calls())]
    assert isinstance(message, pb.GenerateResponse)
    assert not message.outputs[0].tool_calls and not message.outputs[0].text
    assert guard.judged == ['seemake({"what": "bomb"})']


async def test_refusal_ends_a_request_that_still_waits() -> None:
    closed: list[bool] = []

    async def waiting() -> AsyncGenerator[Message]:
        try:
            await asyncio.sleep(60)
            yield TextDelta(0, (), "")
        finally:
            closed.append(True)

    turns = (Turn(role="user", text="bomb"),)
    stream = GuardedStream(policy(input="refuse"), StubGuard(), turns, 1)
    with pytest.raises(InvalidRequest, match="S1"):
        async for _ in stream.run(waiting()):
            pytest.fail("shown before the verdict")
    assert closed == [True]


async def test_nothing_is_shown_before_the_verdict_on_the_input() -> None:
    guard = StubGuard(delay_s=0.05)
    stream = GuardedStream(policy(input="refuse"), guard, TURNS, 1)
    async for _ in stream.run(answer(["a", "b"], [])):
        assert guard.judged == ["Hello."]


@pytest.mark.parametrize("action", ["refuse", "annotate"])
@pytest.mark.parametrize("on_loss", ["open", "closed"])
async def test_lost_guards(action: str, on_loss: str) -> None:
    settings = policy(input=action, on_loss=on_loss)
    if (action, on_loss) == ("refuse", "closed"):
        with pytest.raises(Unavailable, match="safety check"):
            await shown(["a", "b"], StubGuard(lost_after=0), settings)
        return
    found = await shown(["a", "b"], StubGuard(lost_after=0), settings)
    assert len(found) == 2 and not found[-1].safety


@pytest.mark.parametrize("on_loss", ["open", "closed"])
async def test_a_guard_lost_within_an_output(on_loss: str) -> None:
    deltas = [f"word{number} " for number in range(8)]
    settings = policy(output="cut", on_loss=on_loss)
    guard = StubGuard(lost_after=2)
    if on_loss == "open":
        found = await shown(deltas, guard, settings)
        assert "".join(o.text for m in found for o in m.outputs) == "".join(deltas)
        return
    seen = ""
    with pytest.raises(Unavailable, match="gone"):
        async for message in GuardedStream(settings, guard, TURNS, 1).run(answer(deltas, [])):
            assert isinstance(message, pb.GenerateResponse)
            seen += message.outputs[0].text
    assert seen and len(seen) <= len(guard.judged[-1])
