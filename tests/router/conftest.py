"""Tokenizers made on the spot."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer

from support.frontdoor import CHATML_SPECIALS, LLAMA_SPECIALS, make_tokenizer


@pytest.fixture(scope="session")
def llama_tokenizer() -> Tokenizer:
    return make_tokenizer(LLAMA_SPECIALS, bos="<|begin_of_text|>")


@pytest.fixture(scope="session")
def chatml_tokenizer() -> Tokenizer:
    return make_tokenizer(CHATML_SPECIALS)
