"""Steps of padding before the first request, which compile the kernels that graphs leave out.

Kernels are compiled for block sizes, which follow the number of rows, and for the optional parts of
a draw. Knows batches; knows nothing of graphs and of the model.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from arriero.kernels.flat_batch import FlatBatch
from arriero.kernels.ops import Ops
from arriero.kernels.sampling_rows import SamplingRows
from arriero.kernels.sizes import num_mask_words
from arriero.shards.worker.rope_table import Rope

_GROWTH = 8
"""Ratio of sizes: products have block sizes for up to 16, up to 128 and more rows, so that sizes
with this ratio meet each of them, also where rows are divided among experts."""


def prompt_sizes(most: int) -> list[int]:
    """Tokens of the prompts to run: 2, 16, 128, ... and `most`, the largest number of a step."""
    sizes = [2]
    while sizes[-1] < most:
        sizes.append(min(most, _GROWTH * sizes[-1]))
    return sizes


def padding_prompt(
    num_tokens: int,
    *,
    rope: Rope,
    max_context: int,
    context_bound: int,
    block_size: int,
    scratch_block: int,
    device: torch.device,
) -> FlatBatch:
    """A sequence of `num_tokens` tokens that all lie in the scratch block.

    The batch says that its contexts have at most `context_bound` tokens, which kernels of attention
    go by.
    """
    ints: dict[str, Any] = {"dtype": torch.int32, "device": device}
    index_T = torch.arange(num_tokens, **ints)
    positions_T = index_T.clamp(max=max_context - 1)
    cos_TD, sin_TD = rope.at(positions_T)
    return FlatBatch(
        positions_T=positions_T,
        query_start_S1=torch.tensor([0, num_tokens], **ints),
        context_S=torch.tensor([num_tokens], **ints),
        block_table_SB=torch.full((1, -(-num_tokens // block_size)), scratch_block, **ints),
        slots_T=index_T % block_size + scratch_block * block_size,
        cos_TD=cos_TD,
        sin_TD=sin_TD,
        max_query=num_tokens,
        max_context=context_bound,
    )


def draw_all_ways(ops: Ops, plain: SamplingRows, vocab_size: int) -> None:
    """Draw a token with each combination of bans and penalties.

    Args:
        ops: the backend.
        plain: parameters of a row, without optional fields.
        vocab_size: tokens of the vocabulary.
    """
    zeros_R = torch.zeros_like(plain.temperature_R)
    logits_RV = zeros_R[:, None].repeat(1, vocab_size)
    words_RW = zeros_R[:, None].int().repeat(1, num_mask_words(vocab_size))
    bans: dict[str, Any] = {"allowed_RW": ~words_RW}
    penalties: dict[str, Any] = {
        "repetition_R": zeros_R + 1,
        "presence_R": zeros_R,
        "frequency_R": zeros_R,
        "seen_RV": logits_RV != 0,
        "counts_RV": logits_RV.int(),
    }
    for extra in (bans, penalties, bans | penalties):
        for all_greedy in (False, True):
            ops.sample(logits_RV, replace(plain, all_greedy=all_greedy, **extra))
