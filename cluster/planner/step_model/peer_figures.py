"""AIConfigurator's times of the cases, so that the account needs no other program.

Knows figures; knows nothing of how they come about. Made with aiconfigurator-core 0.12.0, backend
trtllm, database "current" of h200_sxm and h100_sxm: `run_static_latency_only`, mode static_gen with
isl 1024 and osl 2, and mode static_ctx with isl 8192; KV cache and attention in bfloat16.
"""

from __future__ import annotations

from collections.abc import Mapping

SOURCE = "AIConfigurator 0.12.0 (TensorRT-LLM)"

_BY_LOAD: Mapping[tuple[str, str], Mapping[str, float]] = {
    ("llama-3.1-405b TP8 fp8", "h100-80g"): {
        "batch 1": 29.07,
        "batch 64": 40.97,
        "batch 256": 65.45,
        "prefill 8k": 1129.92,
    },
    ("llama-3.1-405b TP8 fp8", "h200-141g"): {
        "batch 1": 23.20,
        "batch 64": 33.56,
        "batch 256": 59.79,
        "prefill 8k": 1064.79,
    },
    ("llama-3.1-405b TP8xPP2 bfloat16", "h100-80g"): {
        "batch 1": 41.58,
        "batch 64": 53.03,
        "batch 256": 77.08,
        "prefill 8k": 1506.53,
    },
    ("llama-3.1-405b TP8xPP2 bfloat16", "h200-141g"): {
        "batch 1": 30.40,
        "batch 64": 40.98,
        "batch 256": 69.43,
        "prefill 8k": 1456.90,
    },
    ("llama-3.1-405b TP8xPP2 fp8", "h100-80g"): {
        "batch 1": 29.08,
        "batch 64": 41.02,
        "batch 256": 65.63,
        "prefill 8k": 1135.30,
    },
    ("llama-3.1-405b TP8xPP2 fp8", "h200-141g"): {
        "batch 1": 23.21,
        "batch 64": 33.61,
        "batch 256": 59.97,
        "prefill 8k": 1070.17,
    },
    ("llama-4-maverick TP1xDP8 EP8 fp8", "h100-80g"): {
        "batch 64": 18.09,
        "batch 256": 23.08,
    },
    ("llama-4-maverick TP1xDP8 EP8 fp8", "h200-141g"): {
        "batch 64": 13.94,
        "batch 256": 18.26,
    },
    ("llama-4-maverick TP8 EP1 fp8", "h100-80g"): {
        "batch 1": 4.53,
        "batch 64": 11.72,
        "batch 256": 19.54,
        "prefill 8k": 91.83,
    },
    ("llama-4-maverick TP8 EP1 fp8", "h200-141g"): {
        "batch 1": 4.59,
        "batch 64": 10.22,
        "batch 256": 15.94,
        "prefill 8k": 81.22,
    },
    ("llama-4-maverick TP8 EP8 fp8", "h100-80g"): {
        "batch 1": 7.35,
        "batch 64": 15.05,
        "batch 256": 20.98,
        "prefill 8k": 91.70,
    },
    ("llama-4-maverick TP8 EP8 fp8", "h200-141g"): {
        "batch 1": 6.22,
        "batch 64": 11.91,
        "batch 256": 16.88,
        "prefill 8k": 83.25,
    },
}

PEER_MS: Mapping[tuple[str, str, str], float] = {
    (case, gpu, load): milliseconds
    for (case, gpu), loads in _BY_LOAD.items()
    for load, milliseconds in loads.items()
}
"""Milliseconds of a step by case, device and load."""
