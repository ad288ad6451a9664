"""The oracle: transformers in float32, one unpadded sequence at a time."""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from support.oracle import first_layers

Oracle = Callable[[str, list[list[int]], int], list[list[int]]]

FEW_LAYERS = 4
"""Of SmolLM2's 30: a seventh of the time, with the same widths, heads and vocabulary."""

TEXTS = Path(os.__file__).parent


def words(seed: int, count: int, tokenizer) -> list[int]:  # noqa: ANN001
    """`count` tokens of real text: the standard library's sources, cut at random."""
    rng = random.Random(seed)
    names = sorted(TEXTS.glob("*.py"))
    text = ""
    while len(text) < count * 8:
        source = rng.choice(names).read_text(errors="ignore")
        start = rng.randrange(max(1, len(source) - count * 8))
        text += source[start : start + count * 8]
    return tokenizer.encode(text, add_special_tokens=False).ids[:count]


@pytest.fixture(scope="session")
def whole() -> str:
    """SmolLM2, all of it."""
    path = os.environ.get("ARRIERO_TEST_MODEL")
    if not path:
        pytest.skip("ARRIERO_TEST_MODEL does not name a converted SmolLM2 folder (see Makefile)")
    return path


@pytest.fixture(scope="session")
def few_layers(whole: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """SmolLM2's first layers."""
    path = tmp_path_factory.mktemp("few") / "layers"
    first_layers(Path(whole), path, FEW_LAYERS)
    return str(path)


@pytest.fixture
def model_path(request: pytest.FixtureRequest, whole: str, few_layers: str) -> str:
    """The whole model for the long forms of tests, its first layers for the others."""
    return whole if request.node.get_closest_marker("slow") else few_layers


@pytest.fixture(scope="session")
def prompts(whole: str) -> list[list[int]]:
    """32 prompts of 5 to 700 tokens."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(Path(whole) / "tokenizer.json"))
    lengths = [5, 6, 7, 8, 15, 16, 17, 31, 32, 33, 47, 48, 63, 64, 65, 80, 100, 127, 128, 129]
    lengths += [160, 200, 255, 256, 257, 300, 350, 400, 511, 512, 600, 700]
    return [words(i, length, tokenizer) for i, length in enumerate(lengths)]


@pytest.fixture(scope="session")
def oracle(pytestconfig: pytest.Config) -> Oracle:
    """Greedy continuations by transformers; kept between runs, since they cost minutes."""

    def ask(path: str, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        import transformers

        weights = (Path(path) / "model.safetensors").stat().st_size
        asked = json.dumps([prompts, new_tokens, weights, transformers.__version__])
        key = f"oracle/{hashlib.sha256(asked.encode()).hexdigest()}"
        known = pytestconfig.cache.get(key, None)
        if known is None:
            known = greedy(path, prompts, new_tokens)
            pytestconfig.cache.set(key, known)
        return known

    return ask


def greedy(path: str, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    """Greedy tokens of transformers in float32, end tokens ignored."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    out: list[list[int]] = []
    with torch.inference_mode():
        for prompt in prompts:
            ids, cache, tokens = torch.tensor([prompt]), None, []
            for _ in range(new_tokens):
                got = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
                cache = got.past_key_values
                tokens.append(int(got.logits[0, -1].argmax()))
                ids = torch.tensor([[tokens[-1]]])
            out.append(tokens)
    return out
