"""Settings of one replica group: which model, cut how, within which limits.

Knows numbers and paths; knows nothing of where the slices run (that is `cluster/`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from arriero.shards.config.kv_tiers import TierConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupConfig:
    """One replica group: `pp` stages of `dp` x `tp` slices.

    Rank = (stage * dp + dp rank) * tp + tp rank.

    Attributes:
        model_path: folder with config.json, safetensors and tokenizer.json, on every node; or an
            fsspec URL of one, of which each node fetches what its ranks read, once.
        dtype: of weights and KV cache: "float32", "bfloat16", "float16".
        quantization: of the weights while they load: "int8" (per row), "int4" (groups of 32
            columns, the vocabulary in int8) or "fp8" (per row); None keeps them in `dtype`.
            Activations, cache and norms are as `dtype` says either way.
        tp: slices of a stage (tensor parallel).
        pp: pipeline stages.
        dp: data-parallel attention (mixtures of experts only): so many times `tp` slices of a
            stage, each `tp` of them with sequences of their own.
        ep: parts that each layer's experts are dealt to; None for one to each slice of a stage.
        expert_wire: how rows travel to experts on other ranks: "float32", "bfloat16", or "fp8"
            (with a scale for each row; results come back in bfloat16); None: as `dtype` says.
        spare_experts: slots of each slice, in each layer, for second copies of experts that are
            asked much; with them the experts are moved as the load asks (needs `dp` > 1).
        tp_shares: relative size of each tp rank's share; None for as even as heads allow.
        layer_split: layers of each stage; None splits by cost.
        device: "cpu" or "cuda".
        kernels: a backend's name; None picks the best for the device.
        batch_independent: no bit of a row depends on the rows beside it, also where that costs
            speed: backend "triton" then leaves the vendor's products, which choose their order of
            sums by the batch. "cpu" is so at no cost; "reference" cannot be.
        threads: CPU threads of each slice; None divides the node's cores among its slices.
        block_size: tokens in a KV block.
        kv_bytes: memory of the KV pool of the whole group; None takes what GPUs leave beside
            weights, graphs and a step, or on CPUs 2 GiB, a quarter of memory at most.
        num_blocks: KV blocks outright, instead of `kv_bytes`; of each dp rank.
        num_local_blocks: KV blocks of the layers that attend within their chunk, which have a pool
            of their own; None shares `kv_bytes` between the pools.
        offload_layers: of each stage, the last so many layers keep their weights on disk, mapped,
            and read them ahead of use (backend "cpu" alone). Of a mixture of experts the routed
            experts alone: those that a step asks for are read, and the cold ones leave memory.
        offload_folder: where; None is the system's folder for temporary files.
        max_model_len: None takes the model's own limit.
        tiers: of the KV cache below the device.
        sliding_window: a token sees the last so many tokens alone, itself among them, and its KV
            cache holds no more; None for the model's own attention. See `layout.visible_keys`.
        attention_sinks: first tokens that it sees besides.
        changes_answers: a window is wanted although the model was not trained with it.
        max_sequences, max_batch_tokens, max_queued, prefix_cache: as in `EngineConfig`.
    """

    model_path: str
    dtype: str = "bfloat16"
    quantization: str | None = None
    tp: int = 1
    pp: int = 1
    dp: int = 1
    ep: int | None = None
    expert_wire: Literal["float32", "bfloat16", "fp8"] | None = None
    spare_experts: int = 0
    tp_shares: tuple[float, ...] | None = None
    layer_split: tuple[int, ...] | None = None
    device: str = "cpu"
    kernels: str | None = None
    batch_independent: bool = False
    threads: int | None = None
    block_size: int = 16
    kv_bytes: int | None = None
    num_blocks: int | None = None
    offload_layers: int = 0
    offload_folder: str | None = None
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

    @property
    def world_size(self) -> int:
        """Slices of the group."""
        return self.tp * self.dp * self.pp

    @property
    def window_words(self) -> str:
        """The window in words, since another one gives other tokens; "" for none."""
        if self.sliding_window is None:
            return ""
        return f"window {self.sliding_window} sinks {self.attention_sinks}"
