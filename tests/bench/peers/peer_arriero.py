"""Ours, in process, as `arriero bench engine` runs it.

Usage: peer_arriero.py MODEL_DIR [WEIGHTS [ACTIVATIONS]]
"""

import sys

from cells import answer_cells

from arriero.cluster.engine_bench import EngineBench
from arriero.shards.config.group import GroupConfig

weights = sys.argv[2] if len(sys.argv) > 2 else "bfloat16"
quantization = None if weights == "bfloat16" else weights
config = GroupConfig(
    model_path=sys.argv[1],
    dtype="bfloat16",
    quantization=quantization,
    activation_dtype=sys.argv[3] if len(sys.argv) > 3 else None,
    prefix_cache=False,
    max_model_len=2048,
)
with EngineBench(config) as bench:
    answer_cells(bench.run)
