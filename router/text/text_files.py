"""Reads a checkpoint's text files: tokenizer, chat templates, special tokens, sampling defaults.

Knows the names of the files, their formats over the years and their precedence; knows nothing of
the meaning of the texts (see `agreement`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arriero.router import templates
from arriero.router.text.sampling_defaults import read_defaults
from arriero.shards.errors import CheckpointError
from arriero.shards.families.registry import families
from arriero.shards.files.bad_file import HEAD_BYTES, explain_error, explain_head
from arriero.shards.model_config.end_tokens import SETTINGS, SPECIALS, token_text

TEMPLATE_FOLDER = "additional_chat_templates"
DEFAULT = "default"
_BOM = b"\xef\xbb\xbf"
_SPECIAL_FIELDS = (
    "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class TextFiles:
    """Contents of the text files in a checkpoint's folder.

    Attributes:
        tokenizer_json: bytes of the file, without a byte order mark.
        chat_template: Jinja source of the default template, or None.
        named_templates: Jinja sources of the other templates, by name.
        special_tokens: text of `bos_token`, `eos_token` and other special tokens, by field.
        generation_defaults: sampling fields of generation_config.json.
        warnings: a sentence for each value that was left out.
    """

    tokenizer_json: bytes
    chat_template: str | None
    named_templates: Mapping[str, str]
    special_tokens: Mapping[str, str]
    generation_defaults: Mapping[str, float]
    warnings: tuple[str, ...]

    @classmethod
    def read(cls, folder: Path) -> TextFiles:
        """Read a folder.

        Raises:
            CheckpointError: tokenizer.json is missing, a file is broken, or none of several chat
                templates is the default.
        """
        tokenizer_json = _tokenizer(folder)
        settings = _read_json(folder / SETTINGS)
        named = _named_templates(folder, settings)
        default = named.pop(DEFAULT, None) or _builtin(folder, tokenizer_json)
        if default is None and len(named) > 1:
            raise CheckpointError(
                f"{folder}: has chat templates {', '.join(sorted(named))}, but none named "
                f"{DEFAULT!r}; give the template for plain conversations the name {DEFAULT!r}"
            )
        if default is None and named:
            _, default = named.popitem()
        defaults, warnings = read_defaults(_read_json(folder / "generation_config.json"))
        return cls(
            tokenizer_json=tokenizer_json,
            chat_template=default,
            named_templates=named,
            special_tokens=_special_tokens(folder, settings),
            generation_defaults=defaults,
            warnings=tuple(warnings),
        )


def _tokenizer(folder: Path) -> bytes:
    file = folder / "tokenizer.json"
    try:
        data = file.read_bytes()
    except OSError as error:
        words = f"{file}: {explain_error(file, error)}"
        if (folder / "tokenizer.model").is_file():
            words += (
                "; the folder has tokenizer.model alone, a format that is not read: write a "
                "tokenizer.json with AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER) "
                "of transformers"
            )
        raise CheckpointError(words) from error
    problem = explain_head(data[:HEAD_BYTES], len(data))
    if problem is not None:
        raise CheckpointError(f"{file}: {problem}")
    return data.removeprefix(_BOM)


def _named_templates(folder: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """Templates by name; templates in separate files replace all templates of the settings."""
    file = folder / "chat_template.jinja"
    named = {DEFAULT: _read_text(file)} if file.exists() else {}
    for extra in sorted((folder / TEMPLATE_FOLDER).glob("*.jinja")):
        named[extra.stem] = _read_text(extra)
    if not named:
        source = folder / "chat_template.json"
        value = _read_json(source).get("chat_template")
        if value is None:
            source, value = folder / SETTINGS, settings.get("chat_template")
        named = _listed_templates(source, value)
    return {name: text for name, text in named.items() if text.strip()}


def _listed_templates(file: Path, value: Any) -> dict[str, str]:  # noqa: ANN401
    """Templates by name from a text, a list of {"name": …, "template": …}, or an object."""
    if value is None:
        return {}
    if isinstance(value, str):
        return {DEFAULT: value}
    pairs: list[tuple[Any, Any]] = []
    if isinstance(value, Mapping):
        pairs = list(value.items())
    elif isinstance(value, list) and all(isinstance(entry, Mapping) for entry in value):
        pairs = [(entry.get("name"), entry.get("template")) for entry in value]
    if not pairs or not all(isinstance(part, str) for pair in pairs for part in pair):
        raise CheckpointError(
            f"{file}: `chat_template` is a {type(value).__name__} without templates; give a text, "
            'or a list of {"name": …, "template": …}'
        )
    return dict(pairs)


def _builtin(folder: Path, tokenizer_json: bytes) -> str | None:
    """A built-in template for the special tokens of a known model; None for other tokens."""
    try:
        added = json.loads(tokenizer_json).get("added_tokens") or []
        specials = {token["content"] for token in added}
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{folder / 'tokenizer.json'}: `added_tokens` cannot be read: {error!r}; download the "
            "file again"
        ) from error
    config = _read_json(folder / "config.json")
    scaling = config.get("rope_scaling") or config.get("rope_parameters")
    factor = scaling.get("factor") if isinstance(scaling, Mapping) else None
    template = templates.find(specials, rope_factor=factor)
    if template is None:
        offered = (family.chat_template(specials) for family in families())
        template = next((source for source in offered if source is not None), None)
    return template


def _special_tokens(folder: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    mapped = _read_json(folder / SPECIALS)
    texts = {
        name: token_text(settings.get(name)) or token_text(mapped.get(name))
        for name in _SPECIAL_FIELDS
    }
    return {name: text for name, text in texts.items() if text}


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"{path}: cannot be read as UTF-8 text: {error}; download the file again"
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    """The JSON object of a file; empty when the file does not exist."""
    if not path.exists():
        return {}
    try:
        data = json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: is not JSON: {error}; correct the file, or download the file again"
        ) from error
    if not isinstance(data, dict):
        raise CheckpointError(
            f"{path}: has a JSON {type(data).__name__}, but must have an object; correct the file"
        )
    return data
