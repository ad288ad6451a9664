"""What a gateway must know of a model to speak for it: its card, which the leader hands over.

Knows plain JSON files beside a checkpoint; knows nothing of weights.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from arriero.router.text.text_files import TextFiles
from arriero.router.text.turn_ends import turn_ends


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
        bos_token_id, eos_token_ids: the model's own begin and end tokens, `turn_ends` among them.
        turn_ends: end tokens that the chat template alone tells of; the engine does not know them,
            so each request names them.
        tokenizer_json: the file's bytes.
        chat_template: Jinja source of the default one, or None.
        named_templates: further ones, by name ("tool_use", "rag").
        bos_token, eos_token: their text, which templates ask for.
        special_tokens: text of further ones that templates may ask for, by the field's name.
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
        warnings: what the checkpoint's text files say that is not taken, in words.
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
    numerics: str = ""
    epoch: int = 0
    cache_root: bytes = b""
    block_size: int = 0
    memory: str = ""
    image_tile: int = 0
    image_features: int = 0
    turn_ends: tuple[int, ...] = ()
    named_templates: Mapping[str, str] = field(default_factory=dict)
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    @property
    def weights(self) -> str:
        """Digest and arithmetic: where they are equal, one group may go on for another."""
        return f"{self.digest} {self.numerics}"

    @property
    def text_key(self) -> str:
        """Digest of what makes the model's text side; groups of an equal one share it."""
        digest = hashlib.sha256(self.tokenizer_json)
        texts = (
            self.chat_template,
            sorted(self.named_templates.items()),
            self.template_tokens,
            (self.image_tile, self.image_features),
            (self.vocab_size, self.eos_token_ids),
        )
        digest.update(repr(texts).encode())
        return digest.hexdigest()

    @property
    def template_tokens(self) -> dict[str, str]:
        """The special tokens' text that templates ask for, by variable."""
        return {**self.special_tokens, "bos_token": self.bos_token, "eos_token": self.eos_token}

    def to_wire(self) -> dict[str, Any]:
        """As msgpack can carry it."""
        return asdict(self)

    @classmethod
    def from_wire(cls, data: Mapping[str, Any]) -> ModelCard:
        """Undo `to_wire`."""
        lists = ("eos_token_ids", "turn_ends", "warnings")
        return cls(**{**data, **{name: tuple(data.get(name, ())) for name in lists}})

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
        numerics: str = "",
        epoch: int = 0,
        cache_root: bytes = b"",
        block_size: int = 0,
        memory: str = "",
        image_tile: int = 0,
        image_features: int = 0,
    ) -> ModelCard:
        """Read tokenizer, template and defaults from a checkpoint's folder; the rest is given.

        Raises:
            CheckpointError: tokenizer.json is missing, or a file is not what it must be.
        """
        files = TextFiles.read(Path(path))
        specials = dict(files.special_tokens)
        ends = turn_ends(
            [files.chat_template, *files.named_templates.values()], specials, files.tokenizer_json
        )
        more = tuple(token for token in ends if token < vocab_size and token not in eos_token_ids)
        return cls(
            model=model,
            group=group,
            layout=layout,
            digest=digest,
            max_model_len=max_model_len,
            vocab_size=vocab_size,
            bos_token_id=bos_token_id,
            eos_token_ids=(*eos_token_ids, *more),
            turn_ends=more,
            tokenizer_json=files.tokenizer_json,
            chat_template=files.chat_template,
            named_templates=files.named_templates,
            bos_token=specials.pop("bos_token", ""),
            eos_token=specials.pop("eos_token", ""),
            special_tokens=specials,
            generation_defaults=files.generation_defaults,
            warnings=files.warnings,
            created=int(time.time()),
            max_sequences=max_sequences,
            numerics=numerics,
            epoch=epoch,
            cache_root=cache_root,
            block_size=block_size,
            memory=memory,
            image_tile=image_tile,
            image_features=image_features,
        )
