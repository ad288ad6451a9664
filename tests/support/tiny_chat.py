"""A folder with a tiny random model that chats, with the tokenizer of a real checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

from support.models import tiny_llama

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
)


def write_tiny_chat(folder: Path, model: Path, *, seed: int = 0, max_positions: int = 1024) -> Path:
    """Write the model; returns the folder.

    Args:
        folder: the new folder, or an empty one.
        model: checkpoint whose tokenizer and chat template are used.
        seed: of the weights.
        max_positions: most tokens of a sequence.
    """
    vocab = json.loads((model / "config.json").read_text())["vocab_size"]
    tiny_llama(folder, vocab=vocab, max_positions=max_positions, seed=seed)
    for name in FILES:
        if (model / name).exists():
            (folder / name).write_bytes((model / name).read_bytes())
    return folder
