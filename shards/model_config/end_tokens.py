"""The tokenizer's own end token, from the text files beside a checkpoint's config.json.

A fine-tune often keeps its base model's `eos_token_id` in config.json and names the token that
ends its turns in tokenizer_config.json alone; a text then ends at either. Knows names of files and
fields; knows nothing of chat templates (see `arriero.router.text.template_forms`).
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
    from arriero.shards.model_config.dense import ModelConfig
    from arriero.shards.model_config.llama4 import Llama4Config

Model = TypeVar("Model", bound="ModelConfig | Llama4Config")

SETTINGS = "tokenizer_config.json"
SPECIALS = "special_tokens_map.json"


def with_tokenizer_ends(model: Model, folder: Path) -> Model:
    """`model`, whose end tokens include the tokenizer's `eos_token` where that has a row.

    Raises:
        CheckpointError: tokenizer_config.json or special_tokens_map.json is no JSON object.
    """
    own: tuple[int, ...] = model.eos_token_ids
    more = [token for token in tokenizer_ends(folder) if token < model.vocab_size]
    ends = tuple(dict.fromkeys((*own, *more)))
    return model if ends == own else replace(model, eos_token_ids=ends)


def tokenizer_ends(folder: Path) -> tuple[int, ...]:
    """Ids of the `eos_token` of the tokenizer's files; none where no file names one.

    Raises:
        CheckpointError: one of the two small files is no JSON object.
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
    """A token's text, written plainly or as an added-token object; "" for none."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) else ""


def _read(file: Path) -> dict[str, Any]:
    return read_json_object(file) if file.is_file() else {}


def _ids(file: Path, texts: frozenset[str]) -> dict[str, int]:
    """Ids of tokens in a tokenizer.json; none where there is no such file."""
    try:
        stat = file.stat()
    except OSError:
        return {}
    return dict(_ids_of(file, stat.st_mtime_ns, stat.st_size, texts))


@lru_cache(maxsize=32)  # a folder is described many times, and the file has megabytes
def _ids_of(file: Path, changed_ns: int, size: int, texts: frozenset[str]) -> dict[str, int]:
    try:
        spec = read_json_object(file)
        vocabulary = spec["model"]["vocab"]
        named = {token["content"]: token["id"] for token in spec.get("added_tokens") or []}
    except (CheckpointError, KeyError, TypeError):
        return {}  # the reader of the tokenizer says what is wrong with it
    if isinstance(vocabulary, dict):
        named = {text: vocabulary[text] for text in texts if text in vocabulary} | named
    return {text: named[text] for text in texts if isinstance(named.get(text), int)}
