"""Settings of one replica group: the model, its partition and its limits.

Knows numbers and paths; `cluster/` knows where the slices run.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from arriero.shards.config.adapters import AdapterFile, AdapterSlots
from arriero.shards.config.kv_tiers import TierConfig
from arriero.shards.config.parallel import ParallelConfig
from arriero.shards.config.speculation import SpeculationConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupConfig(ParallelConfig):
    """One replica group: its mesh, as in `ParallelConfig`, its model and its limits.

    Attributes:
        model_path: folder with config.json, safetensors and tokenizer.json, on every node; or an
            fsspec URL of such a folder: each node fetches, once, the files that its ranks read.
        weights: folders and files whose tensors replace those of the model folder, in order; from
            `arriero weights push`.
        dtype: type of weights and KV cache: "float32", "bfloat16", "float16".
        kv_dtype: type of the KV cache: "int8" (with a float32 scale for each head and token), or
            "fp8" (e4m3, with the checkpoint's scales, see `scales_kv`); None means `dtype`.
        quantization: quantization of the weights on loading: "int8" (per row), "int4" (groups of
            32 columns, the vocabulary in int8) or "fp8" (per row); None keeps `dtype`.
            Activations, cache and norms have `dtype` in any case, but for `activation_dtype`.
        activation_dtype: "int8": inputs of int8 and int4 weights are rounded to int8, with a scale
            for each row and 32 inputs (backend "cpu" alone): faster, with other answers; None for
            no rounding.
        expert_wire: format of rows sent to experts on other ranks: "float32", "bfloat16", or "fp8"
            (with a scale for each row; results return in bfloat16); None means `dtype`.
        spare_experts: slots of each slice, in each layer, for second copies of experts with a high
            load; with spare slots, experts move according to the load (needs `dp` > 1).
        device: "cpu" or "cuda".
        kernels: name of a backend; None picks the best for the device.
        batch_independent: whether each row is bitwise independent of the other rows of its batch,
            even at a cost of speed: backend "triton" then avoids the vendor's matmuls, whose order
            of sums depends on the batch. "cpu" does so at no cost; "reference" cannot.
        threads: CPU threads of each slice; None divides the node's cores among its slices.
        block_size: tokens in a KV block.
        kv_bytes: bytes of the KV pool of the whole group; None takes what GPUs leave beside
            weights, graphs and a step, or on CPUs 2 GiB, at most a quarter of memory.
        num_blocks: KV blocks of each dp rank, instead of `kv_bytes`.
        num_local_blocks: KV blocks of layers with chunked attention, which have a pool of their
            own; None divides `kv_bytes` between the pools.
        offload_layers: last layers of each stage whose weights stay on disk, mapped, and are read
            ahead of use (backend "cpu" alone). In a mixture of experts only the routed experts:
            the experts that a step needs are read, and unused experts leave memory.
        offload_folder: folder of these weights; None means the system's temporary folder.
        packed_cache_bytes: disk space of each node for packed weights, from which a later start
            reads (backend "cpu" alone); 0 keeps none.
        max_model_len: most tokens of a sequence; None means the model's own limit.
        tiers: KV cache tiers below the device.
        sliding_window: number of last tokens that a token sees, itself included; the KV cache
            keeps no more. None for the model's own attention. See `layout.visible_keys`.
        attention_sinks: first tokens that every token sees besides the window.
        changes_answers: allow a window although the model was trained without.
        adapters: listed LoRA adapters of the group; without `adapter_slots` each has its own slot.
        adapter_slots: room for adapters that come and go; None for the listed adapters alone.
        speculation: how tokens are drafted ahead of their verification.
        max_sequences, max_batch_tokens, max_queued, prefix_cache: as in `EngineConfig`.
    """

    model_path: str
    weights: tuple[str, ...] = ()
    dtype: str = "bfloat16"
    kv_dtype: Literal["int8", "fp8"] | None = None
    quantization: str | None = None
    activation_dtype: Literal["int8"] | None = None
    expert_wire: Literal["float32", "bfloat16", "fp8"] | None = None
    spare_experts: int = 0
    device: str = "cpu"
    kernels: str | None = None
    batch_independent: bool = False
    threads: int | None = None
    block_size: int = 16
    kv_bytes: int | None = None
    num_blocks: int | None = None
    offload_layers: int = 0
    offload_folder: str | None = None
    packed_cache_bytes: int = 0
    num_local_blocks: int | None = None
    max_model_len: int | None = None
    max_sequences: int = 256
    max_batch_tokens: int = 2048
    max_queued: int = 4096
    prefix_cache: bool = True
    tiers: TierConfig = field(default_factory=TierConfig)
    sliding_window: int | None = None
    attention_sinks: int = 0
    changes_answers: bool = False
    adapters: tuple[AdapterFile, ...] = ()
    adapter_slots: AdapterSlots | None = None
    speculation: SpeculationConfig = field(default_factory=SpeculationConfig)

    @property
    def cache_dtype(self) -> str:
        """Type of the KV cache."""
        return self.kv_dtype or self.dtype

    @property
    def kv_words(self) -> str:
        """Text of the KV cache's type, for keys, since it changes tokens; "" for `dtype`."""
        if self.kv_dtype is None:
            return ""
        return f"kv {self.kv_dtype}{' scaled' if self.scales_kv else ''}"

    @property
    def scales_kv(self) -> bool:
        """Whether the weights take the scales that the checkpoint ships for an fp8 KV cache.

        Not in a group with adapters, whose changes of keys and values would need the same factors;
        not in float16, whose few exponents cannot take the factors exactly.
        """
        adapters = bool(self.adapters) or self.adapter_slots is not None
        return self.kv_dtype == "fp8" and self.dtype != "float16" and not adapters

    @property
    def activation_words(self) -> str:
        """Text of the activations' type, for keys, since it changes tokens; "" for `dtype`."""
        return "" if self.activation_dtype is None else f"activations {self.activation_dtype}"

    @property
    def window_words(self) -> str:
        """Text of the window, for keys: another window gives other tokens; "" for none."""
        if self.sliding_window is None:
            return ""
        return f"window {self.sliding_window} sinks {self.attention_sinks}"
