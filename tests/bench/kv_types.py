"""Is attention over a KV cache of int8 or fp8 faster than over one of bf16, on CPU?

    PYTHONPATH=src python tests/bench/kv_types.py --heads 9x3x64,32x8x128 --contexts 1024,4096

A decode step's attention of one thread, by the thread's CPU time: a token of each sequence over its
context, in several layers whose caches together exceed the processor's. The types take turns, and
a ratio is the median of the ratios of neighbouring turns. Knows caches; knows nothing of models.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import Tensor

from arriero.kernels.cpu.backend import CpuOps
from arriero.kernels.flat_batch import FlatBatch
from arriero.kernels.kv_cache import KVCache, KVCacheSpec

BLOCK_SIZE = 16
LAYERS = 4
TYPES = {"bf16": torch.bfloat16, "int8": torch.int8, "fp8": torch.float8_e4m3fn}


def batch_of(sequences: int, context: int, head_dim: int) -> FlatBatch:
    """The last token of each sequence; blocks of the sequences in turn, as steps hand them out."""
    blocks = -(-context // BLOCK_SIZE)
    table_SB = torch.arange(blocks * sequences, dtype=torch.int32).view(blocks, sequences).t()
    table_SB = table_SB.contiguous()
    last_S = torch.full((sequences,), context - 1, dtype=torch.int32)
    return FlatBatch(
        positions_T=last_S,
        query_start_S1=torch.arange(sequences + 1, dtype=torch.int32),
        context_S=last_S + 1,
        block_table_SB=table_SB,
        slots_T=table_SB[:, -1] * BLOCK_SIZE + (context - 1) % BLOCK_SIZE,
        cos_TD=torch.ones(sequences, head_dim // 2),
        sin_TD=torch.zeros(sequences, head_dim // 2),
        max_query=1,
        max_context=context,
    )


def filled(ops: CpuOps, blocks: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> KVCache:
    """A cache of random keys and values, the same in each layer."""
    spec = KVCacheSpec(
        num_layers=LAYERS,
        num_blocks=blocks,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        block_size=BLOCK_SIZE,
        dtype=dtype,
    )
    kv = ops.kv_cache(spec, torch.device("cpu"))
    some = min(blocks, 64)
    shape = (some, 2, kv_heads, BLOCK_SIZE, head_dim)
    data = torch.randn(shape)
    if dtype == torch.int8:
        levels = (data * 32).clamp(-127, 127).to(torch.int8)
        scales = torch.full((*shape[:-1], 1), 1 / 32).view(torch.int8)
        data = torch.cat([levels, scales], -1)
    for layer in range(LAYERS):
        for first in range(0, blocks, some):
            ids = range(first, min(first + some, blocks))
            kv.write(layer, ids, data[: len(ids)])
    return kv


def attention_s(ops: CpuOps, q_TND: Tensor, kv: KVCache, batch: FlatBatch) -> float:
    """CPU time of all layers' attention."""
    started = time.thread_time_ns()
    for layer in range(LAYERS):
        ops.paged_attention(q_TND, kv.spec.head_dim**-0.5, kv, layer, batch)
    return (time.thread_time_ns() - started) * 1e-9


def main() -> None:
    """Print a line for each shape and context."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--heads", default="9x3x64,32x8x128", help="queries x keys x dimension")
    parser.add_argument("--contexts", default="1024,4096,16384")
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=11)
    arguments = parser.parse_args()
    ops = CpuOps(torch.device("cpu"), 1)
    for heads in arguments.heads.split(","):
        q_heads, kv_heads, head_dim = map(int, heads.split("x"))
        q_TND = torch.randn(arguments.sequences, q_heads, head_dim)
        for context in map(int, arguments.contexts.split(",")):
            batch = batch_of(arguments.sequences, context, head_dim)
            blocks = batch.block_table_SB.numel()
            caches = {name: filled(ops, blocks, kv_heads, head_dim, t) for name, t in TYPES.items()}
            turns = [
                {name: attention_s(ops, q_TND, kv, batch) for name, kv in caches.items()}
                for _ in range(arguments.repeats)
            ]
            line = f"{heads:10} context {context:6}"
            for name in TYPES:
                ms = statistics.median(turn[name] for turn in turns) * 1e3 / LAYERS
                ratio = statistics.median(turn[name] / turn["bf16"] for turn in turns)
                line += f"   {name} {ms:8.3f} ms a layer, {ratio:.3f} of bf16"
            print(line, flush=True)


if __name__ == "__main__":
    main()
