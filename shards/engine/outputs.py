"""From rows of a step's result to log-probabilities as a caller reads them."""

from __future__ import annotations

from arriero.shards.engine.types import TokenLogprobs
from arriero.shards.plan import Logprobs


def token_logprobs(rows: Logprobs, row: int, token: int, num_top: int) -> TokenLogprobs:
    """Row `row` for `token`, with its `num_top` likeliest alternatives."""
    tokens = rows.top_tokens[row, :num_top].tolist()
    values = rows.top[row, :num_top].tolist()
    return TokenLogprobs(
        token=token,
        logprob=float(rows.chosen[row]),
        top=tuple(zip(tokens, values, strict=True)),
    )
