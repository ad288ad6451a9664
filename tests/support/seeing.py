"""A tiny Llama 4 that reads images, behind a real gateway."""

from __future__ import annotations

import io
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from PIL import Image
from tokenizers import Tokenizer

from arriero.router import templates
from arriero.router.text.model_card import ModelCard
from arriero.shards.config.group import GroupConfig
from arriero.shards.engine.types import EngineConfig
from arriero.shards.images.layout import TOKEN_TEXTS
from arriero.shards.models.llama4.config import Llama4Config
from support.frontdoor import make_card, make_tokenizer
from support.fronted import Front, fronted
from support.models import llama4_weights, seeing_settings, write_safetensors

SPECIALS = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|header_start|>",
    "<|header_end|>",
    "<|eot|>",
    *TOKEN_TEXTS.values(),
]


def picture(width: int, height: int, colour: int = 0, form: str = "PNG") -> bytes:
    """An image of one colour."""
    out = io.BytesIO()
    Image.new("RGB", (width, height), (colour, 90, 200)).save(out, form)
    return out.getvalue()


def seeing_tokenizer() -> Tokenizer:
    """A tokenizer with the tokens of images."""
    return make_tokenizer(SPECIALS, bos=SPECIALS[0])


@asynccontextmanager
async def seeing_front(
    folder: Path, tokenizer: Tokenizer | None = None, *, console: bool = False
) -> AsyncIterator[Front]:
    """Serve a tiny model with random weights.

    Args:
        folder: for the checkpoint.
        tokenizer: with the tokens of images; None makes one.
        console: serve the console.
    """
    tokenizer = tokenizer or seeing_tokenizer()
    ids = {name: tokenizer.token_to_id(text) for name, text in TOKEN_TEXTS.items()}
    settings = seeing_settings(tile=336, vocab=512, max_positions=8192, moe_step=2, qk_norm=False)
    settings |= {
        "image_token_index": ids["patch"],
        "boi_token_index": ids["start"],
        "eoi_token_index": ids["end"],
    }
    model = Llama4Config.from_dict(settings)
    (folder / "config.json").write_text(json.dumps(settings))
    write_safetensors(folder / "model.safetensors", llama4_weights(model, seed=5))
    config = GroupConfig(
        model_path=str(folder),
        dtype="float32",
        threads=1,
        num_blocks=1024,
        num_local_blocks=512,
        max_sequences=4,
        max_model_len=4096,
    )

    def card(limits: EngineConfig) -> ModelCard:
        assert model.vision is not None
        return make_card(
            tokenizer,
            templates.read("llama4"),
            max_model_len=limits.max_model_len,
            vocab_size=limits.vocab_size,
            max_sequences=limits.max_sequences,
            image_tile=model.vision.image_size,
            image_features=model.vision.features_per_tile,
        )

    async with fronted(config, card, console=console) as front:
        yield front
