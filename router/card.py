"""What a gateway must know of a model to speak for it: its card, which the leader hands over.

Knows plain JSON files beside a checkpoint; knows nothing of weights.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from arriero.router import templates
from arriero.shards.checkpoint.bad_file import HEAD_BYTES, explain_error, explain_head
from arriero.shards.errors import CheckpointError

_DEFAULTS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
"""Fields of generation_config.json that stand in for what a request leaves out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelCard:
    """A model as one group serves it.

    Attributes:
        model: the id that clients ask for.
        group: id of the group.
        layout: how the group cuts the model, such as "tp2 pp2".
        digest: of weights and revision; groups of one digest give the same tokens.
        max_model_len: most tokens of prompt and output together.
        vocab_size: token ids run below it.
        bos_token_id, eos_token_ids: the model's own begin and end tokens.
        tokenizer_json: the file's bytes.
        chat_template: Jinja source, or None.
        bos_token, eos_token: their text, which templates ask for.
        generation_defaults: sampling fields of the checkpoint's generation_config.json.
        created: seconds since 1970.
        max_sequences: most sequences that the group computes at once.
        arithmetic: what the weights are held and computed in, such as "bfloat16 int8".
        epoch: of the group: a later life of the same place has a larger one.
        cache_root: the model's part of its KV blocks' keys; b"" where prefixes are not kept.
        block_size: tokens in one of them.
        memory: names the node in whose host memory it keeps blocks; "" where it keeps none.
        image_tile, image_features: pixels of a side of an image's tile, and the features that stand
            for a tile; 0 where the model reads no images.
    """

    model: str
    group: str
    layout: str
    digest: str
    max_model_len: int
    vocab_size: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    tokenizer_json: bytes
    chat_template: str | None = None
    bos_token: str = ""
    eos_token: str = ""
    generation_defaults: Mapping[str, float] = field(default_factory=dict)
    created: int = 0
    max_sequences: int = 256
    arithmetic: str = ""
    epoch: int = 0
    cache_root: bytes = b""
    block_size: int = 0
    memory: str = ""
    image_tile: int = 0
    image_features: int = 0

    @property
    def weights(self) -> str:
        """Digest and arithmetic: where they are equal, one group may go on for another."""
        return f"{self.digest} {self.arithmetic}"

    @property
    def text_key(self) -> str:
        """Digest of what makes the model's text side; groups of an equal one share it."""
        digest = hashlib.sha256(self.tokenizer_json)
        images = f"{self.image_tile} {self.image_features}"
        for part in (self.chat_template or "", self.bos_token, self.eos_token, images):
            digest.update(hashlib.sha256(part.encode()).digest())
        return digest.hexdigest()

    def to_wire(self) -> dict[str, Any]:
        """As msgpack can carry it."""
        return asdict(self)

    @classmethod
    def from_wire(cls, data: Mapping[str, Any]) -> ModelCard:
        """Undo `to_wire`."""
        return cls(**{**data, "eos_token_ids": tuple(data["eos_token_ids"])})

    @classmethod
    def from_folder(
        cls,
        path: str | Path,
        *,
        model: str,
        group: str,
        layout: str,
        digest: str,
        max_model_len: int,
        vocab_size: int,
        bos_token_id: int | None,
        eos_token_ids: tuple[int, ...],
        max_sequences: int,
        arithmetic: str = "",
        epoch: int = 0,
        cache_root: bytes = b"",
        block_size: int = 0,
        memory: str = "",
        image_tile: int = 0,
        image_features: int = 0,
    ) -> ModelCard:
        """Read tokenizer, template and defaults from a checkpoint's folder; the rest is given.

        Raises:
            CheckpointError: tokenizer.json is missing, or a file is not JSON.
        """
        folder = Path(path)
        file = folder / "tokenizer.json"
        try:
            tokenizer_json = file.read_bytes()
        except OSError as error:
            raise CheckpointError(f"{file}: {explain_error(file, error)}") from error
        because = explain_head(tokenizer_json[:HEAD_BYTES], len(tokenizer_json))
        if because is not None:
            raise CheckpointError(f"{file}: {because}")
        settings = _read_json(folder / "tokenizer_config.json")
        generation = _read_json(folder / "generation_config.json")
        defaults = {
            name: generation[name]
            for name in _DEFAULTS
            if isinstance(generation.get(name), int | float)
        }
        return cls(
            model=model,
            group=group,
            layout=layout,
            digest=digest,
            max_model_len=max_model_len,
            vocab_size=vocab_size,
            bos_token_id=bos_token_id,
            eos_token_ids=eos_token_ids,
            tokenizer_json=tokenizer_json,
            chat_template=_chat_template(folder, settings) or _builtin(folder, tokenizer_json),
            bos_token=_token_text(settings.get("bos_token")),
            eos_token=_token_text(settings.get("eos_token")),
            generation_defaults=defaults,
            created=int(time.time()),
            max_sequences=max_sequences,
            arithmetic=arithmetic,
            epoch=epoch,
            cache_root=cache_root,
            block_size=block_size,
            memory=memory,
            image_tile=image_tile,
            image_features=image_features,
        )


def _chat_template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    """The template, from its own file, from the settings, or from a list of named ones."""
    for name in ("chat_template.jinja", "chat_template.json"):
        file = folder / name
        if file.exists() and name.endswith(".jinja"):
            return file.read_text(encoding="utf-8")
        if file.exists():
            settings = {**settings, **_read_json(file)}
    found = settings.get("chat_template")
    if isinstance(found, list):
        named = {entry["name"]: entry["template"] for entry in found}
        found = named.get("default") or next(iter(named.values()), None)
    if found is not None and not isinstance(found, str):
        raise CheckpointError(f"{folder}: `chat_template` is a {type(found).__name__}, not text")
    return found


def _builtin(folder: Path, tokenizer_json: bytes) -> str | None:
    """A template of our own, when the special tokens are those of a Llama that we know."""
    try:
        added = json.loads(tokenizer_json).get("added_tokens") or []
        specials = {token["content"] for token in added}
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / 'tokenizer.json'}: {error!r}") from error
    config = _read_json(folder / "config.json")
    scaling = config.get("rope_scaling") or config.get("rope_parameters")
    factor = scaling.get("factor") if isinstance(scaling, Mapping) else None
    return templates.find(specials, rope_factor=factor)


def _token_text(value: Any) -> str:  # noqa: ANN401
    """A token's text, written plainly or as an added-token object."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) else ""


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object, empty when there is no such file."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: holds a {type(data).__name__}, not an object")
    return data
