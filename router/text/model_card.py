"""The model card: what a gateway must know of a model; the leader sends the card.

Knows plain JSON files beside a checkpoint; knows nothing of weights.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from arriero.router.text.text_files import TextFiles
from arriero.router.text.turn_ends import turn_ends


@dataclass(frozen=True, kw_only=True, slots=True)
class ServedAdapter:
    """A LoRA adapter that a group serves beside its model.

    Attributes:
        name: model id for clients.
        digest: digest of settings and weights; equal digests give the same tokens.
        version: counts up when an adapter of another content takes the name.
    """

    name: str
    digest: str
    version: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelCard:
    """A model that a group serves.

    Attributes:
        model: id of the model for clients.
        group: id of the group.
        layout: how the group divides the model, such as "tp2 pp2".
        digest: digest of weights and revision; groups with equal digests give the same tokens.
        max_model_len: largest number of tokens of prompt and output together.
        vocab_size: number of token ids of the model.
        bos_token_id, eos_token_ids: begin token and end tokens, `turn_ends` included.
        turn_ends: end tokens from the chat template alone; the engine does not know these tokens,
            so each request names them.
        tokenizer_json: bytes of the file.
        chat_template: Jinja source of the default template, or None.
        named_templates: further templates, by name ("tool_use", "rag").
        bos_token, eos_token: text of these tokens, a variable of templates.
        special_tokens: text of further special tokens for templates, by field name.
        generation_defaults: sampling fields of the checkpoint's generation_config.json.
        created: seconds since 1970.
        max_sequences: largest number of sequences that the group computes at once.
        numerics: dtypes of weights and computation, such as "bfloat16 int8".
        epoch: epoch of the group; a later group of the same seat has a larger epoch.
        cache_root: the model's part of the keys of KV blocks; b"" without a prefix cache.
        block_size: tokens in a KV block.
        memory: name of the node with the group's KV blocks in host memory; "" without such blocks.
        image_tile, image_features: pixels along the side of an image tile, and features of a tile;
            0 for a model that reads no images.
        warnings: a sentence for each value of the text files that is not used.
        adapters: adapters of the group.
        guard: kind of a guard model that the spec names, such as "llama-guard-3"; "" for no name (a
            guard's chat template tells its kind).
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
    generation_defaults: Mapping[str, int | float] = field(default_factory=dict)
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
    adapters: tuple[ServedAdapter, ...] = ()
    guard: str = ""

    @property
    def compat_key(self) -> str:
        """Digest and numerics; a group may continue the requests of a group with an equal key."""
        return f"{self.digest} {self.numerics}"

    @property
    def text_key(self) -> str:
        """Digest of the inputs of `TextModel`; groups with equal digests share a `TextModel`."""
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
        """Text of the special tokens for templates, by variable."""
        return {**self.special_tokens, "bos_token": self.bos_token, "eos_token": self.eos_token}

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
        adapters: tuple[ServedAdapter, ...] = (),
        guard: str = "",
    ) -> ModelCard:
        """A card with tokenizer, templates and defaults from a checkpoint's folder.

        Raises:
            CheckpointError: tokenizer.json is missing, or a file is broken.
        """
        files = TextFiles.read(Path(path))
        specials = dict(files.special_tokens)
        sources = [files.chat_template, *files.named_templates.values()]
        ends = turn_ends(sources, specials, files.tokenizer_json)
        new_ends = tuple(end for end in ends if end < vocab_size and end not in eos_token_ids)
        return cls(
            model=model,
            group=group,
            layout=layout,
            digest=digest,
            max_model_len=max_model_len,
            vocab_size=vocab_size,
            bos_token_id=bos_token_id,
            eos_token_ids=(*eos_token_ids, *new_ends),
            turn_ends=new_ends,
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
            adapters=adapters,
            guard=guard,
        )
