"""The experts of each token, and the order that makes the rows of each expert contiguous.

Knows indices and scores; knows nothing of weights and of the experts on other ranks.

Shape legend
    T  tokens         A  experts of a token (top-k)
    E  local experts  X  rows: (token, expert) pairs with a local expert
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Routing:
    """The router's choice.

    Attributes:
        experts_TA: int32, global ids by falling logit; with equal logits the lower id first.
        scores_TA: float32, sigmoids of the logits (Llama 4: not normalised over the experts).
    """

    experts_TA: Tensor
    scores_TA: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Permutation:
    """Rows sorted by expert, and within an expert by token.

    Attributes:
        token_X: int32, the token of each row.
        score_X: float32, the factor of each row.
        starts_E1: int32 [E + 1]; local expert e has rows starts[e] .. starts[e + 1].
        row_TA: int32, the row of each (token, choice); -1 if the expert is not local.
    """

    token_X: Tensor
    score_X: Tensor
    starts_E1: Tensor
    row_TA: Tensor


def route(logits_TE: Tensor, top_k: int) -> Routing:
    """Choose the experts of each token by the router's logits, float32 over all experts."""
    # A stable sort, since `topk` does not define the order of equal logits.
    logits_TE, experts_TE = logits_TE.sort(dim=-1, descending=True, stable=True)
    return Routing(experts_TA=experts_TE[:, :top_k].int(), scores_TA=logits_TE[:, :top_k].sigmoid())


def permute(routing: Routing, first_expert: int, num_experts: int) -> Permutation:
    """Order the pairs with an expert in [first_expert, first_expert + num_experts)."""
    num_choices = routing.experts_TA.shape[1]
    expert_P = routing.experts_TA.flatten().long() - first_expert
    local_P = (expert_P >= 0) & (expert_P < num_experts)
    expert_P = expert_P.where(local_P, num_experts)
    count_E1 = torch.bincount(expert_P, minlength=num_experts + 1)[:num_experts]
    starts_E1 = torch.cat([count_E1.new_zeros(1), count_E1.cumsum(0)])
    order_X = expert_P.argsort(stable=True)[: int(starts_E1[-1])]
    row_P = torch.full_like(expert_P, -1)
    row_P[order_X] = torch.arange(order_X.shape[0], device=row_P.device)
    return Permutation(
        token_X=(order_X // num_choices).int(),
        score_X=routing.scores_TA.flatten()[order_X],
        starts_E1=starts_E1.int(),
        row_TA=row_P.view_as(routing.experts_TA).int(),
    )


def combine(y_XH: Tensor, permutation: Permutation) -> Tensor:
    """Sum the rows of each token in the order of its choices: [T, H].

    The order does not depend on other tokens, so that other tokens change no bit of the sum.
    """
    row_TA = permutation.row_TA
    out_TH = y_XH.new_zeros(row_TA.shape[0], y_XH.shape[1])
    for row_T in row_TA.long().unbind(1):
        token_Y = (row_T >= 0).nonzero()[:, 0]
        out_TH[token_Y] += y_XH[row_T[token_Y]]
    return out_TH
