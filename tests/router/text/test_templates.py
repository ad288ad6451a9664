"""The built-in templates lay conversations out as Meta documents."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from arriero.router import templates
from arriero.router.text.chat_template import ChatTemplate
from arriero.router.text.model_card import ModelCard
from arriero.router.text.text_files import TextFiles
from arriero.router.text.text_model import TextModel
from arriero.router.tools import ToolCall, ToolCallParser
from arriero.shards.errors import InvalidRequest
from arriero.shards.models.qwen3 import family as qwen3
from support.frontdoor import make_card

TALK = [
    {"role": "system", "content": " Be brief. "},
    {"role": "user", "content": "Hi!"},
]
CALLED = [
    {"role": "user", "content": "Rain?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"function": {"name": "weather", "arguments": {"city": "Puno", "days": [1, 2]}}},
            {"function": {"name": "now", "arguments": {}}},
        ],
    },
    {"role": "tool", "content": {"rain": True}},
]
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]


def lay_out(name: str, messages: list[dict[str, object]], **variables: object) -> str:
    given = {"messages": messages, "bos_token": "<|begin_of_text|>", "add_generation_prompt": True}
    return ChatTemplate(templates.read(name)).render(
        given | {"date_string": "01 Jan 2025"} | variables
    )


def test_llama3() -> None:
    assert lay_out("llama3", TALK) == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi!<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


@pytest.mark.parametrize("name", ["llama3.1", "llama3.2"])
def test_llama3_1_and_3_2(name: str) -> None:
    head = (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
        "Cutting Knowledge Date: December 2023\nToday Date: 01 Jan 2025\n\n"
    )
    tail = (
        "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nHi!<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert lay_out(name, TALK) == head + "Be brief." + tail
    assert lay_out(name, TALK[1:]) == head + tail
    day = "26 Jul 2024" if name == "llama3.1" else datetime.now().strftime("%d %b %Y")
    assert f"Today Date: {day}\n" in lay_out(name, TALK, date_string=None)


def test_llama4() -> None:
    tail = (
        "<|header_start|>user<|header_end|>\n\nHi!<|eot|>"
        "<|header_start|>assistant<|header_end|>\n\n"
    )
    assert lay_out("llama4", TALK) == (
        "<|begin_of_text|><|header_start|>system<|header_end|>\n\nBe brief.<|eot|>" + tail
    )
    assert lay_out("llama4", TALK[1:]) == "<|begin_of_text|>" + tail


@pytest.mark.parametrize("name", ["llama3.1", "llama3.2", "llama4"])
def test_calls_that_a_template_writes_are_calls_to_the_parser(name: str) -> None:
    text = lay_out(name, CALLED, tools=TOOLS)
    assert '"name": "weather"' in text
    assert "ipython" in text
    turn = text.split("assistant<|")[1].split("|>\n\n", 1)[1].split("<|eot")[0]
    parser = ToolCallParser(["weather", "now"])
    assert parser.add(turn, final=True) == [
        ToolCall("weather", '{"city": "Puno", "days": [1, 2]}'),
        ToolCall("now", "{}"),
    ]
    assert '{"rain": true}' in text


QWEN3 = ["<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>", "<think>", "</think>"]


def lay_out_qwen3(messages: list[dict[str, object]], **variables: object) -> str:
    source = qwen3.chat_template(QWEN3)
    assert source is not None and qwen3.chat_template(QWEN3[:2]) is None
    return ChatTemplate(source).render(
        {"messages": messages, "add_generation_prompt": True} | variables
    )


def test_qwen3() -> None:
    tail = "<|im_start|>user\nHi!<|im_end|>\n<|im_start|>assistant\n"
    assert lay_out_qwen3(TALK) == "<|im_start|>system\n Be brief. <|im_end|>\n" + tail
    assert lay_out_qwen3(TALK[1:]) == tail
    assert lay_out_qwen3(TALK[1:], enable_thinking=False) == tail + "<think>\n\n</think>\n\n"
    thought = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nHello."}
    assert lay_out_qwen3([TALK[1], thought, TALK[1]]) == (
        "<|im_start|>user\nHi!<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n" + tail
    )


def test_calls_of_qwen3_are_calls_to_the_parser() -> None:
    text = lay_out_qwen3(CALLED, tools=TOOLS)
    assert text.startswith("<|im_start|>system\n# Tools\n")
    assert '{"type": "function", "function": {"name": "weather", "parameters": {}}}' in text
    turn = text.split("<|im_start|>assistant\n")[1].split("<|im_end|>")[0]
    parser = ToolCallParser(["weather", "now"])
    assert parser.add(turn, final=True) == [
        ToolCall("weather", '{"city": "Puno", "days": [1, 2]}'),
        ToolCall("now", "{}"),
    ]
    assert '<|im_start|>user\n<tool_response>\n{"rain": true}\n</tool_response><|im_end|>' in text


def test_a_qwen3_without_a_template_gets_one(tmp_path: Path) -> None:
    tokenizer = Tokenizer(WordLevel({"a": 0}, unk_token="a"))
    tokenizer.add_special_tokens(QWEN3)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert TextFiles.read(tmp_path).chat_template == qwen3.chat_template(QWEN3)


MARKS = {
    "llama3.1": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "llama3.2": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "llama4": ("<|header_start|>", "<|header_end|>", "<|eot|>"),
}


@pytest.mark.parametrize("name", MARKS)
def test_functions_stand_in_the_first_turn_of_the_user(name: str) -> None:
    start, end, over = MARKS[name]
    shown = json.dumps(TOOLS[0], indent=4) + "\n\n"
    turns = lay_out(name, TALK, tools=TOOLS).split(start)
    assert [turn.split(end)[0] for turn in turns[1:]] == ["system", "user", "assistant"]
    assert turns[1].startswith(f"system{end}\n\nEnvironment: ipython\n")
    assert turns[1].endswith(f"Be brief.{over}") and "weather" not in turns[1]
    assert turns[2].startswith(f"user{end}\n\nThese functions")
    assert turns[2].endswith(f"{shown}Hi!{over}")
    turns = lay_out(name, TALK, tools=TOOLS, tools_in_user_message=False).split(start)
    assert turns[1].endswith(f"{shown}Be brief.{over}")
    assert turns[2] == f"user{end}\n\nHi!{over}"
    # without words of the user to put them before, they need the system turn
    greeted = [{"role": "assistant", "content": "Hello."}]
    turns = lay_out(name, greeted, tools=TOOLS).split(start)
    assert turns[1].endswith(f"{shown}{over}")
    assert turns[2] == f"assistant{end}\n\nHello.{over}"


@pytest.mark.parametrize("name", MARKS)
def test_results_of_tools_are_json(name: str) -> None:
    start, end, over = MARKS[name]
    for result, written in (
        ("wet", '"wet"'),
        ('{"a": 1}', '"{\\"a\\": 1}"'),
        ({"a": 1}, '{"a": 1}'),
    ):
        text = lay_out(name, [*CALLED[:2], {"role": "tool", "content": result}], tools=TOOLS)
        assert f"{over}{start}ipython{end}\n\n{written}{over}" in text


def test_builtin_tools_of_llama3_1() -> None:
    arguments = {"query": "rain in Puno"}
    search = {"function": {"name": "brave_search", "arguments": arguments}}
    called = [CALLED[0], {"role": "assistant", "content": "", "tool_calls": [search]}]
    builtin = ["code_interpreter", "brave_search", "wolfram_alpha"]
    text = lay_out("llama3.1", called, builtin_tools=builtin)
    assert text.startswith(
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nEnvironment: ipython\n"
        "Tools: brave_search, wolfram_alpha\n\nCutting Knowledge Date: December 2023\n"
    )
    call = '<|python_tag|>brave_search.call(query="rain in Puno")'
    assert f"assistant<|end_header_id|>\n\n{call}<|eom_id|>" in text
    parser = ToolCallParser(["brave_search"])
    assert parser.add(call, final=True) == [ToolCall("brave_search", json.dumps(arguments))]


@pytest.mark.parametrize("name", ["llama3", *MARKS])
def test_the_final_turn_can_be_left_open_and_documents_are_refused(
    name: str, llama_tokenizer: Tokenizer
) -> None:
    text = TextModel(make_card(llama_tokenizer, templates.read(name)))
    talk = [TALK[1], {"role": "assistant", "content": "It is "}]
    ids = text.layout(talk, False, True)
    said = "It is " if name == "llama4" else "It is"  # the others trim what is said
    assert llama_tokenizer.decode(ids, skip_special_tokens=False).endswith(f"|>\n\n{said}")
    closed = llama_tokenizer.decode(text.layout(talk, False, False), skip_special_tokens=False)
    assert closed.endswith("|>") and "It is" in closed
    with pytest.raises(InvalidRequest, match="cannot show documents"):
        text.layout(TALK, True, False, documents=[{"title": "a", "text": "b"}])


def test_llama4_keeps_words_and_images_as_they_are() -> None:
    parts = [{"type": "image"}, {"type": "text", "text": " What? "}]
    text = lay_out("llama4", [{"role": "user", "content": parts}], tools=TOOLS)
    assert "\n\n<|image|> What? <|eot|>" in text
    said = {**CALLED[1], "content": "Let me see."}
    text = lay_out("llama4", [CALLED[0], said], tools=TOOLS)
    assert '<|python_start|>Let me see.<|python_end|>{"name": "weather", "parameters": {' in text


@pytest.mark.parametrize(
    ("specials", "config", "name"),
    [
        (["<|start_header_id|>"], {}, "llama3"),
        (["<|start_header_id|>", "<|python_tag|>"], {"rope_scaling": {"factor": 8.0}}, "llama3.1"),
        (["<|start_header_id|>", "<|python_tag|>"], {"rope_scaling": {"factor": 32.0}}, "llama3.2"),
        (["<|header_start|>"], {"rope_scaling": None}, "llama4"),
        (["<|im_start|>"], {}, None),
    ],
)
def test_a_checkpoint_without_a_template_gets_its_own(
    tmp_path: Path, specials: list[str], config: dict[str, object], name: str | None
) -> None:
    added = [{"content": text, "id": number} for number, text in enumerate(specials)]
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": added}))
    (tmp_path / "config.json").write_text(json.dumps(config))
    card = ModelCard.from_folder(
        tmp_path,
        model="m",
        group="g",
        layout="",
        digest="",
        max_model_len=1,
        vocab_size=1,
        bos_token_id=None,
        eos_token_ids=(),
        max_sequences=8,
    )
    assert card.chat_template == (templates.read(name) if name else None)
