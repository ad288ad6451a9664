"""What goes into the engine and what comes out: token ids only, never text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from arriero.kernels.attention_mask import AttentionMaskSpec
from arriero.shards.config.sampling_params import SamplingParams
from arriero.shards.images.request import RequestImage
from arriero.shards.kv.limits import GroupTierLimits, PeerBlocks
from arriero.shards.kv.paging import SeenBlocks
from arriero.shards.kv.transfers import Pool, TransferBatch, TransferResult
from arriero.shards.layout.expert_placement import ExpertPlacement
from arriero.shards.protocol.step_plan import StepPlan, StepResult


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """Limits of one group's engine.

    Attributes:
        max_model_len: most tokens of a sequence, prompt and output together.
        block_size: tokens in a KV block.
        num_blocks: KV blocks of the pool, the same on every slice; of each dp rank.
        attention_chunk: tokens of a chunk, where some layers attend within theirs only and have a
            pool of their own; 0 for none. A multiple of `block_size`.
        num_local_blocks: KV blocks of that pool.
        attention_window: last tokens that a token sees, itself among them, where all layers have
            such a window: sequences then hold blocks of these alone; 0 for none.
        attention_sinks: first tokens that it sees besides.
        max_sequences: most sequences in slots at once.
        max_batch_tokens: the token budget of a step; prefill is cut into chunks to fit.
        max_queued: most requests that wait; one more is refused with `Overloaded`.
        prefix_cache: find and keep prefix blocks.
        pipeline_depth: most steps in flight (2 hides the plan's making behind the step before;
            more with pipeline stages: one micro-batch a stage).
        num_lanes: data-parallel ranks, each with slots, blocks and a step's tokens of its own.
        experts: how the experts of each layer lie over the ranks of a stage, where they are
            exchanged; None elsewhere.
        move_experts: whether the leader moves them as the load asks.
        vocab_size: token ids run below it.
        eos_token_ids: the model's own end tokens.
        image_token: the placeholder that images' features replace; None for a text model.
        max_images: of a request.
        cache_salt: digest of model and revision; the root of every block's key.
        tiers: of the KV cache below the device; each lane's own.
    """

    max_model_len: int
    block_size: int = 16
    num_blocks: int
    attention_chunk: int = 0
    num_local_blocks: int = 0
    attention_window: int = 0
    attention_sinks: int = 0
    max_sequences: int = 256
    max_batch_tokens: int = 2048
    max_queued: int = 4096
    prefix_cache: bool = True
    pipeline_depth: int = 2
    num_stages: int = 1
    num_lanes: int = 1
    experts: ExpertPlacement | None = None
    move_experts: bool = False
    vocab_size: int
    eos_token_ids: tuple[int, ...] = ()
    image_token: int | None = None
    max_images: int = 8
    cache_salt: bytes = b""
    tiers: GroupTierLimits = field(default_factory=GroupTierLimits)

    @property
    def seen_blocks(self) -> SeenBlocks:
        """Which blocks a token sees in layers that do not see everything, where there are any."""
        visible = AttentionMaskSpec(
            chunk_size=self.attention_chunk,
            window=self.attention_window,
            sinks=self.attention_sinks,
        )
        return SeenBlocks(visible, self.block_size)


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineRequest:
    """One request, checked at the edge, seed set.

    Attributes:
        request_id: unique in the engine while it runs.
        prompt: token ids, at least one.
        params: sampling parameters; `seed` and `max_tokens` are set.
        priority: lower goes first; equal ones by arrival.
        resumed: output tokens emitted elsewhere before (a resumed stream); they count as output
            for penalties, `max_tokens`, `min_tokens` and the draw's position. Only with n = 1.
        cache_salt: joins the keys of this request's blocks, to keep tenants' caches apart.
        tenant: whose it is; its blocks are counted as that tenant's.
        trace: W3C `traceparent` of the caller's span, carried along; "" for none.
        images: files whose features replace the prompt's placeholders, in order.
        peer: blocks of its prefix that another group has in host memory, by pool.
    """

    request_id: str
    prompt: tuple[int, ...]
    params: SamplingParams
    priority: int = 0
    resumed: tuple[int, ...] = ()
    cache_salt: bytes = b""
    tenant: str = ""
    trace: str = ""
    images: tuple[RequestImage, ...] = ()
    peer: Mapping[Pool, PeerBlocks] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenLogprobs:
    """Log-probability of a token and of the likeliest alternatives."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(kw_only=True, slots=True)
class SequenceOutput:
    """What one step gave for one sample of one request; read-only once it is out.

    One is made for each token, and a frozen dataclass costs three times as much to make.

    Attributes:
        request_id, index: the request, and which of its n samples.
        tokens: new output tokens, in order (a stop token is among them).
        logprobs: one for each token, when asked for.
        prompt_logprobs: once, on the first output of sample 0, when asked for: entry i is of
            prompt token i + 1.
        finish_reason: "stop" (a stop or end token), "length", "cancelled", "error" (its own),
            "lost" (its group failed or stopped; another may go on), or None while it runs.
        stop_token: the token that stopped it.
        error: words for the caller, with finish_reason "error" or "lost".
        num_cached: prompt tokens found in the prefix cache (on the first output).
    """

    request_id: str
    index: int
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None
    finish_reason: str | None = None
    stop_token: int | None = None
    error: str | None = None
    num_cached: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineStats:
    """A snapshot of the engine's load.

    `expert_loads` has the tokens that each expert was sent since the start, by layer;
    `expert_imbalance` is the largest rank's over the mean, 1 being even; `expert_moves` counts
    changed placements. Only where experts are exchanged between ranks. `tiers` has blocks by tier
    below the device, and what was moved since the start; empty without tiers.
    """

    num_waiting: int = 0
    num_running: int = 0
    blocks_used: int = 0
    blocks_cached: int = 0
    blocks_total: int = 0
    local_blocks_used: int = 0
    local_blocks_total: int = 0
    steps: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    preemptions: int = 0
    expert_moves: int = 0
    expert_imbalance: float = 1.0
    expert_loads: dict[str, list[int]] = field(default_factory=dict)
    step_us: dict[str, float] = field(default_factory=dict)
    tiers: dict[str, int] = field(default_factory=dict)


class Executor(Protocol):
    """Runs plans on the slices of the group, in order; copies of KV blocks beside them.

    `submit` returns at once; `collect` waits for the oldest result not yet collected, and raises
    `GroupFailed` with the first cause when a slice is lost.
    """

    def submit(self, plan: StepPlan) -> None:
        """Send a plan to every slice of its lane."""

    def collect(self, timeout_s: float | None = None) -> StepResult | None:
        """Result of the oldest plan outstanding, or None at the time limit."""

    def take_loads(self) -> Mapping[int, npt.NDArray[np.int64]]:
        """Tokens that each expert was sent since the last call, by layer, as far as is known."""

    def move(self, moves: TransferBatch) -> None:
        """Send copies of blocks to every slice, which takes them up after the plans sent before."""

    def moved(self, timeout_s: float = 0.0) -> list[TransferResult]:
        """What slices said of copies since the last call; waits for the first until the limit."""

    def close(self) -> None:
        """Stop the slices; safe to call twice."""
