"""Removal of wrapper prefixes, so that tensors have the names of Hugging Face's classes.

Training tools save a wrapped model (`module.`, `_orig_mod.`); a text model is saved alone or inside
a multimodal model (`language_model.`). Knows names; knows nothing of the content of tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from arriero.shards.checkpoint.llama_names import EMBEDDING
from arriero.shards.checkpoint.safetensors_header import StoredTensor
from arriero.shards.errors import CheckpointError

WRAPPERS = ("module", "_orig_mod", "model", "language_model", "base_model")
"""Prefix words that are removed from a name."""
_TABLE = "embed_tokens.weight"
_BESIDE = ("lm_head", "vision_model", "multi_modal_projector")
"""First words of tensor names outside the body of the text model."""


def unwrapped(stored: Mapping[str, StoredTensor], prefix: str) -> dict[str, StoredTensor]:
    """The tensors under standard names; unchanged if the names are standard already.

    Args:
        stored: tensors by the names in the files.
        prefix: standard prefix of the text model's names: "" or "language_model.".

    Raises:
        CheckpointError: two tensors have the same standard name.
    """
    tables = [name for name in stored if name.endswith(_TABLE)]
    if f"{prefix}{EMBEDDING}" in stored or len(tables) != 1:
        return dict(stored)
    body = tables[0].removesuffix(_TABLE)
    if any(word not in WRAPPERS for word in body.split(".")[:-1]) or (body and body[-1] != "."):
        return dict(stored)
    renamed: dict[str, StoredTensor] = {}
    for name, tensor in stored.items():
        new = _standard_name(name, body, prefix)
        if new in renamed:
            raise CheckpointError(
                f"{tensor.file}: tensor {name[:200]!r} is stored under two names; "
                "remove one of both"
            )
        renamed[new] = replace(tensor, name=new)
    return renamed


def _standard_name(name: str, body: str, prefix: str) -> str:
    if name.startswith(body):
        rest = name.removeprefix(body)
        if rest.split(".")[0] not in _BESIDE:
            return f"{prefix}model.{rest}"
    words = name.split(".")
    for at, word in enumerate(words):
        if word in _BESIDE and all(before in WRAPPERS for before in words[:at]):
            rest = ".".join(words[at:])
            return f"{prefix}{rest}" if word == "lm_head" else rest
    return name
