"""Engine outputs to messages, when several steps arrive at once and samples end apart."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer

from arriero.router.gateway import Gateway, GatewayConfig
from arriero.router.link.server import LinkServer
from arriero.router.proto.arriero.v1 import inference_pb2 as pb
from arriero.router.requests import OutputOptions
from arriero.router.response import Answer, TextDelta
from arriero.router.text.text_model import TextModel
from arriero.shards.engine.types import SequenceOutput
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
