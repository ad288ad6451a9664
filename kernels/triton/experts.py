"""Routing to experts, the order of rows by expert, and the sum of the experts' outputs.

Nothing here waits for the device: only the device knows the number of rows, so tensors have the
largest possible length, and rows past the last are never read. Knows indices and rows; knows
nothing of weights. Shape legend: kernels/moe.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

import triton.language as tl
from arriero.kernels.moe import Permutation, Routing
from arriero.kernels.triton.launch import (
    EXACT,
    INTERPRETED,
    kernel,
    power_of_two,
    rows_per_program,
    unit_stride,
)

BLOCK = 1024


@kernel
def _route(
    logits: tl.tensor,
    experts: tl.tensor,
    scores: tl.tensor,
    num_rows: tl.tensor,
    num_experts: tl.tensor,
    TOP_K: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    expert = tl.arange(0, BLOCK)[None, :]
    valid = (row < num_rows)[:, None] & (expert < num_experts)
    at = logits + row.to(tl.int64)[:, None] * num_experts + expert
    value = tl.load(at, mask=valid, other=-float("inf"))
    taken = (expert >= num_experts) & (row >= 0)[:, None]
    for choice in tl.static_range(TOP_K):
        free = tl.where(taken, -float("inf"), value)
        best = tl.max(free, 1)
        # The lowest id with the greatest logit; no id twice, even if all logits are -inf.
        best_id = tl.min(tl.where((free == best[:, None]) & ~taken, expert, BLOCK), 1)
        small = tl.exp(-tl.abs(best))
        score = tl.where(best >= 0, 1.0, small) / (1.0 + small)
        tl.store(experts + row * TOP_K + choice, best_id, mask=row < num_rows)
        tl.store(scores + row * TOP_K + choice, score, mask=row < num_rows)
        taken = taken | (expert == best_id[:, None])


def route(logits_TE: Tensor, top_k: int) -> Routing:
    """See `moe.route`; float32 logits."""
    logits_TE = logits_TE.float().contiguous()
    tokens, num_experts = logits_TE.shape
    experts_TA = torch.empty(tokens, top_k, dtype=torch.int32, device=logits_TE.device)
    scores_TA = torch.empty(tokens, top_k, dtype=torch.float32, device=logits_TE.device)
    block = power_of_two(num_experts)
    rows = power_of_two(rows_per_program(block))
    if tokens:
        _route[(-(-tokens // rows),)](
            logits_TE,
            experts_TA,
            scores_TA,
            tokens,
            num_experts,
            TOP_K=top_k,
            ROWS=rows,
            BLOCK=block,
            num_warps=1,
            **EXACT,
        )
    return Routing(experts_TA=experts_TA, scores_TA=scores_TA)


@kernel
def _permute(
    experts: tl.tensor,
    scores: tl.tensor,
    tokens_out: tl.tensor,
    scores_out: tl.tensor,
    starts: tl.tensor,
    rows_out: tl.tensor,
    num_pairs: tl.tensor,
    num_choices: tl.tensor,
    first_expert: tl.tensor,
    num_experts: tl.tensor,
    BLOCK: tl.constexpr,
    EXPERTS: tl.constexpr,
) -> None:
    """A single program: count the pairs of each expert, then compute the row of each pair."""
    local_expert = tl.arange(0, EXPERTS)
    counts = tl.zeros([EXPERTS], tl.int32)
    for first in range(0, num_pairs, BLOCK):
        pair = first + tl.arange(0, BLOCK)
        expert = tl.load(experts + pair, mask=pair < num_pairs, other=-1) - first_expert
        expert = tl.where((pair < num_pairs) & (expert < num_experts), expert, -1)
        counts += tl.sum((expert[:, None] == local_expert[None, :]).to(tl.int32), 0)
    inclusive = tl.cumsum(counts, 0)
    tl.store(starts + local_expert + 1, inclusive, mask=local_expert < num_experts)
    tl.store(starts + local_expert, inclusive - counts, mask=local_expert == 0)
    base = inclusive - counts
    for first in range(0, num_pairs, BLOCK):
        pair = first + tl.arange(0, BLOCK)
        expert = tl.load(experts + pair, mask=pair < num_pairs, other=-1) - first_expert
        local = (pair < num_pairs) & (expert >= 0) & (expert < num_experts)
        own = (tl.where(local, expert, -1)[:, None] == local_expert[None, :]).to(tl.int32)
        rank = tl.cumsum(own, 0) - own
        row = tl.sum(own * (rank + base[None, :]), 1)
        tl.store(rows_out + pair, tl.where(local, row, -1), mask=pair < num_pairs)
        tl.store(tokens_out + row, pair // num_choices, mask=local)
        score = tl.load(scores + pair, mask=local, other=0.0)
        tl.store(scores_out + row, score, mask=local)
        base += tl.sum(own, 0)


def permute(routing: Routing, first_expert: int, num_experts: int) -> Permutation:
    """As `moe.permute`, but `token_X` and `score_X` have an entry for each pair.

    Only the rows before starts[E] are defined.
    """
    experts_TA = routing.experts_TA.contiguous()
    scores_TA = routing.scores_TA.contiguous()
    device, pairs = experts_TA.device, experts_TA.numel()
    token_X = torch.empty(pairs, dtype=torch.int32, device=device)
    score_X = torch.empty(pairs, dtype=torch.float32, device=device)
    starts_E1 = torch.empty(num_experts + 1, dtype=torch.int32, device=device)
    row_TA = torch.empty_like(experts_TA)
    columns = power_of_two(num_experts)
    _permute[(1,)](
        experts_TA,
        scores_TA,
        token_X,
        score_X,
        starts_E1,
        row_TA,
        pairs,
        experts_TA.shape[1],
        first_expert,
        num_experts,
        BLOCK=max(16, min(BLOCK, (1 << 13) // columns)),  # one binary for any number of pairs
        EXPERTS=columns,
        num_warps=8,
        **EXACT,
    )
    return Permutation(token_X=token_X, score_X=score_X, starts_E1=starts_E1, row_TA=row_TA)


@kernel
def _combine(
    y: tl.tensor,
    rows: tl.tensor,
    shared: tl.tensor,
    out: tl.tensor,
    num_tokens: tl.tensor,
    size: tl.tensor,
    CHOICES: tl.constexpr,
    ADDS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    token = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    column = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    valid = (token < num_tokens) & (column < size)
    at = token.to(tl.int64) * size + column
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for choice in tl.static_range(CHOICES):
        row = tl.load(rows + token * CHOICES + choice, mask=token < num_tokens, other=-1)
        local = valid & (row >= 0)
        total += tl.load(y + row.to(tl.int64) * size + column, mask=local, other=0.0).to(tl.float32)
    if ADDS:
        total += tl.load(shared + at, mask=valid, other=0.0).to(tl.float32)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=valid)


def combine(y_XH: Tensor, row_TA: Tensor, shared_TH: Tensor | None = None) -> Tensor:
    """Sum the rows of each token in the order of the choices, then the shared part: [T, H]."""
    y_XH = unit_stride(y_XH).contiguous()
    tokens, choices = row_TA.shape
    size = y_XH.shape[1]
    out_TH = torch.empty(tokens, size, dtype=y_XH.dtype, device=y_XH.device)
    block = power_of_two(size) if INTERPRETED else min(BLOCK, power_of_two(size))
    rows = power_of_two(rows_per_program(block))
    if tokens:
        _combine[(-(-tokens // rows), -(-size // block))](
            y_XH,
            row_TA.contiguous(),
            None if shared_TH is None else shared_TH.contiguous(),
            out_TH,
            tokens,
            size,
            CHOICES=choices,
            ADDS=shared_TH is not None,
            ROWS=rows,
            BLOCK=block,
            **EXACT,
        )
    return out_TH
