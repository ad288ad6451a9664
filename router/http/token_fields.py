"""Fields of completions that show token ids and the version of the weights.

Knows names of fields, as OpenAI and vLLM define them; knows nothing of sending.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from arriero.router.http.request_schemas import Sampling
from arriero.router.proto.arriero.v1 import inference_pb2 as pb

FINGERPRINT_DIGITS = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenFields:
    """What an answer shows of its tokens.

    Attributes:
        ids: token ids of prompt and output.
        as_ids: tokens of log-probabilities as `token_id:N`.
    """

    ids: bool = False
    as_ids: bool = False

    @classmethod
    def of(cls, body: Sampling) -> TokenFields:
        """The wishes of a body."""
        return cls(ids=body.return_token_ids, as_ids=body.return_tokens_as_token_ids)


def fingerprint(weights: str) -> dict[str, Any]:
    """The field `system_fingerprint`: the first digits of the digest of the weights.

    Args:
        weights: `Start.weights` of an answer; "" gives no field.
    """
    if not weights:
        return {}
    return {"system_fingerprint": f"fp_{weights.partition(' ')[0][:FINGERPRINT_DIGITS]}"}


def whole_fingerprint(starts: list[pb.Start]) -> dict[str, Any]:
    """The field of an answer to several prompts: of each version that answered one, by "+"."""
    each = [fingerprint(start.weights) for start in starts]
    names = dict.fromkeys(field["system_fingerprint"] for field in each if field)
    return {"system_fingerprint": "+".join(names)} if names else {}
