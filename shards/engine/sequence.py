"""One request and its samples, from the scheduler's view.

Knows tokens, limits and order of precedence; knows nothing of steps, slot arrays or blocks.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from arriero.shards.config.priorities import BACKGROUND_PRIORITY
from arriero.shards.config.sampling_params import SamplingParams
from arriero.shards.engine.types import EngineConfig, EngineRequest, TokenLogprobs
from arriero.shards.images.request import key_tokens, placeholders
from arriero.shards.protocol.step_plan import Int32, NewSequence, int32

if TYPE_CHECKING:
    from arriero.shards.engine.speculation.speculation import Drafting

_MASK64 = 2**64 - 1

Rank = tuple[int, int, int]
"""Order of precedence: (priority, arrival, sample); the smallest goes first."""


def sample_seed(seed: int, index: int) -> int:
    """Seed of sample `index`: the request's for 0, else the low 63 bits of SplitMix64's output.

    Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators" (OOPSLA 2014).
    """
    if index == 0:
        return seed
    z = (seed + index * 0x9E3779B97F4A7C15) & _MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
    return (z ^ (z >> 31)) & (2**63 - 1)


class LiveRequest:
    """A request between `add` and its last output.

    Attributes:
        request: request as received.
        arrival: number of the request in order of arrival.
        params: sampling parameters of the request.
        live: indices of the samples that have not ended, in order.
        sequences: existing sequences of live samples; samples after the first begin once the
            prompt is computed.
        anchor: owner of the blocks that keep the full prompt blocks for samples that have not
            entered a slot, or None.
        num_not_entered: samples that have not entered a slot yet.
    """

    def __init__(self, request: EngineRequest, arrival: int) -> None:
        self.request = request
        self.arrival = arrival
        self.params: SamplingParams = request.params
        self.live: dict[int, None] = dict.fromkeys(range(request.params.n))
        self.sequences: dict[int, Sequence] = {}
        self.anchor: int | None = None
        self.num_not_entered = request.params.n
        self._key_tokens: npt.NDArray[np.int32] | None = None

    def key_tokens_of(self, image_token: int | None) -> npt.NDArray[np.int32] | None:
        """The prompt as hashed into block keys, if the prompt has images; None otherwise."""
        images = self.request.images
        if not images or image_token is None:
            return None
        if self._key_tokens is None:
            self._key_tokens = key_tokens(self.request.prompt, images, image_token)
        return self._key_tokens

    @property
    def started(self) -> bool:
        """Whether a sample has left the queue, or continues tokens from elsewhere."""
        if self.request.resumed or len(self.live) < self.params.n or len(self.sequences) > 1:
            return True
        return any(each.slot >= 0 or each.has_output for each in self.sequences.values())

    @cached_property
    def stop_tokens(self) -> frozenset[int]:
        """The request's own stop tokens."""
        return frozenset(self.params.stop_token_ids)


@dataclass(slots=True, eq=False)
class Sequence:
    """One sample: tokens so far and state.

    Attributes:
        live: request of the sample.
        request_id: id of that request.
        index: index of the sample.
        owner: name of the sequence's block table; new for every sequence.
        rank: order of precedence.
        tokens: known prompt and output tokens (without tokens in flight).
        num_prompt: number of prompt tokens.
        limit: most tokens, prompt and output together.
        slot: slot of the sequence, or -1 while waiting.
        keys: keys of the leading full blocks, as far as computed.
        num_stored: leading blocks that were offered to the cache.
        num_cached: prompt tokens in the prefix cache at the first entry into a slot.
        searched: whether lower tiers were searched for the prefix since the wait began.
        has_entered: whether the sequence has been in a slot.
        has_output: whether the first output was sent.
        prompt_rows: log-probabilities of prompt tokens so far.
        drafting: state of speculative decoding; None until the first output, or without drafts.
        drafts_off: whether the sequence never drafts.
    """

    live: LiveRequest
    request_id: str
    index: int
    owner: int
    rank: Rank
    tokens: array[int]
    num_prompt: int
    limit: int
    slot: int = -1
    keys: list[bytes] = field(default_factory=list)
    num_stored: int = 0
    num_cached: int = 0
    searched: bool = False
    has_entered: bool = False
    has_output: bool = False
    prompt_rows: list[TokenLogprobs] = field(default_factory=list)
    drafting: Drafting | None = None
    drafts_off: bool = False

    @property
    def is_background(self) -> bool:
        """Whether the sequence runs on what interactive requests leave free."""
        return self.rank[0] >= BACKGROUND_PRIORITY

    @classmethod
    def of(cls, live: LiveRequest, index: int, owner: int) -> Sequence:
        """Sample `index` of a request."""
        request = live.request
        assert request.params.max_tokens is not None, "max_tokens is checked to be set"
        return cls(
            live=live,
            request_id=request.request_id,
            index=index,
            owner=owner,
            rank=(request.priority, live.arrival, index),
            tokens=array("i", request.prompt + request.resumed),
            num_prompt=len(request.prompt),
            limit=len(request.prompt) + request.params.max_tokens,
        )

    @property
    def adapter(self) -> str:
        """Digest of the request's adapter; "" for the base model."""
        return self.live.request.adapter

    @property
    def wants_prompt_rows(self) -> bool:
        """Whether prompt log-probabilities are requested and not sent yet."""
        requested = self.index == 0 and self.live.params.prompt_logprobs is not None
        return requested and not self.has_output

    def window(self, start: int, end: int) -> npt.NDArray[np.int32]:
        """A copy of tokens start .. end - 1, int32."""
        return int32(self.tokens[start:end])

    def prompt_next(self, start: int, end: int) -> Int32:
        """The prompt token after each of positions start .. end - 1; -1 past the prompt."""
        following = np.full(end - start, -1, dtype=np.int32)
        known = self.window(start + 1, min(end + 1, self.num_prompt))
        following[: len(known)] = known
        return following

    def to_new(self, config: EngineConfig, adapter: int) -> NewSequence:
        """The slices' description of the sequence, as it enters its slot.

        Args:
            config: limits of the engine.
            adapter: slot of the adapter; -1 for the base model.
        """
        eos_token_ids, image_token = config.eos_token_ids, config.image_token
        params, images = self.live.params, self.live.request.images
        positions = int32()
        if images and image_token is not None:
            positions = placeholders(self.live.request.prompt, image_token)
        assert params.seed is not None, "seed is checked to be set"
        has_penalties = params.has_penalties
        needs_output = has_penalties or params.grammar
        ends = () if params.ignore_eos else eos_token_ids
        return NewSequence(
            slot=self.slot,
            params=replace(params, seed=sample_seed(params.seed, self.index)),
            stop_tokens=tuple(dict.fromkeys((*params.stop_token_ids, *ends))),
            prompt=self.window(0, self.num_prompt if has_penalties else 0),
            output=self.window(self.num_prompt, len(self.tokens)) if needs_output else int32(),
            num_prompt=self.num_prompt,
            num_output=len(self.tokens) - self.num_prompt,
            images=tuple(image.data for image in images),
            image_sizes=tuple(image.num_features for image in images),
            image_positions=positions,
            adapter=adapter,
        )
