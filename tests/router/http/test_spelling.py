"""Log-probabilities of tokens that are parts of characters: nothing lost, offsets of the text."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from arriero.router.http.responses import ChatCompletion
from arriero.router.http.spelling import TextOffsets, spell, spell_unique
from arriero.router.http.text_completion import TextCompletion
from arriero.router.proto.arriero.v1 import inference_pb2 as pb
from arriero.router.requests import OutputOptions
from arriero.router.response import Answer
from arriero.router.text.text_model import TextModel
from arriero.shards.engine.types import SequenceOutput, TokenLogprobs
from support.frontdoor import CHATML_SPECIALS, make_card, make_tokenizer

MODEL = os.environ.get("ARRIERO_TEST_MODEL", "")
TEXTS = [
    "llama 🦙!",
    "🦙🦙 👩‍👩‍👧 family",
    "日本語 と 數字 龘",
    "naïve ñandú — así",
    "plain words",
    "🏳️‍🌈 a 🇵🇪 b",
]


@pytest.fixture(scope="module", params=["made", "smollm2"])
def model(request: pytest.FixtureRequest) -> TextModel:
    if request.param == "smollm2":
        if not MODEL:
            pytest.skip("ARRIERO_TEST_MODEL names no checkpoint folder")
        tokenizer = Tokenizer.from_file(str(Path(MODEL) / "tokenizer.json"))
    else:
        tokenizer = make_tokenizer(CHATML_SPECIALS)
    return TextModel(make_card(tokenizer, None))


def row(token: int, top: list[int]) -> TokenLogprobs:
    return TokenLogprobs(
        token=token, logprob=-0.5, top=tuple((one, -1.0 - at) for at, one in enumerate(top))
    )


def completed(
    model: TextModel,
    tokens: list[int],
    *,
    prompt: list[int] | None = None,
    echo: str = "",
    stop_token: int | None = None,
    **options: Any,  # noqa: ANN401
) -> dict[str, Any]:
    """The choice of a completion that gives `tokens` one by one; whole is streamed."""
    rows = [row(token, [token, 260, 261, 262, 263]) for token in tokens]
    prompt = prompt or [260]
    start = pb.Start(prompt_token_ids=prompt)
    answer = Answer(start, len(prompt), 1, OutputOptions(**options), model)
    messages = []
    for at, token in enumerate(tokens):
        last = at == len(tokens) - 1
        message = answer.add(
            [
                SequenceOutput(
                    request_id="r",
                    index=0,
                    tokens=(token,),
                    logprobs=(rows[at],),
                    prompt_logprobs=tuple(row(one, [one]) for one in prompt[1:])
                    if at == 0
                    else None,
                    finish_reason=("length" if stop_token is None else "stop") if last else None,
                    stop_token=stop_token if last else None,
                )
            ]
        )
        if message is not None:
            messages.append((0, message if isinstance(message, pb.GenerateResponse) else None))
    shape = TextCompletion(
        "m",
        model.tokenizer,
        n=1,
        echo=None if prompt == [260] else [echo],
        skip_special=options.get("skip_special_tokens", True),
    )
    (choice,) = shape.whole(messages)["choices"]
    return choice


def check_offsets(choice: dict[str, Any], model: TextModel, tokens: list[int]) -> None:
    """Each token's text, or the character that it is a part of, stands at its offset."""
    text, offsets = choice["text"], choice["logprobs"]["text_offset"]
    for token, offset in zip(tokens, offsets, strict=True):
        piece = model.tokenizer.vocabulary.pieces[token]
        try:
            spelled = piece.decode()
        except UnicodeDecodeError:
            assert piece in text[offset : offset + len(piece) + 1].encode()
        else:
            assert text.startswith(spelled, offset), (spelled, offset, text)


@pytest.mark.parametrize("text", TEXTS)
def test_offsets_count_characters_of_the_text(model: TextModel, text: str) -> None:
    tokens = model.tokenizer.encode(text)
    choice = completed(model, tokens)
    assert choice["text"] == text
    check_offsets(choice, model, tokens)
    # of characters in several tokens, each begins where the character does
    offsets = choice["logprobs"]["text_offset"]
    assert offsets == sorted(offsets) and offsets[0] == 0 and offsets[-1] < len(text)
    joined = b""
    for token, offset in zip(tokens, offsets, strict=True):
        assert offset == len(joined.decode(errors="ignore"))
        joined += model.tokenizer.vocabulary.pieces[token]


def test_offsets_after_an_echo_a_stop_and_special_tokens(model: TextModel) -> None:
    encode = model.tokenizer.encode
    special = min(model.tokenizer.vocabulary.special)
    prompt, tokens = encode("日本 🦙"), encode(" 龘 🦙 end")
    choice = completed(model, tokens, prompt=prompt, echo="日本 🦙")
    assert choice["text"] == "日本 🦙 龘 🦙 end"
    check_offsets(choice, model, [*prompt, *tokens])
    assert choice["logprobs"]["text_offset"][len(prompt)] == len("日本 🦙")
    assert choice["logprobs"]["token_logprobs"][0] is None
    # a token that was put before the text is not in it
    choice = completed(model, tokens, prompt=[special, *prompt], echo="日本 🦙")
    assert choice["logprobs"]["text_offset"][:2] == [0, 0]
    assert choice["logprobs"]["text_offset"][1 + len(prompt)] == len("日本 🦙")
    # shown special tokens take their room, others none
    mixed = [*encode("🦙"), special, *encode("b")]
    name = model.tokenizer.vocabulary.pieces[special].decode()
    shown = completed(model, mixed, skip_special_tokens=False)
    assert shown["text"] == f"🦙{name}b"
    assert shown["logprobs"]["text_offset"][-2:] == [1, 1 + len(name)]
    hidden = completed(model, mixed)
    assert hidden["text"] == "🦙b"
    assert hidden["logprobs"]["text_offset"][-2:] == [1, 1]
    # a stop string that is cut off, or kept
    for include in (False, True):
        choice = completed(model, encode("🦙 so END more"), stop=("END",), include_stop=include)
        assert choice["text"] == ("🦙 so END" if include else "🦙 so ")
        assert choice["finish_reason"] == "stop"
        offsets, count = choice["logprobs"]["text_offset"], len(choice["logprobs"]["tokens"])
        joined = b""
        for token, offset in zip(encode("🦙 so END more")[:count], offsets, strict=True):
            assert offset == len(joined.decode(errors="ignore"))
            joined += model.tokenizer.vocabulary.pieces[token]


def test_bytes_that_are_no_character_take_one_place(model: TextModel) -> None:
    vocabulary = model.tokenizer.vocabulary
    part = vocabulary.pieces.index(b"\xf0")
    (a,) = model.tokenizer.encode("a")
    choice = completed(model, [part, a, part, part, a])
    assert choice["text"] == "\ufffda\ufffd\ufffda"
    assert choice["logprobs"]["text_offset"] == [0, 1, 2, 3, 4]
    offsets = TextOffsets(vocabulary, skip_special=True)
    assert [offsets.add(10**6), offsets.add(a)] == [0, 0]


def test_no_alternative_is_lost(model: TextModel) -> None:
    vocabulary = model.tokenizer.vocabulary
    parts = [
        token
        for token, piece in enumerate(vocabulary.pieces)
        if piece and "\ufffd" in piece.decode(errors="replace")
    ][:5]
    names = [spell(vocabulary, token) for token in parts]
    assert len(set(names)) == 5
    assert all(name.startswith("bytes:\\x") for name in names)
    tokens = [pb.TokenLogprob(token_id=token, logprob=-1.0) for token in parts]
    position = pb.PositionLogprobs(chosen=tokens[0], top=tokens)
    message = pb.GenerateResponse(
        outputs=[pb.Output(logprobs=[position], text="\ufffd", finish_reason=1)]
    )
    shape = TextCompletion("m", model.tokenizer, n=1, echo=None, skip_special=True)
    (choice,) = shape.whole([(0, message)])["choices"]
    assert list(choice["logprobs"]["top_logprobs"][0]) == names
    (choice,) = ChatCompletion("m", model.tokenizer).whole([(0, message)])["choices"]
    (entry,) = choice["logprobs"]["content"]
    assert [bytes(other["bytes"]) for other in entry["top_logprobs"]] == [
        vocabulary.pieces[token] for token in parts
    ]
    assert [other["token"] for other in entry["top_logprobs"]] == names


def test_tokens_that_are_spelled_alike_are_told_apart(model: TextModel) -> None:
    size = len(model.tokenizer.vocabulary.pieces)
    names = spell_unique(model.tokenizer.vocabulary, [size, size + 1, 70])
    assert names[:2] == ["", f"token_id:{size + 1}"] and len(set(names)) == 3
