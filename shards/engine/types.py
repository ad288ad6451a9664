"""Inputs and outputs of the engine: token ids only, never text."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from arriero.kernels.attention_mask import AttentionMaskSpec
from arriero.shards.config.adapters import AdapterSlots
from arriero.shards.config.sampling_params import SamplingParams
from arriero.shards.config.speculation import SpeculationConfig
from arriero.shards.images.request import RequestImage
from arriero.shards.kv.limits import GroupTierLimits, PeerBlocks
from arriero.shards.kv.paging import SeenBlocks
from arriero.shards.kv.retention import CacheHint
from arriero.shards.kv.transfers import Pool, TransferBatch, TransferResult
from arriero.shards.layout.expert_placement import ExpertPlacement
from arriero.shards.protocol.adapters import AdapterBatch, AdapterResult
from arriero.shards.protocol.step_plan import StepPlan, StepResult
from arriero.shards.protocol.weights import WeightsCommand, WeightsResult


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """Limits of one group's engine.

    Attributes:
        max_model_len: most tokens of a sequence, prompt and output together.
        block_size: tokens in a KV block.
        num_blocks: KV blocks of each data-parallel rank, the same on every slice.
        attention_chunk: tokens of an attention chunk; layers with chunked attention have a pool
            of their own. A multiple of `block_size`; 0 for none.
        num_local_blocks: KV blocks of that pool.
        attention_window: tokens that a token sees, itself included, if all layers have a window:
            sequences then keep the blocks of the window alone; 0 for none.
        attention_sinks: first tokens that every token sees besides the window.
        max_sequences: most sequences in slots at the same time.
        max_batch_tokens: token budget of a step; prefill is cut into chunks to fit.
        max_queued: most waiting requests; the next request is refused with `Overloaded`.
        prefix_cache: whether prefix blocks are cached and shared.
        pipeline_depth: most steps in flight (2 hides the scheduling time behind the last step;
            more with pipeline stages: one micro-batch a stage).
        num_stages: pipeline stages.
        num_dp_ranks: data-parallel ranks; slots, blocks and tokens of a step count for each rank.
        experts: placement of each layer's experts over the ranks of a stage; None without
            expert parallelism.
        move_experts: whether the leader moves experts according to their load.
        vocab_size: number of token ids.
        eos_token_ids: end tokens of the model.
        image_token: placeholder token of image features; None for a text model.
        max_images: most images of a request.
        cache_salt: digest of model and revision; the root of every block's key.
        tiers: KV cache tiers below the device, for each data-parallel rank.
        adapters: digests of the group's listed LoRA adapters, in order of their slots.
        adapter_paths: folder of each listed adapter.
        adapter_slots: room for adapters that come and go; None for the listed adapters alone.
        num_ranks: slices of a data-parallel rank.
        speculation: how tokens are drafted; changes no token.
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
    num_dp_ranks: int = 1
    experts: ExpertPlacement | None = None
    move_experts: bool = False
    vocab_size: int
    eos_token_ids: tuple[int, ...] = ()
    image_token: int | None = None
    max_images: int = 8
    cache_salt: bytes = b""
    tiers: GroupTierLimits = field(default_factory=GroupTierLimits)
    adapters: tuple[str, ...] = ()
    adapter_paths: tuple[str, ...] = ()
    adapter_slots: AdapterSlots | None = None
    num_ranks: int = 1
    speculation: SpeculationConfig = field(default_factory=SpeculationConfig)

    @property
    def seen_blocks(self) -> SeenBlocks:
        """Blocks that a token sees in layers without full attention."""
        visible = AttentionMaskSpec(
            chunk_size=self.attention_chunk,
            window=self.attention_window,
            sinks=self.attention_sinks,
        )
        return SeenBlocks(visible, self.block_size)


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineRequest:
    """One request, checked by the caller, with its seed set.

    Attributes:
        request_id: unique in the engine while it runs.
        prompt: token ids, at least one.
        params: sampling parameters; `seed` and `max_tokens` are set.
        priority: lower goes first; equal priorities go by arrival.
        resumed: output tokens emitted elsewhere before (a resumed stream); they count as output
            for penalties, `max_tokens`, `min_tokens` and the sampling position. Only with n = 1.
        cache_salt: part of the keys of this request's blocks, to separate tenants' caches.
        tenant: tenant of the request, for counting its blocks.
        trace: W3C `traceparent` of the caller's span; "" for none.
        images: image files that replace the prompt's placeholders, in order.
        speculation: kind of drafts if not the group's: "off", or "ngram" in a group with "suffix".
        prediction: tokens that the client expects as output; drafts are copied from them.
        peer: blocks of the prefix in another group's host memory, by pool.
        adapter: digest of the LoRA adapter; "" for the base model.
        hint: tokens that will be needed again; None for no hint.
        weights: digest of the weights that gave the tokens of `resumed`; "" for any. A group that
            serves others ends the request as lost.
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
    speculation: str = ""
    prediction: tuple[int, ...] = ()
    peer: Mapping[Pool, PeerBlocks] = field(default_factory=dict)
    hint: CacheHint | None = None
    adapter: str = ""
    weights: str = ""

    @property
    def key_salt(self) -> bytes:
        """Salt of the keys of this request's blocks: of tenant, caller and adapter."""
        if not self.adapter:
            return self.cache_salt
        return hashlib.sha256(f"adapter {self.adapter} ".encode() + self.cache_salt).digest()


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenLogprobs:
    """Log-probability of a token and of the most likely alternatives."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(kw_only=True, slots=True)
class SequenceOutput:
    """Output of one step for one sample of one request; read-only once sent.

    Not frozen: the engine makes an output for each token, and a frozen dataclass costs three times
    as much to make.

    Attributes:
        request_id, index: request, and index of the sample.
        tokens: new output tokens, in order (a stop token included).
        logprobs: log-probabilities of each token, if requested.
        prompt_logprobs: on the first output of sample 0 only, if requested: entry i is of
            prompt token i + 1.
        finish_reason: "stop" (a stop or end token), "length", "cancelled", "error" (its own),
            "lost" (the group failed or stopped; another group may continue), or None while the
            sample runs.
        stop_token: token that stopped the sample.
        error: text for the caller, with finish_reason "error" or "lost".
        num_cached: prompt tokens in the prefix cache (on the first output).
        num_drafted: drafted tokens that the step verified.
        num_accepted: those of them that are among `tokens`.
        weights: name of the weights that gave the tokens; set by a gateway's end of the link.
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
    num_drafted: int = 0
    num_accepted: int = 0
    weights: str = ""


def ends_of(
    request_id: str, indices: Iterable[int], reason: str, error: str | None
) -> list[SequenceOutput]:
    """The last outputs of samples that end without a token; see `SequenceOutput`."""
    return [
        SequenceOutput(request_id=request_id, index=index, finish_reason=reason, error=error)
        for index in indices
    ]


class Executor(Protocol):
    """Runs plans on the slices of the group, in order, and transfers of KV blocks beside them.

    `submit` returns at once; `collect` waits for the oldest result not yet collected, and raises
    `GroupFailed` with the first cause when a slice is lost.
    """

    def submit(self, plan: StepPlan) -> None:
        """Send a plan to every slice of the plan's data-parallel rank."""

    def collect(self, timeout_s: float | None = None) -> StepResult | None:
        """Result of the oldest outstanding plan, or None at the time limit."""

    def take_loads(self) -> Mapping[int, npt.NDArray[np.int64]]:
        """Tokens sent to each expert since the last call, by layer, as far as reported."""

    def transfer(self, batch: TransferBatch) -> None:
        """Send transfers of blocks; every slice starts them after the plans sent before."""

    def collect_transfers(self, timeout_s: float = 0.0) -> list[TransferResult]:
        """Transfer results since the last call; waits for the first until the time limit."""

    def change_adapters(self, batch: AdapterBatch) -> None:
        """Send loads and drops of adapters; every slice makes them after the plans sent before."""

    def collect_adapters(self, timeout_s: float = 0.0) -> list[AdapterResult]:
        """Ends of loads since the last call; waits for the first until the time limit."""

    def change_weights(self, command: WeightsCommand) -> None:
        """Send a command on weights; every slice runs it after the plans sent before."""

    def collect_weights(self, timeout_s: float = 0.0) -> list[WeightsResult]:
        """Ends of commands since the last call; waits for the first until the time limit."""

    def close(self) -> None:
        """Stop the slices; safe to call twice."""
