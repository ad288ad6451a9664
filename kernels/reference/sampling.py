"""From logits to tokens, in plain torch: the definition of `Ops.sample`.

Knows rows of numbers; knows nothing of text, grammars and requests. Shape legend: kernels/ops.py.

The bits of a row's result do not depend on other rows. Sums of floats would depend on their order;
so likelihoods relative to the greatest of the row become integers with `FRACTION_BITS` binary
digits, and integer sums do not depend on the order.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from arriero.kernels.philox import row_key
from arriero.kernels.sampling_rows import Sampled, SamplingRows
from arriero.kernels.token_noise import token_uniforms

FRACTION_BITS = 44
MAX_VOCAB = 1 << (62 - FRACTION_BITS)
"""Largest vocabulary: this number of tokens with full weight sums to 2**62, within int64."""
_ONE = 2.0**FRACTION_BITS
_TOP = 256
"""Number of likeliest tokens that top-p tries before a sort of the whole row."""


def sample(logits_RV: Tensor, rows: SamplingRows) -> Sampled:
    """Draw a token for each row; see `Ops.sample` for the order and the definition."""
    check_vocabulary(logits_RV)
    raw_RV = logits_RV.float()
    adjusted_RV = adjusted(raw_RV, rows)
    tokens_R = adjusted_RV.argmax(-1)
    max_R = adjusted_RV.amax(-1)
    if not rows.all_greedy:
        drawn_R = _draw(adjusted_RV, max_R, rows)
        tokens_R = tokens_R.where(rows.temperature_R == 0, drawn_R)
    tokens_R = tokens_R.where(max_R.isfinite(), -1)
    if rows.num_logprobs < 0:
        return Sampled(tokens_R=tokens_R.int())
    return with_logprobs(raw_RV, tokens_R, rows.num_logprobs)


def check_vocabulary(logits_RV: Tensor) -> None:
    """Raise `ValueError` for a vocabulary above `MAX_VOCAB`: sums of weights would overflow."""
    if logits_RV.shape[1] > MAX_VOCAB:
        raise ValueError(
            f"sample: the vocabulary has {logits_RV.shape[1]} tokens; the limit is {MAX_VOCAB}"
        )


def adjusted(raw_RV: Tensor, rows: SamplingRows) -> Tensor:
    """The logits after bias, bans and penalties; the same tensor if no row has any of these."""
    return _penalise(_restrict(raw_RV, rows), rows)


def _restrict(x_RV: Tensor, rows: SamplingRows) -> Tensor:
    """Add biases, ban tokens that are not allowed. Never in place: log-probabilities need `x`."""
    if rows.bias is not None:
        row_N, token_N, value_N = rows.bias
        x_RV = x_RV.index_put((row_N, token_N), value_N, accumulate=True)
    if rows.allowed_RW is not None:
        x_RV = x_RV.masked_fill(~_bits(rows.allowed_RW, x_RV.shape[1]), -torch.inf)
    return x_RV


def _bits(words_RW: Tensor, num_columns: int) -> Tensor:
    """The bits of masks as bool [R, `num_columns`]."""
    places = torch.arange(32, dtype=torch.int32, device=words_RW.device)
    return ((words_RW[:, :, None] >> places) & 1).bool().flatten(1)[:, :num_columns]


def _penalise(x_RV: Tensor, rows: SamplingRows) -> Tensor:
    """Repetition, then frequency, then presence."""
    if rows.repetition_R is not None:
        assert rows.seen_RV is not None, "repetition_R comes with seen_RV"
        factor_R1 = rows.repetition_R[:, None]
        x_RV = torch.where(x_RV < 0, x_RV * factor_R1, x_RV / factor_R1).where(rows.seen_RV, x_RV)
    for penalty_R, repeated in ((rows.frequency_R, True), (rows.presence_R, False)):
        if penalty_R is not None:
            assert rows.counts_RV is not None, "presence_R and frequency_R come with counts_RV"
            counts_RV = rows.counts_RV if repeated else (rows.counts_RV > 0)
            x_RV = x_RV - penalty_R[:, None] * counts_RV
    return x_RV


def _weights(x_RV: Tensor, max_R: Tensor, temperature_R1: Tensor | float = 1.0) -> Tensor:
    """floor(exp((x - max) / temperature) * 2**FRACTION_BITS), in float64: int64 [R, V]."""
    z_RV = (x_RV.double() - max_R.double()[:, None]) / temperature_R1
    return z_RV.exp_().mul_(_ONE).long()


def _draw(x_RV: Tensor, max_R: Tensor, rows: SamplingRows) -> Tensor:
    """Filter and draw in all rows; the caller discards results of greedy and non-finite rows."""
    drawable_R = (rows.temperature_R > 0) & max_R.isfinite()
    # In discarded rows all tokens get weight 1, so that nothing divides by zero.
    x_RV = x_RV.masked_fill(~drawable_R[:, None], 0)
    max_R = max_R.where(drawable_R, 0)
    temperature_R = rows.temperature_R.double().where(drawable_R, 1)
    weights_RV = _weights(x_RV, max_R, temperature_R[:, None])

    floor_R = (rows.min_p_R.double() * _ONE).ceil().long()
    weights_RV.masked_fill_(weights_RV < floor_R[:, None], 0)
    _filter_rows(weights_RV, drawable_R & (rows.top_k_R > 0), rows.top_k_R, _top_k_floor)
    _filter_rows(weights_RV, drawable_R & (rows.top_p_R < 1), rows.top_p_R, _top_p_floor)

    token_V = rows.token_ids_V
    if token_V is None:
        token_V = torch.arange(x_RV.shape[1], device=x_RV.device)
    uniform_RV = token_uniforms(row_key(rows.seed_R, rows.position_R), token_V)
    return (uniform_RV.log_().neg_() / weights_RV).argmin(-1)  # weight 0: an infinite time


def _filter_rows(
    weights_RV: Tensor,
    uses_R: Tensor,
    limit_R: Tensor,
    floor_of: Callable[[Tensor, Tensor], Tensor],
) -> None:
    """Set weights below the floor of a row to zero, in place, in the rows that use the filter."""
    used_U = uses_R.nonzero()[:, 0]
    if used_U.numel():
        weights_UV = weights_RV[used_U]
        floor_U1 = floor_of(weights_UV, limit_R[used_U, None])
        weights_RV[used_U] = weights_UV.masked_fill_(weights_UV < floor_U1, 0)


def _top_k_floor(weights_UV: Tensor, k_U1: Tensor) -> Tensor:
    """The k-th greatest weight."""
    k_U1 = k_U1.long().clamp(max=weights_UV.shape[1])
    return weights_UV.topk(int(k_U1.max()), dim=-1).values.gather(-1, k_U1 - 1)


def _top_p_floor(weights_UV: Tensor, p_U1: Tensor) -> Tensor:
    """The smallest weight, from the greatest down, with less than p of the total above."""
    target_U1 = p_U1.double() * weights_UV.sum(-1, keepdim=True).double()
    width = min(_TOP, weights_UV.shape[1])
    top_UW = weights_UV.topk(width, dim=-1).values
    if (top_UW.sum(-1, keepdim=True).double() < target_U1).any():
        top_UW = weights_UV.sort(dim=-1, descending=True).values
    above_UW = top_UW.cumsum(-1) - top_UW
    count_U1 = (above_UW.double() < target_U1).sum(-1, keepdim=True).clamp(min=1)
    return top_UW.gather(-1, count_U1 - 1)


def log_totals(raw_RV: Tensor) -> Tensor:
    """log(sum of exponentials) of each row, float64 [R]; NaN where the maximum is not finite."""
    max_R = raw_RV.amax(-1)
    finite_R = max_R.isfinite()
    weights_RV = _weights(raw_RV.masked_fill(~finite_R[:, None], 0), max_R.where(finite_R, 0))
    return (max_R.double() + (weights_RV.sum(-1).double() / _ONE).log()).where(finite_R, torch.nan)


def with_logprobs(
    raw_RV: Tensor,
    tokens_R: Tensor,
    num_top: int,
    log_total_R: Tensor | None = None,
    top_RN: Tensor | None = None,
) -> Sampled:
    """Log-probabilities by the raw logits: x - max - log(sum of weights).

    Args:
        raw_RV: logits before bias, bans and penalties.
        tokens_R: the drawn tokens.
        num_top: number of alternatives.
        log_total_R: `log_totals(raw_RV)`, if the backend computes the totals faster.
        top_RN: `top_tokens(raw_RV, num_top)`, likewise.
    """
    if log_total_R is None:
        log_total_R = log_totals(raw_RV)
    undefined_R = log_total_R.isnan()

    def logprobs(token_RN: Tensor) -> Tensor:
        logprob_RN = raw_RV.gather(-1, token_RN).double() - log_total_R[:, None]
        return logprob_RN.float().masked_fill(undefined_R[:, None], -torch.inf)

    chosen_R = logprobs(tokens_R.clamp(min=0)[:, None])[:, 0].where(tokens_R >= 0, -torch.inf)
    tokens_R = tokens_R.int()
    if num_top == 0:
        return Sampled(tokens_R=tokens_R, logprobs_R=chosen_R)
    if top_RN is None:
        top_RN = top_tokens(raw_RV, num_top)
    return Sampled(
        tokens_R=tokens_R,
        logprobs_R=chosen_R,
        top_tokens_RN=top_RN.int(),
        top_logprobs_RN=logprobs(top_RN),
    )


def top_tokens(x_RV: Tensor, num_top: int) -> Tensor:
    """Ids by falling logit, ties by rising id: int64 [R, N].

    `topk` does not define ties, so each logit becomes an integer of the same order, with the id in
    the low bits.
    """
    size = x_RV.shape[1]
    bits_RV = (x_RV + 0.0).view(torch.int32).long()  # -0.0 + 0.0 is +0.0: a single zero, not two
    ordered_RV = bits_RV ^ ((bits_RV >> 31) & 0x7FFFFFFF)
    ids_V = torch.arange(size - 1, -1, -1, device=x_RV.device)
    keys_RN = ((ordered_RV << 32) | ids_V).topk(min(num_top, size), dim=-1).values
    return size - 1 - (keys_RN & 0xFFFFFFFF)
