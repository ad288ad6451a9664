"""Tensors under the names that Hugging Face's classes give them, whatever wrapped the model.

Training tools save a model inside others (`module.`, `_orig_mod.`), and text models are saved alone
or inside one that sees (`language_model.`). Knows names; knows nothing of what tensors hold.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from arriero.shards.checkpoint.llama_names import EMBEDDING
from arriero.shards.checkpoint.safetensors_header import StoredTensor
from arriero.shards.errors import CheckpointError

WRAPPERS = ("module", "_orig_mod", "model", "language_model", "base_model")
"""Words that may stand before a name."""
_TABLE = "embed_tokens.weight"
_BESIDE = ("lm_head", "vision_model", "multi_modal_projector")
"""First words of what lies beside the text model's body."""


def unwrapped(stored: Mapping[str, StoredTensor], prefix: str) -> dict[str, StoredTensor]:
    """The tensors under their usual names; as they are where those are usual.

    Args:
        stored: by the names in the files.
        prefix: of the text model's usual names: "" or "language_model.".

    Raises:
        CheckpointError: two tensors would have one name.
    """
    tables = [name for name in stored if name.endswith(_TABLE)]
    if f"{prefix}{EMBEDDING}" in stored or len(tables) != 1:
        return dict(stored)
    body = tables[0].removesuffix(_TABLE)
    if any(word not in WRAPPERS for word in body.split(".")[:-1]) or (body and body[-1] != "."):
        return dict(stored)
    found: dict[str, StoredTensor] = {}
    for name, one in stored.items():
        new = _usual(name, body, prefix)
        if new in found:
            raise CheckpointError(f"{one.file}: tensor {name[:200]!r} is there under two names")
        found[new] = replace(one, name=new)
    return found


def _usual(name: str, body: str, prefix: str) -> str:
    if name.startswith(body):
        rest = name.removeprefix(body)
        if rest.split(".")[0] not in _BESIDE:
            return f"{prefix}model.{rest}"
    words = name.split(".")
    for at, word in enumerate(words):
        if word in _BESIDE and all(one in WRAPPERS for one in words[:at]):
            rest = ".".join(words[at:])
            return f"{prefix}{rest}" if word == "lm_head" else rest
    return name
