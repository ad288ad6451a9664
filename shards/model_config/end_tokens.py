"""The end token of the tokenizer, from the files beside a checkpoint's config.json.

A fine-tuned model often keeps the base model's `eos_token_id` in config.json and names its own end
token only in tokenizer_config.json; both tokens then end a text. Knows file and field names; knows
nothing of chat templates (see `arriero.router.text.template_forms`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from arriero.shards.errors import CheckpointError
from arriero.shards.files.json_file import read_json_object

if TYPE_CHECKING:
    from arriero.shards.layout.parts import AnyModel

Model = TypeVar("Model", bound="AnyModel")

SETTINGS = "tokenizer_config.json"
SPECIALS = "special_tokens_map.json"


def with_tokenizer_ends(model: Model, folder: Path) -> Model:
    """`model` with the tokenizer's `eos_token` among the end tokens, if in the vocabulary.

    Raises:
        CheckpointError: tokenizer_config.json or special_tokens_map.json is not a JSON object.
    """
    model_ends = model.eos_token_ids
    tokenizer_only = [token for token in tokenizer_ends(folder) if token < model.vocab_size]
    ends = tuple(dict.fromkeys((*model_ends, *tokenizer_only)))
    return model if ends == model_ends else replace(model, eos_token_ids=ends)


def tokenizer_ends(folder: Path) -> tuple[int, ...]:
    """Ids of the `eos_token` in the tokenizer's files; empty if no file names an end token.

    Raises:
        CheckpointError: tokenizer_config.json or special_tokens_map.json is not a JSON object.
    """
    settings, specials = (_read(folder / name) for name in (SETTINGS, SPECIALS))
    texts = {token_text(data.get("eos_token")) for data in (settings, specials)} - {""}
    if not texts:
        return ()
    decoder = settings.get("added_tokens_decoder")
    listed: dict[str, int] = {}
    if isinstance(decoder, Mapping):
        listed = {
            token_text(token): int(index) for index, token in decoder.items() if index.isdigit()
        }
    if not texts <= listed.keys():
        listed |= _ids(folder / "tokenizer.json", frozenset(texts))
    return tuple(sorted(listed[text] for text in texts if text in listed))


def token_text(value: Any) -> str:  # noqa: ANN401
    """Text of a token, given as a string or as an added-token object; "" for other values."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) else ""


def _read(file: Path) -> dict[str, Any]:
    return read_json_object(file) if file.is_file() else {}


def _ids(file: Path, texts: frozenset[str]) -> dict[str, int]:
    """Ids of tokens in a tokenizer.json; empty if the file is missing."""
    try:
        stat = file.stat()
    except OSError:
        return {}
    return dict(_ids_of(file, stat.st_mtime_ns, stat.st_size, texts))


@lru_cache(maxsize=32)  # the same folder is read many times, and the file has megabytes
def _ids_of(file: Path, changed_ns: int, size: int, texts: frozenset[str]) -> dict[str, int]:
    try:
        spec = read_json_object(file)
        vocabulary = spec["model"]["vocab"]
        id_of_text = {token["content"]: token["id"] for token in spec.get("added_tokens") or []}
    except (CheckpointError, KeyError, TypeError):
        return {}  # the tokenizer reader raises the error
    if isinstance(vocabulary, dict):
        id_of_text = {text: vocabulary[text] for text in texts if text in vocabulary} | id_of_text
    return {text: id_of_text[text] for text in texts if isinstance(id_of_text.get(text), int)}
