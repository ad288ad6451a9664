"""Template, tokenizer and end tokens of a folder: what agrees, what is healed, what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from tokenizers import Tokenizer

from arriero.kernels.sizes import num_mask_words
from arriero.router.proto.arriero.v1 import inference_pb2 as pb
from arriero.router.requests import read_sampling
from arriero.router.text.constraints import GrammarCheck
from arriero.router.text.model_card import ModelCard
from arriero.router.text.text_model import TextModel
from arriero.shards.errors import CheckpointError, InvalidRequest
from arriero.shards.protocol import wire
from arriero.shards.worker.grammar_masks import GrammarRows
from support.frontdoor import CHATML, CHATML_SPECIALS, LLAMA3, make_card, make_tokenizer

USER = {"role": "user", "content": "zebra"}
CALL = {"id": "c", "type": "function", "function": {"name": "look", "arguments": {"q": "fox"}}}
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
PARTS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for part in m['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DISTILLED = (  # a call only where `content` is null, its arguments as text
    "{% for m in messages %}{% if m.content is none %}"
    "<|im_start|>{% for c in m.tool_calls %}{{ c.function.name + c.function.arguments }}"
    "{% endfor %}<|im_end|>{% else %}<|im_start|>{{ m.role + m.content.split('</t>')[-1] }}"
    "<|im_end|>{% endif %}{% endfor %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}"
    "{% set rest = messages[1:] %}{% else %}{% set rest = messages %}{% set system = false %}"
    "{% endif %}{% for m in rest %}{% if loop.index0 == 0 and system %}"
    "{% set content = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + m['content'] %}{% else %}"
    "{% set content = m['content'] %}{% endif %}{% if m['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}"
    "{% endfor %}"
)


def text_model(backend: Tokenizer, template: str, **changes: object) -> TextModel:
    return TextModel(make_card(backend, template, **changes))


def shown(model: TextModel, messages: list[dict[str, Any]], **more: object) -> str:
    ids = model.layout(messages, True, False, **more)  # type: ignore[arg-type]
    return model.tokenizer.decode(ids, skip_special=False)


def folder(path: Path, backend: Tokenizer, files: dict[str, Any]) -> ModelCard:
    path.mkdir(exist_ok=True)
    files = {"tokenizer.json": backend.to_str()} | files
    for name, data in files.items():
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text(data if isinstance(data, str) else json.dumps(data))
    return ModelCard.from_folder(
        path,
        model="tiny",
        group="g0",
        layout="",
        digest="",
        max_model_len=512,
        vocab_size=backend.get_vocab_size(),
        bos_token_id=None,
        eos_token_ids=(0,),
        max_sequences=8,
    )


def test_words_given_as_parts_to_templates_that_walk_over_parts(
    chatml_tokenizer: Tokenizer,
) -> None:
    model = text_model(chatml_tokenizer, PARTS)
    talk = [
        {"role": "system", "content": "Be kind."},
        USER,
        {"role": "assistant", "content": "a horse"},
        {"role": "tool", "content": "striped"},
        {"role": "user", "content": [{"type": "text", "text": "and a fox"}]},
    ]
    text = shown(model, talk)
    for words in ("Be kind.", "zebra", "a horse", "striped", "and a fox"):
        assert words in text
    ids = model.layout([USER, {"role": "assistant", "content": "it is "}], False, True)
    assert model.tokenizer.decode(ids, skip_special=False).endswith("assistant\nit is ")


def test_parts_for_some_roles_alone(chatml_tokenizer: Tokenizer) -> None:
    mixed = (
        "{% for m in messages %}<|im_start|>{% if m.role == 'user' %}{{ m.content[0].text }}"
        "{% else %}{{ m.content + '' }}{% endif %}<|im_end|>{% endfor %}"
    )
    text = shown(text_model(chatml_tokenizer, mixed), [{"role": "system", "content": "kind"}, USER])
    assert "kind" in text and "zebra" in text


def test_calls_in_the_form_that_a_template_takes(chatml_tokenizer: Tokenizer) -> None:
    talk = [USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}]
    talk.append({"role": "tool", "content": "striped"})
    text = shown(text_model(chatml_tokenizer, DISTILLED), talk)
    assert 'look{"q": "fox"}' in text and "striped" in text
    # a thought that the template takes out of a turn is no loss
    thought = {"role": "assistant", "content": "hm</t>done"}
    assert "done" in shown(text_model(chatml_tokenizer, DISTILLED), [USER, thought, USER])
    with pytest.raises(InvalidRequest, match=r"cannot show `messages\[1\]\.tool_calls`"):
        shown(text_model(chatml_tokenizer, CHATML), talk)


def test_words_never_vanish(chatml_tokenizer: Tokenizer) -> None:
    model = text_model(chatml_tokenizer, LLAMA2)
    system, answer = (
        {"role": "system", "content": "Be kind."},
        {"role": "assistant", "content": "a"},
    )
    assert "Be kind." in shown(model, [system, USER])
    for talk, number in (
        ([USER, answer, system, USER], 2),
        ([system, USER, answer, {"role": "tool", "content": "striped"}, USER], 3),
    ):
        with pytest.raises(InvalidRequest, match=rf"leaves out `messages\[{number}\]`"):
            shown(model, talk)
    # a role that the template does not know goes by the name that it knows
    only = "{% for m in messages if m.role in ('system', 'user') %}{{ m.content }}{% endfor %}"
    model = text_model(chatml_tokenizer, only)
    assert "Be kind." in shown(model, [{"role": "developer", "content": "Be kind."}, USER])
    dropped = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    model = text_model(chatml_tokenizer, dropped)
    assert any("leaves out messages of role 'system'" in words for words in model.warnings)
    with pytest.raises(InvalidRequest, match="its words would not reach the model"):
        shown(model, [system, USER])
    with pytest.raises(CheckpointError, match="leaves a user's words out"):
        text_model(chatml_tokenizer, "{{ messages[0].role }}")


def test_named_templates(tmp_path: Path, chatml_tokenizer: Tokenizer) -> None:
    with_tools = "{% for t in tools %}{{ t.function.name }}{% endfor %}" + CHATML
    rag = "{% for d in documents %}{{ d.text }}{% endfor %}" + CHATML
    named = {"default": CHATML, "tool_use": with_tools, "rag": rag}
    listed = [{"name": name, "template": text} for name, text in named.items()]
    extra = {f"additional_chat_templates/{name}.jinja": named[name] for name in ("tool_use", "rag")}
    for number, files in enumerate(
        (
            {"tokenizer_config.json": {"chat_template": listed}},
            {"tokenizer_config.json": {"chat_template": named}},
            {"chat_template.json": {"chat_template": listed}},
            {"chat_template.jinja": "\ufeff" + CHATML, **extra},
        )
    ):
        card = folder(tmp_path / str(number), chatml_tokenizer, files)
        assert wire.decode(wire.encode(card), ModelCard) == card
        model = TextModel(card)
        assert "look" in shown(model, [USER], tools=TOOLS)
        assert "a text" in shown(model, [USER], documents=[{"title": "t", "text": "a text"}])
        assert shown(model, [USER]).startswith("<|im_start|>user\nzebra")
    with pytest.raises(CheckpointError, match="none named 'default'"):
        folder(tmp_path / "x", chatml_tokenizer, {"chat_template.json": {"chat_template": {
            "tool_use": with_tools, "rag": rag}}})  # fmt: skip
    alone = {"tokenizer_config.json": {"chat_template": [{"name": "tool_use", "template": CHATML}]}}
    assert folder(tmp_path / "y", chatml_tokenizer, alone).chat_template == CHATML
    broken = {"tokenizer_config.json": {"chat_template": [{"name": "tool_use"}]}}
    with pytest.raises(CheckpointError, match="a list without templates"):
        folder(tmp_path / "z", chatml_tokenizer, broken)


@pytest.mark.parametrize(
    ("template", "ends"),
    [
        (CHATML, (0, 2)),
        (PARTS, (0, 2)),
        (DISTILLED, (0, 2)),
        (LLAMA2, (0,)),  # its end is the tokenizer's, <|endoftext|>
        # the end is written between turns alone
        (CHATML.replace("+ '<|im_end|>'", "+ ('' if loop.last else '<|im_end|>')"), (0, 2)),
        # what follows a turn is the head of the next
        ("{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}", (0,)),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", (0,)),
        ("{{ raise_exception('no') }}<|im_end|>", (0,)),
        ("", (0,)),
    ],
)
def test_the_token_that_ends_a_templates_turns(
    tmp_path: Path, chatml_tokenizer: Tokenizer, template: str, ends: tuple[int, ...]
) -> None:
    settings = {"chat_template": template, "eos_token": "<|endoftext|>"}
    card = folder(tmp_path, chatml_tokenizer, {"tokenizer_config.json": settings})
    assert card.eos_token_ids == ends
    params = read_sampling(pb.SamplingParams(stop_token_ids=[9]), card)
    assert params.stop_token_ids == (9, *ends[1:])
    assert not read_sampling(pb.SamplingParams(ignore_eos=True), card).stop_token_ids
    TextModel(card)


def test_markup_before_the_end_is_not_the_end(tmp_path: Path) -> None:
    backend = make_tokenizer([*CHATML_SPECIALS, "</answer>"])
    spec = json.loads(backend.to_str())
    spec["added_tokens"][3]["special"] = False
    template = CHATML.replace("+ '<|im_end|>'", "+ '</answer><|im_end|>'")
    files = {"tokenizer.json": spec, "chat_template.jinja": template}
    assert folder(tmp_path, backend, files).eos_token_ids == (0, 2)


def test_the_end_of_a_message_with_a_call(tmp_path: Path, llama_tokenizer: Tokenizer) -> None:
    card = folder(tmp_path, llama_tokenizer, {})  # a template of our own, for its special tokens
    assert card.eos_token_ids == (0, 4, 5)


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ({"top_p": 0.0}, {"top_p": 1e-6}),
        ({"top_p": 1.5}, {}),
        ({"repetition_penalty": 0.0}, {}),
        ({"repetition_penalty": 1.1}, {"repetition_penalty": 1.1}),
        ({"top_k": 50.0}, {"top_k": 50}),
        ({"top_k": -1}, {"top_k": 0}),
        ({"top_k": 0}, {"top_k": 0}),
        ({"top_k": 10**12}, {"top_k": 0}),
        ({"top_k": 2.5}, {}),
        ({"top_k": -3}, {}),
        ({"top_k": True}, {}),
        ({"min_p": None, "temperature": None, "do_sample": False}, {}),
        ({"min_p": -0.1}, {}),
        ({"temperature": 0, "do_sample": False}, {"temperature": 0.0}),
        ({"temperature": "0.7"}, {"temperature": 0.7}),
        ({"temperature": "warm"}, {}),
        ({"temperature": -1.0}, {}),
        ({"temperature": [0.6]}, {}),
        ({"temperature": float("inf")}, {}),
        ({"top_p": 10**400}, {}),
    ],
)
def test_defaults_never_blame_a_request(
    tmp_path: Path, chatml_tokenizer: Tokenizer, given: dict[str, Any], taken: dict[str, float]
) -> None:
    card = folder(tmp_path, chatml_tokenizer, {"generation_config.json": given})
    assert card.generation_defaults == taken
    left_out = [name for name in given if given[name] is not None and name not in taken]
    named = [name for name in left_out if name != "do_sample"]
    assert len(card.warnings) == len(named)
    assert all(f"`{name}`" in words for name, words in zip(named, card.warnings, strict=True))
    read_sampling(pb.SamplingParams(), card)


def test_files_in_odd_forms(tmp_path: Path, chatml_tokenizer: Tokenizer) -> None:
    specials = {"bos_token": {"content": "<|im_start|>"}, "eos_token": "<|im_end|>"}
    files = {
        "tokenizer.json": "\ufeff" + chatml_tokenizer.to_str(),
        "tokenizer_config.json": "\ufeff" + json.dumps({"chat_template": " "}),
        "special_tokens_map.json": {**specials, "pad_token": "<|endoftext|>"},
    }
    card = folder(tmp_path, chatml_tokenizer, files)
    assert (card.bos_token, card.eos_token, card.chat_template) == (
        "<|im_start|>",
        "<|im_end|>",
        None,
    )
    assert card.template_tokens["pad_token"] == "<|endoftext|>"
    assert TextModel(card).tokenizer.encode("the fox")
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja: cannot be read as UTF-8"):
        folder(tmp_path, chatml_tokenizer, {})
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "generation_config.json").write_text("[1]")
    with pytest.raises(CheckpointError, match=r"generation_config\.json: has a JSON list"):
        folder(tmp_path, chatml_tokenizer, {})
    bare = tmp_path / "bare"
    folder(bare, chatml_tokenizer, {"tokenizer.model": "x"})
    (bare / "tokenizer.json").rename(bare / "other.json")
    with pytest.raises(CheckpointError, match=r"tokenizer\.model alone.*save_pretrained"):
        ModelCard.from_folder(
            bare, model="", group="", layout="", digest="", max_model_len=1, vocab_size=1,
            bos_token_id=None, eos_token_ids=(), max_sequences=1,
        )  # fmt: skip


def test_a_template_may_ask_whether_there_are_tools(chatml_tokenizer: Tokenizer) -> None:
    for head in (
        "{% if tools is not none %}{{ tools[0].x.y }}{% endif %}",  # as transformers gives them
        "{% for t in tools %}{{ t.function.name }}{% endfor %}",
        "{{ pad_token }}{{ missing }}",
    ):
        assert "zebra" in shown(text_model(chatml_tokenizer, head + CHATML), [USER])


def test_a_refused_role_is_refused_in_words(chatml_tokenizer: Tokenizer) -> None:
    template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}"
        "{% endif %}" + CHATML
    )
    model = text_model(chatml_tokenizer, template)
    assert any("System role not supported" in words for words in model.warnings)
    with pytest.raises(InvalidRequest, match="System role not supported"):
        shown(model, [{"role": "system", "content": "Be kind."}, USER])


@pytest.mark.parametrize(
    ("template", "changes", "words"),
    [
        (CHATML, {"eos_token_ids": (0,)}, "with '<|im_end|>', which is none of"),
        (CHATML, {"eos_token_ids": ()}, "name no end token"),
        (CHATML, {"eos_token": "</s>"}, "`eos_token`='</s>' is no token"),
        (LLAMA3, {}, "writes <|end_header_id|>, <|eot_id|>, <|start_header_id|>, which is no"),
        (CHATML.replace("if add_generation_prompt", "if false"), {}, "add_generation_prompt"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", {}, "with no special token"),
        ("{{ raise_exception('no') }}", {}, "refuses a plain message of role 'user'"),
    ],
)
def test_what_is_odd_is_said(
    chatml_tokenizer: Tokenizer, template: str, changes: dict[str, Any], words: str
) -> None:
    assert not text_model(chatml_tokenizer, CHATML, eos_token_ids=(2,), eos_token="").warnings
    model = text_model(chatml_tokenizer, template, **({"eos_token_ids": (2,)} | changes))
    assert any(words in one for one in model.warnings), model.warnings


def allowed_by(rows: GrammarRows, slot: int, vocab_size: int) -> npt.NDArray[np.bool_]:
    """The allowed tokens of a slot's next mask: [1, `vocab_size`]."""
    words = np.full((1, num_mask_words(vocab_size)), -1, np.int32)
    rows.allow([slot], words)
    bits = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little")
    return bits[:, :vocab_size].view(np.bool_)


@pytest.mark.parametrize("extra", [-40, -1, 0, 1, 40])
def test_a_tokenizer_of_another_size_than_the_vocabulary(extra: int, tmp_path: Path) -> None:
    backend = make_tokenizer(CHATML_SPECIALS)
    size = backend.get_vocab_size()
    spec = json.loads(backend.to_str())
    base = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    spec["added_tokens"].append(base | {"id": size, "content": "[PAD]", "special": True})
    spec["added_tokens"].append(base | {"id": size + 1, "content": "~~~~", "special": False})
    text = json.dumps(spec)
    (tmp_path / "tokenizer.json").write_text(text)
    vocab_size = size + 2 + extra
    card = make_card(
        backend, None, tokenizer_json=text.encode(), vocab_size=vocab_size, eos_token_ids=(2,)
    )
    GrammarCheck(card).warm()
    rows = GrammarRows(str(tmp_path), vocab_size=vocab_size, eos_token_ids=(2,))
    rows.warm()
    rows.check_warm()
    rows.enter(0, 'start: "yes" | "no"', [], (1,))
    allowed = allowed_by(rows, 0, vocab_size)
    (first,) = allowed
    ids = np.flatnonzero(first)
    assert ids.size and all(backend.id_to_token(int(i))[0] in "yn" for i in ids)
    rows.enter(1, 'start: "yes" | "no"', backend.encode("yes").ids, (1,))
    allowed = allowed_by(rows, 1, vocab_size)
    assert np.flatnonzero(allowed[0]).tolist() == [1, 2]  # the request's end, and the model's
    rows.close()


@pytest.mark.parametrize("own", [(), (402,)], ids=["none", "one without a text"])
def test_without_an_end_token_nothing_else_ends_a_grammar(
    tmp_path: Path, own: tuple[int, ...]
) -> None:
    backend = make_tokenizer(CHATML_SPECIALS)
    (tmp_path / "tokenizer.json").write_text("\ufeff" + backend.to_str())
    size = backend.get_vocab_size()
    assert size <= 402
    rows = GrammarRows(str(tmp_path), vocab_size=size + 8, eos_token_ids=own)
    for ends in ((), (2,)):
        rows.enter(0, 'start: "yes"', backend.encode("yes").ids, ends)
        allowed = allowed_by(rows, 0, size + 8)
        assert tuple(np.flatnonzero(allowed[0])) == ends
    rows.close()


def test_a_tokenizer_that_grammars_cannot_use_stops_the_start(
    tmp_path: Path, chatml_tokenizer: Tokenizer
) -> None:
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "Odd", "vocab": {"a": 0}}}')
    rows = GrammarRows(str(tmp_path), vocab_size=9, eos_token_ids=(1,))
    rows.warm()
    with pytest.raises(CheckpointError, match="grammars cannot use it"):
        rows.check_warm()
    rows.close()
    (tmp_path / "tokenizer.json").write_text("{}")
    for path in (tmp_path, tmp_path / "none"):
        absent = GrammarRows(str(path), vocab_size=9, eos_token_ids=(1,))
        absent.warm()
        absent.check_warm()  # an engine serves tokens; the first grammar says so
        absent.close()


async def test_ids_that_the_model_has_no_row_for() -> None:
    backend = make_tokenizer(CHATML_SPECIALS)
    size = backend.get_vocab_size()
    spec = json.loads(backend.to_str())
    base = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    spec["added_tokens"].append(base | {"id": size, "content": "~~~~", "special": False})
    card = make_card(backend, CHATML, tokenizer_json=json.dumps(spec).encode(), vocab_size=size)
    model = TextModel(card)
    assert any(f"has {size + 1} tokens" in words for words in model.warnings)
    with pytest.raises(InvalidRequest, match="has '~~~~', token"):
        shown(model, [{"role": "user", "content": "a ~~~~ b"}])
    with pytest.raises(InvalidRequest, match="`prompt` has '~~~~'"):
        await model.encode("~~~~", add_special_tokens=True, trusted=False)
    with pytest.raises(CheckpointError, match=r"writes '<\|im_end\|>' \(id 2\)"):
        TextModel(replace(card, vocab_size=2, eos_token_ids=(1,)))
