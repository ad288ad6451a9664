"""One request and its samples, as the scheduler sees them.

Knows tokens, limits and order of precedence; knows nothing of steps, slots' arrays or blocks.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from arriero.shards.config.sampling_params import SamplingParams
from arriero.shards.engine.types import EngineRequest, TokenLogprobs
from arriero.shards.images.request import key_tokens, placeholders
from arriero.shards.protocol.step_plan import Int32, NewSequence, int32

_MASK64 = 2**64 - 1

Rank = tuple[int, int, int]
"""Order of precedence: (priority, arrival, sample); the smallest goes first."""


def sample_seed(seed: int, index: int) -> int:
    """Seed of sample `index`: the request's own for 0, else SplitMix64's output, its low 63 bits.

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
        request: as it came.
        arrival: counts requests up.
        params: the request's, for short.
        live: indices of the samples that have not ended, in order.
        sequences: those of them that exist; samples past the first begin once its prompt is in.
        anchor: owner of the blocks that keep the full prompt blocks alive for the samples that
            have not begun, or None.
        num_unborn: samples that have not entered a slot yet.
    """

    def __init__(self, request: EngineRequest, arrival: int) -> None:
        self.request = request
        self.arrival = arrival
        self.params: SamplingParams = request.params
        self.live: dict[int, None] = dict.fromkeys(range(request.params.n))
        self.sequences: dict[int, Sequence] = {}
        self.anchor: int | None = None
        self.num_unborn = request.params.n
        self._keyed: npt.NDArray[np.int32] | None = None

    def keyed(self, image_token: int | None) -> npt.NDArray[np.int32] | None:
        """The prompt as block keys see it, where it has images; None where they see it as it is."""
        images = self.request.images
        if not images or image_token is None:
            return None
        if self._keyed is None:
            self._keyed = key_tokens(self.request.prompt, images, image_token)
        return self._keyed

    @cached_property
    def stop_tokens(self) -> frozenset[int]:
        """The request's own stop tokens."""
        return frozenset(self.params.stop_token_ids)


@dataclass(slots=True, eq=False)
class Sequence:
    """One sample: its tokens so far, and where it stands.

    Attributes:
        live: the request it belongs to.
        request_id: of that request.
        index: which of its samples.
        owner: names its block table; a new one for every sequence.
        rank: order of precedence.
        tokens: prompt and output known so far (those in flight are not).
        num_prompt: how many of them are the prompt's.
        limit: most tokens, prompt and output together.
        slot: the slot it is in, or -1 while it waits.
        keys: keys of its leading full blocks, as far as they were worked out.
        num_stored: how many leading blocks of its table have been offered to the cache.
        num_cached: prompt tokens found in the prefix cache when it first began.
        searched: lower tiers were asked for its prefix since it began to wait.
        begun: it has been in a slot.
        started: its first output is out.
        prompt_rows: log-probabilities of prompt tokens gathered so far.
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
    begun: bool = False
    started: bool = False
    prompt_rows: list[TokenLogprobs] = field(default_factory=list)

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
    def wants_prompt_rows(self) -> bool:
        """Prompt log-probabilities are asked for, and not out yet."""
        return self.index == 0 and self.live.params.prompt_logprobs is not None and not self.started

    def window(self, start: int, end: int) -> npt.NDArray[np.int32]:
        """A copy of tokens start .. end - 1, int32."""
        return int32(self.tokens[start:end])

    def prompt_next(self, start: int, end: int) -> Int32:
        """The prompt token after each of positions start .. end - 1; -1 past the prompt."""
        following = np.full(end - start, -1, dtype=np.int32)
        known = self.window(start + 1, min(end + 1, self.num_prompt))
        following[: len(known)] = known
        return following

    def to_new(self, eos_token_ids: tuple[int, ...], image_token: int | None = None) -> NewSequence:
        """What the slices must know of it as it enters its slot."""
        params, images = self.live.params, self.live.request.images
        places = int32()
        if images and image_token is not None:
            places = placeholders(self.live.request.prompt, image_token)
        assert params.seed is not None, "seed is checked to be set"
        counted = params.has_penalties
        replayed = counted or params.grammar
        ends = () if params.ignore_eos else eos_token_ids
        return NewSequence(
            slot=self.slot,
            params=replace(params, seed=sample_seed(params.seed, self.index)).to_wire(),
            stop_tokens=tuple(dict.fromkeys((*params.stop_token_ids, *ends))),
            prompt=self.window(0, self.num_prompt if counted else 0),
            output=self.window(self.num_prompt, len(self.tokens)) if replayed else int32(),
            num_prompt=self.num_prompt,
            num_output=len(self.tokens) - self.num_prompt,
            images=tuple(one.data for one in images),
            image_sizes=tuple(one.num_features for one in images),
            image_positions=places,
        )
