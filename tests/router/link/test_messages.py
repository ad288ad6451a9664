"""Frames come back as they went, and the choice of a group is a function of what is seen."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from arriero.router.backend import GroupLoad, GroupView
from arriero.router.link import messages as frames
from arriero.router.routing.choose import order
from arriero.router.text.model_card import ModelCard
from arriero.shards.config.sampling_params import SamplingParams
from arriero.shards.engine.types import EngineRequest, SequenceOutput, TokenLogprobs
from arriero.shards.protocol import wire

token = st.integers(0, 2**31 - 1)
row = st.builds(
    TokenLogprobs,
    token=token,
    logprob=st.floats(allow_nan=False),
    top=st.lists(st.tuples(token, st.floats(allow_nan=False)), max_size=3).map(tuple),
)
rows = st.none() | st.lists(row, max_size=3).map(tuple)
output = st.builds(
    SequenceOutput,
    request_id=st.just("r"),
    index=st.integers(0, 127),
    tokens=st.lists(token, max_size=4).map(tuple),
    logprobs=rows,
    prompt_logprobs=rows,
    finish_reason=st.sampled_from([None, "stop", "length", "error"]),
    stop_token=st.none() | token,
    error=st.none() | st.text(),
    num_cached=st.integers(0, 10**6),
)


@given(outputs=st.lists(st.tuples(st.integers(0, 3), output), max_size=6))
def test_steps_come_back(outputs: list[tuple[int, SequenceOutput]]) -> None:
    message = wire.decode(wire.encode(frames.Step.of(outputs)), frames.LeaderMessage)
    assert isinstance(message, frames.Step)
    got = message.outputs({0: "r", 1: "r", 2: "r"})
    expected = [
        # stop_token and error say why it ended, and travel with the reason only
        (handle, o)
        for handle, o in outputs
        if handle != 3
    ]
    assert len(got) == len(expected)
    for (handle, mine), (other, yours) in zip(got, expected, strict=True):
        assert handle == other
        assert mine.tokens == yours.tokens
        assert mine.logprobs == yours.logprobs
        assert mine.prompt_logprobs == yours.prompt_logprobs
        assert (mine.index, mine.num_cached) == (yours.index, yours.num_cached)
        assert mine.finish_reason == yours.finish_reason
        if mine.finish_reason is not None:
            assert (mine.stop_token, mine.error) == (yours.stop_token, yours.error)


def test_requests_come_back() -> None:
    request = EngineRequest(
        request_id="r/1",
        prompt=(1, 2, 3),
        params=SamplingParams(
            max_tokens=5, seed=2**63 - 1, logit_bias={7: 1.0}, allowed_token_ids=(), top_p=0.5
        ),
        priority=-2,
        resumed=(4,),
        cache_salt=b"salt",
    )
    sent = wire.encode([frames.Submit.of(9, request)])
    (message,) = wire.decode(sent, list[frames.GatewayMessage])
    assert isinstance(message, frames.Submit) and message.handle == 9
    assert message.read() == request


def view(group_id: str, tokens: int = 0, waiting: int = 0, length: int = 100) -> GroupView:
    card = ModelCard(
        model="m",
        group=group_id,
        layout="",
        digest="",
        max_model_len=length,
        vocab_size=1,
        bos_token_id=None,
        eos_token_ids=(),
        tokenizer_json=b"",
    )
    load = GroupLoad(outstanding_tokens=tokens, num_waiting=waiting)
    return GroupView(group_id=group_id, model="m", card=card, load=load)


def test_the_choice() -> None:
    groups = [view("c"), view("b", tokens=5), view("a", waiting=1), view("d", length=10)]
    assert [g.group_id for g in order(groups, num_prompt=8, num_tokens=50)] == ["c", "a", "b"]
    assert [g.group_id for g in order(groups, num_prompt=8, num_tokens=10)] == ["c", "d", "a", "b"]
    assert order(groups, num_prompt=8, num_tokens=101) == []
