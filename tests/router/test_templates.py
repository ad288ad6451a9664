"""The built-in templates lay conversations out as Meta documents."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from arriero.router import templates
from arriero.router.card import ModelCard
from arriero.router.template import ChatTemplate
from arriero.router.tools import ToolCall, ToolCallParser

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
    assert len(lay_out(name, TALK, date_string=None)) == len(head + "Be brief." + tail)


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
