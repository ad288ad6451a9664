"""Messages between leader and slices: step plans out, step results back.

A plan holds only what changed: the slices keep each sequence's block table, sampling parameters
and last sampled token in a *slot* (a small integer that the leader hands out).

Knows the contents of a message; knows nothing of its bytes (see `wire`), or of how a plan is made
or run.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from arriero.shards.config.sampling_params import SamplingParams
from arriero.shards.protocol.adapters import SlotChange

Int32 = npt.NDArray[np.int32]

LAST_SAMPLED = -1
"""Value in `StepPlan.tokens`: the last sampled token of the slot, known to the slices alone."""


def int32(values: npt.ArrayLike = ()) -> Int32:
    """An int32 array of `values`."""
    return np.asarray(values, dtype=np.int32)


@dataclass(kw_only=True, slots=True)
class NewSequence:
    """A sequence that enters a slot (for the first time, or again after pre-emption).

    Attributes:
        slot: slot of the sequence, free until now.
        params: sampling parameters, with `seed` always set, to the seed of this sample.
        stop_tokens: tokens banned before `min_tokens`: those of the request and of the model.
        prompt: tokens of the prompt; empty unless the sampler counts tokens (penalties).
        output: tokens emitted so far; empty unless the sampler counts tokens or a grammar is set.
        num_prompt: number of prompt tokens.
        num_output: output tokens emitted so far (not 0 after pre-emption or a resumed stream).
        images: image files, in order of the prompt.
        image_sizes: number of features of each image.
        image_positions: prompt positions that take the image features.
        adapter: slot of the request's adapter; -1 for the base model.
    """

    slot: int
    params: SamplingParams
    stop_tokens: tuple[int, ...] = ()
    prompt: Int32 = field(default_factory=int32)
    output: Int32 = field(default_factory=int32)
    num_prompt: int
    num_output: int = 0
    images: tuple[bytes, ...] = ()
    image_sizes: tuple[int, ...] = ()
    image_positions: Int32 = field(default_factory=int32)
    adapter: int = -1


@dataclass(kw_only=True, slots=True)
class StepPlan:
    """One step. S sequences take part, in this order; T is the total number of tokens.

    Attributes:
        step: step number, from 0.
        freed: slots that are free from now on (applied first).
        new: sequences that enter slots (applied second).
        block_slots, block_index, block_ids: three arrays of one length: entry `block_index` of
            the slot's block table becomes `block_ids` (applied third).
        slots: [S] slot of each sequence.
        starts: [S] position of each sequence's first token in this step.
        counts: [S] number of tokens of each sequence in this step.
        tokens: [T] token ids; `LAST_SAMPLED` where only the slices know the token.
        samples: [S] number of last positions after which a token is drawn: 0 inside a prompt, 1
            for a decode, n + 1 where the last n tokens of the row are drafted. A draw counts if
            all drafted tokens before it equal the draws before them; see `verification`.
        prompt_rows: [S] 1 where log-probabilities of this step's prompt tokens are requested
            (predictions of positions starts + 1 .. starts + counts inside the prompt), else 0.
        prompt_next: [sum of counts over prompt_rows] the prompt token that follows each row, or
            -1 after the last prompt token.
        local_slots, local_index, local_ids: as `block_slots` and so on, for the table of the
            layers with chunked attention; entries before the chunk of a sequence's first
            token of this step are not used again.
        placement_layer: layer with a new expert placement before this step; -1 for none.
        placement: expert in each expert slot of that layer's stage, rank by rank.
        dp_rank: data-parallel rank that runs the plan; each rank has plans of its own, one a step.
        decodes: most tokens of a data-parallel rank in a step in which all ranks decode or have no
            tokens, the same number on all ranks; 0 in other steps, and without data-parallel
            ranks.
        same_rows: whether the rows equal those of the rank's last plan, all decodes, each
            sequence one token further.
        adapters: adapters that enter slots of the device before the rows run; see `adapters`.
        draft_lengths: [S] number of tokens that the slices shall draft after each row's last
            emitted token; empty for none. Needs a drafter on the slices.
    """

    step: int
    freed: Int32
    new: list[NewSequence]
    block_slots: Int32
    block_index: Int32
    block_ids: Int32
    slots: Int32
    starts: Int32
    counts: Int32
    tokens: Int32
    samples: Int32
    prompt_rows: Int32 = field(default_factory=int32)
    prompt_next: Int32 = field(default_factory=int32)
    local_slots: Int32 = field(default_factory=int32)
    local_index: Int32 = field(default_factory=int32)
    local_ids: Int32 = field(default_factory=int32)
    placement_layer: int = -1
    placement: Int32 = field(default_factory=int32)
    dp_rank: int = 0
    decodes: int = 0
    same_rows: bool = False
    draft_lengths: Int32 = field(default_factory=int32)
    adapters: list[SlotChange] = field(default_factory=list)


@dataclass(kw_only=True, slots=True)
class Logprobs:
    """Log-probabilities of some rows; top lists are cut to the batch's largest request.

    Attributes:
        chosen: float32 [R].
        top_tokens: int32 [R, N], by falling log-probability.
        top: float32 [R, N].
    """

    chosen: npt.NDArray[np.float32]
    top_tokens: Int32
    top: npt.NDArray[np.float32]


@dataclass(kw_only=True, slots=True)
class StepResult:
    """Result of one step.

    Attributes:
        step: number of the step.
        tokens: [R] drawn tokens, as many for each row as the plan's `samples` says, in order;
            those after the first wrong drafted token of a row are void.
        logprobs: log-probabilities of the sampled tokens; None without a request for them.
        prompt_logprobs: one row for each entry of `prompt_next`; None without a request for them.
        elapsed_us: microseconds that the sampling slice spent in the step.
        dp_rank: data-parallel rank of the plan.
        drafts: [S', k] tokens that the slices drafted after each row with draws, -1 where there is
            none; None without a drafter.
        draft_us: microseconds of `elapsed_us` that the drafts took.
    """

    step: int
    tokens: Int32
    logprobs: Logprobs | None = None
    prompt_logprobs: Logprobs | None = None
    elapsed_us: int = 0
    dp_rank: int = 0
    drafts: Int32 | None = None
    draft_us: int = 0
