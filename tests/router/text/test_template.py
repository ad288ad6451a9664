"""The template sandbox, and what a checkpoint's folder gives."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from arriero.router.text import chat_template as template_module
from arriero.router.text.chat_template import ChatTemplate, TemplateError
from arriero.router.text.model_card import ModelCard
from arriero.shards.errors import CheckpointError
from arriero.shards.protocol import wire


def render(source: str, **variables: object) -> str:
    return ChatTemplate(source).render(variables)


def test_what_templates_of_checkpoints_use() -> None:
    assert render("{{ x | tojson }}", x={"a": "ñ<'&"}) == '{"a": "ñ<\'&"}'
    assert render("{{ x | tojson(indent=1) }}", x=[1]) == "[\n 1\n]"
    assert render("{{ x | tojson(ensure_ascii=true) }}", x="ñ\ue000🦙") == (
        '"\\u00f1\ue000\\ud83e\\udd99"'
    )
    loop = "{% for i in [1, 2] %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}"
    assert render(loop) == "1"
    assert render("{% generation %}a{% endgeneration %}b") == "ab"
    assert render("  {% if true %}\n  x\n  {% endif %}\n") == "  x\n"
    assert len(render("{{ strftime_now('%d %b %Y') }}")) == 11
    with pytest.raises(TemplateError, match="no tools here"):
        render("{{ raise_exception('no tools here') }}")


@pytest.mark.parametrize(
    "source",
    [
        "{{ x.__class__.__mro__ }}",
        "{{ x.append(1) }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ 'a' * 1000000000 }}",
        "{{ [0] * 1000000000 }}",
        "{{ 9 ** (9 ** 9) }}",
        "{% for i in range(1000000000) %}{% endfor %}",
        "{{ missing.field }}",
        "{{ 1 / 0 }}",
    ],
)
def test_the_sandbox_holds(source: str) -> None:
    with pytest.raises(TemplateError):
        render(source, x=[1])


def test_size_and_time_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_module, "MAX_CHARS", 1000)
    loop = "{% for i in range(90000) %}{{ 'x' * 10 }}{% endfor %}"
    with pytest.raises(TemplateError, match="more than 1000 characters"):
        render(loop)
    monkeypatch.setattr(template_module, "MAX_SECONDS", 0.0)
    with pytest.raises(TemplateError, match="longer than"):
        render(loop)


def test_a_template_that_does_not_compile() -> None:
    with pytest.raises(CheckpointError, match="does not compile"):
        ChatTemplate("{% if %}")


def card(folder: Path) -> ModelCard:
    return ModelCard.from_folder(
        folder,
        model="m",
        group="g",
        layout="tp1",
        digest="d",
        max_model_len=10,
        vocab_size=20,
        bos_token_id=None,
        eos_token_ids=(1, 2),
        max_sequences=8,
    )


def test_a_folder_in_each_of_its_forms(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: No such file"):
        card(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(b"{}")
    assert card(tmp_path).chat_template is None
    settings = {
        "chat_template": [
            {"name": "tool_use", "template": "T"},
            {"name": "default", "template": "D"},
        ],
        "bos_token": {"content": "<s>"},
        "eos_token": "</s>",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    found = card(tmp_path)
    assert (found.chat_template, found.bos_token, found.eos_token) == ("D", "<s>", "</s>")
    (tmp_path / "chat_template.jinja").write_text("J")
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.6, "top_k": null}')
    found = card(tmp_path)
    assert found.chat_template == "J"
    assert found.generation_defaults == {"temperature": 0.6}
    assert wire.decode(wire.encode(found), ModelCard) == found
    (tmp_path / "tokenizer_config.json").write_text("[")
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json"):
        card(tmp_path)
