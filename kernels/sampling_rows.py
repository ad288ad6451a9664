"""What a draw of tokens takes and gives: parameters by row, tokens and log-probabilities.

Knows tensors; knows nothing of requests. `Ops.sample` defines the draw. Shape legend:
kernels/ops.py, and W for the 32-bit words of a row's mask.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingRows:
    """Sampling parameters of R rows, a tensor for each field, on the device of the logits.

    An optional field is None when no row of the batch uses it, so that the usual case is cheap.

    Attributes:
        temperature_R: float32; 0 means greedy.
        top_k_R: int32; 0 means off.
        top_p_R: float32; 1 means off.
        min_p_R: float32; 0 means off.
        seed_R: int64; the draw is a pure function of (seed, position).
        position_R: int64; position of the sampled token.
        repetition_R: float32; 1 means off. Hugging Face's definition, over prompt and output.
        presence_R: float32; 0 means off. Over output tokens (OpenAI's definition).
        frequency_R: float32; 0 means off. Over output tokens.
        seen_RV: bool; the token occurs in the prompt or the output. Present with repetition_R.
        counts_RV: int32; occurrences in the output. Present with presence_R or frequency_R.
        token_ids_V: int32; the id of each column of the logits, whose noise the draw takes, rising;
            None: ids are the columns. For a draft model with a part of the target's vocabulary.
            `Sampled.tokens_R` are columns in either case.
        bias: (row int64 [N], token int64 [N], value float32 [N]): added to the logits; a value of
            -inf bans the token.
        allowed_RW: int32; a bit for each token, the lowest bit of the first word for token 0; a bit
            that is 0 bans the token. `num_mask_words` words a row; bits past the vocabulary have no
            meaning.
        num_logprobs: number of top log-probabilities to return; -1 for no log-probabilities, 0 for
            the sampled token alone.
        all_greedy: all rows have temperature 0 (known on the host, to skip the draw).
    """

    temperature_R: Tensor
    top_k_R: Tensor
    top_p_R: Tensor
    min_p_R: Tensor
    seed_R: Tensor
    position_R: Tensor
    repetition_R: Tensor | None = None
    presence_R: Tensor | None = None
    frequency_R: Tensor | None = None
    seen_RV: Tensor | None = None
    counts_RV: Tensor | None = None
    token_ids_V: Tensor | None = None
    bias: tuple[Tensor, Tensor, Tensor] | None = None
    allowed_RW: Tensor | None = None
    num_logprobs: int = -1
    all_greedy: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampled:
    """Result of a draw.

    Attributes:
        tokens_R: int32.
        logprobs_R: float32, log-probabilities of the sampled tokens by the raw logits (before
            penalties, bias and temperature); None unless requested.
        top_tokens_RN: int32, by falling log-probability; None unless requested.
        top_logprobs_RN: float32; None unless requested.
    """

    tokens_R: Tensor
    logprobs_R: Tensor | None = None
    top_tokens_RN: Tensor | None = None
    top_logprobs_RN: Tensor | None = None
