"""Engine outputs to messages, when several steps arrive at once and samples end apart."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tokenizers import Tokenizer

from arriero.router.gateway import Gateway, GatewayConfig
from arriero.router.link.server import LinkServer
from arriero.router.proto.arriero.v1 import inference_pb2 as pb
from arriero.router.requests import OutputOptions
from arriero.router.response import Answer, TextDelta
from arriero.router.text.text_model import TextModel
from arriero.shards.engine.types import SequenceOutput, TokenLogprobs
from arriero.shards.errors import Unavailable
from support.frontdoor import FakeEngine, echo, make_card


def answer(tokenizer: Tokenizer, n: int = 1, **options: object) -> Answer:
    text = TextModel(make_card(tokenizer, None))
    return Answer(pb.Start(request_id="r"), 3, n, OutputOptions(**options), text)  # type: ignore[arg-type]


def steps(tokens: list[int], index: int = 0, stop_token: int | None = None) -> list[SequenceOutput]:
    made = [SequenceOutput(request_id="r", index=index, tokens=(t,)) for t in tokens[:-1]]
    last = SequenceOutput(
        request_id="r",
        index=index,
        tokens=(tokens[-1],),
        finish_reason="stop" if stop_token is not None else "length",
        stop_token=stop_token,
    )
    return [*made, last]


def add(made: Answer, outputs: list[SequenceOutput]) -> pb.GenerateResponse:
    """A message that must come, in the wire's form."""
    message = made.add(outputs)
    assert message is not None
    return message.to_wire() if isinstance(message, TextDelta) else message


@pytest.mark.parametrize("options", [{}, {"include_token_ids": False}, {"include_text": False}])
def test_a_piece_says_what_a_whole_message_would(
    llama_tokenizer: Tokenizer, options: dict[str, object]
) -> None:
    ids = llama_tokenizer.encode("¿qué? 日本 🦙 sí", add_special_tokens=False).ids
    plain = answer(llama_tokenizer, **options)
    watched = answer(llama_tokenizer, stop=("never",), **options)
    said = [(plain.add([one]), watched.add([one])) for one in steps(ids)]
    assert any(isinstance(piece, TextDelta) for piece, _ in said)
    for piece, message in said:
        assert not isinstance(message, TextDelta)
        assert (piece.to_wire() if isinstance(piece, TextDelta) else piece) == message


def test_steps_that_arrive_together_make_one_output_a_sample(llama_tokenizer: Tokenizer) -> None:
    ids = llama_tokenizer.encode("el arriero 🦙 sube", add_special_tokens=False).ids
    made = answer(llama_tokenizer, n=2)
    both = [o for pair in zip(steps(ids), steps(ids, 1), strict=True) for o in pair]
    message = add(made, both)
    assert [(o.index, o.text, list(o.token_ids)) for o in message.outputs] == [
        (0, "el arriero 🦙 sube", ids),
        (1, "el arriero 🦙 sube", ids),
    ]
    assert all(o.finish_reason == pb.FINISH_REASON_LENGTH for o in message.outputs)
    assert message.usage.completion_tokens == 2 * len(ids)
    assert message.start.request_id == "r"


def test_one_sample_may_stop_before_the_other(llama_tokenizer: Tokenizer) -> None:
    ids = llama_tokenizer.encode("uno STOP dos", add_special_tokens=False).ids
    made = answer(llama_tokenizer, n=2, stop=("STOP",))
    first = [made.add([o]) for o in steps(ids)]
    assert not any(isinstance(m, TextDelta) for m in first)
    assert "".join(o.text for m in first if m for o in m.outputs) == "uno "  # type: ignore[union-attr]
    assert not made.finished
    last = add(made, steps([ids[0]], index=1))
    assert made.finished
    assert last.HasField("usage")


def in_drafts(outputs: list[SequenceOutput], size: int) -> list[SequenceOutput]:
    """The same tokens in steps of up to `size`, of which all but the last were drafted."""
    merged = []
    for start in range(0, len(outputs), size):
        step = outputs[start : start + size]
        tokens = tuple(token for output in step for token in output.tokens)
        rows = tuple(row for output in step for row in output.logprobs or ())
        merged.append(
            replace(
                step[-1],
                tokens=tokens,
                logprobs=rows or None,
                num_drafted=size + 1,
                num_accepted=len(tokens) - 1,
            )
        )
    return merged


@pytest.mark.parametrize("include_stop", [False, True])
@pytest.mark.parametrize("stop", ["carry packs", "s over", "packs over the mountains", "never"])
def test_stop_strings_over_the_ends_of_drafts(
    llama_tokenizer: Tokenizer, stop: str, include_stop: bool
) -> None:
    """Text, tokens and log-probabilities do not depend on how many tokens a step gives."""
    words = "llamas carry packs over the mountains 🦙 sí"
    ids = llama_tokenizer.encode(words, add_special_tokens=False).ids
    singles = [
        replace(output, logprobs=(TokenLogprobs(token=output.tokens[0], logprob=-0.5, top=()),))
        for output in steps(ids)
    ]

    text = TextModel(make_card(llama_tokenizer, None))
    options = OutputOptions(stop=(stop,), include_stop=include_stop)

    def streamed(outputs: list[SequenceOutput]) -> tuple[object, ...]:
        made = Answer(pb.Start(request_id="r"), 3, 1, options, text)
        messages = [message for output in outputs if (message := made.add([output]))]
        sent = [
            part
            for message in messages
            for part in (message.to_wire() if isinstance(message, TextDelta) else message).outputs
        ]
        last = messages[-1]
        assert not isinstance(last, TextDelta)
        usage = last.usage
        assert usage.accepted_prediction_tokens <= usage.completion_tokens
        return (
            "".join(part.text for part in sent),
            [token for part in sent for token in part.token_ids],
            [row.chosen.token_id for part in sent for row in part.logprobs],
            (sent[-1].finish_reason, sent[-1].stop_string, usage.completion_tokens),
        )

    whole = streamed(singles)
    if stop != "never":
        assert whole[0] == words[: words.index(stop) + len(stop) * include_stop]
    for size in range(2, len(ids) + 2):
        assert streamed(in_drafts(singles, size)) == whole, f"{size} tokens in a step"


def test_drafts_after_the_end_count_for_nothing(llama_tokenizer: Tokenizer) -> None:
    ids = llama_tokenizer.encode("uno STOP dos", add_special_tokens=False).ids
    made = answer(llama_tokenizer, stop=("STOP",))
    whole = in_drafts(steps(ids), len(ids))
    usage = add(made, whole).usage
    assert usage.completion_tokens < len(ids)
    assert usage.accepted_prediction_tokens == usage.completion_tokens
    assert usage.rejected_prediction_tokens == len(ids) + 1 - usage.completion_tokens


@pytest.mark.parametrize("include", [False, True])
def test_the_stop_tokens_text_is_sent_only_when_asked_for(
    llama_tokenizer: Tokenizer, include: bool
) -> None:
    ids = llama_tokenizer.encode("hola", add_special_tokens=False).ids
    made = answer(llama_tokenizer, include_stop=include)
    message = add(made, steps(ids, stop_token=ids[-1]))
    (output,) = message.outputs
    assert list(output.token_ids) == ids
    shown = ids if include else ids[:-1]
    assert output.text == llama_tokenizer.decode(shown)
    assert output.stop_token_id == ids[-1]


def test_an_engines_error_is_the_callers(llama_tokenizer: Tokenizer) -> None:
    made = answer(llama_tokenizer)
    with pytest.raises(Unavailable, match="slice 1 was lost"):
        made.add(
            [
                SequenceOutput(
                    request_id="r", index=0, finish_reason="error", error="slice 1 was lost"
                )
            ]
        )


async def test_a_taken_port_is_an_error_in_words(llama_tokenizer: Tokenizer) -> None:
    first = Gateway(GatewayConfig())
    address = f"127.0.0.1:{await first.start()}"
    with pytest.raises(OSError, match=address):
        await Gateway(GatewayConfig(address=address)).start()
    engine = FakeEngine(echo)
    with pytest.raises(OSError, match=address):
        await LinkServer(engine, make_card(llama_tokenizer, None), address).start()
    await first.stop(0)
    engine.close()
