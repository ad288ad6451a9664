"""The tokenizer of a model as the files of a checkpoint's folder, in a zip file. Sans-I/O.

Knows the model card and the names of the files; knows nothing of connections.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Iterator

from smg_grpc_proto.generated import common_pb2 as common

from arriero.router.text.model_card import ModelCard

CHUNK_BYTES = 1 << 20
_TIME = (1980, 1, 1, 0, 0, 0)
"""Of each file: the zip of every gateway has the same bytes, and so the same digest."""


def tokenizer_zip(card: ModelCard) -> bytes:
    """The zip file: tokenizer, chat templates, special tokens, defaults, a small config."""
    settings: dict[str, object] = {
        **card.special_tokens,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": card.max_model_len,
        "clean_up_tokenization_spaces": False,
    }
    for name, text in (("bos_token", card.bos_token), ("eos_token", card.eos_token)):
        if text:
            settings[name] = text
    config = {
        "model_type": "llama",
        "vocab_size": card.vocab_size,
        "max_position_embeddings": card.max_model_len,
        "bos_token_id": card.bos_token_id,
        "eos_token_id": list(card.eos_token_ids),
    }
    files = {"tokenizer.json": card.tokenizer_json, "config.json": _json(config)}
    if card.chat_template is not None:
        settings["chat_template"] = card.chat_template
        files["chat_template.jinja"] = card.chat_template.encode()
    for name, source in sorted(card.named_templates.items()):
        files[f"additional_chat_templates/{name}.jinja"] = source.encode()
    files["tokenizer_config.json"] = _json(settings)
    if card.generation_defaults:
        files["generation_config.json"] = _json(dict(card.generation_defaults))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(zipfile.ZipInfo(name, _TIME), data, zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def chunks(data: bytes) -> Iterator[common.GetTokenizerChunk]:
    """The bytes in chunks; the last chunk has the SHA-256 of all bytes."""
    digest = hashlib.sha256(data).hexdigest()
    for start in range(0, len(data), CHUNK_BYTES):
        last = start + CHUNK_BYTES >= len(data)
        yield common.GetTokenizerChunk(
            data=data[start : start + CHUNK_BYTES], sha256=digest if last else ""
        )


def _json(value: dict[str, object]) -> bytes:
    return json.dumps(value, ensure_ascii=False, sort_keys=True).encode()
