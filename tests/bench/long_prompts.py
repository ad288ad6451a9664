"""How near long prompts on CPU come to the machine's matrix rate, attention counted.

    PYTHONPATH=src python tests/bench/long_prompts.py MODEL_DIR [--prompts 2000,8000] [--json]
        [--quantization int4] [--activation-dtype int8] [--rounds 3] [--threads 2]

The operations of a prompt of N tokens: 2 for each weight of the layers and each token, 4 for each
number of a query head and each key that its token sees, and the vocabulary's product for the last
token. The rate of multiply-adds in registers is measured before each prompt; both are of the same
clock: the process's CPU time over the number of threads, so that other processes on the machine
count little. Prints a JSON line for each prompt: tokens and operations a second, the share of the
rate, and the medians last. Knows whole engines; knows nothing of what takes the time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch

from arriero.cluster.engine_bench import EngineBench
from arriero.kernels.cpu import limits
from arriero.kernels.cpu.backend import CpuOps
from arriero.shards.config.group import GroupConfig
from arriero.shards.model_config.dense import ModelConfig

ROUNDS = 400_000
"""Multiply-adds in a register of a measurement of the rate."""


def cpu_s(run: Callable[[], object], threads: int) -> float:
    """CPU seconds of the process, divided by its threads."""
    before_s = time.process_time()
    run()
    return (time.process_time() - before_s) / threads


def rate(ops: CpuOps, threads: int) -> float:
    """Operations a second of multiply-adds in registers, on all threads."""
    counts: list[float] = []
    seconds = cpu_s(
        lambda: counts.append(limits.multiply_only(ops, ROUNDS, torch.bfloat16)), threads
    )
    return counts[0] / seconds


def operations(config: ModelConfig, length: int) -> dict[str, float]:
    """Floating-point operations of a prompt of `length` tokens, by part."""
    head = config.vocab_size * config.hidden_size
    body = config.num_parameters() - head * (1 if config.tie_word_embeddings else 2)
    keys = length * (length + 1) / 2
    attention = 4.0 * config.num_layers * config.num_heads * config.head_dim * keys
    return {"products": 2.0 * (body * length + head), "attention": attention}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--prompts", default="2000,8000", help="lengths in tokens")
    parser.add_argument("--quantization", choices=("int8", "int4"))
    parser.add_argument("--activation-dtype", choices=("int8",))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="the last line alone")
    args = parser.parse_args()
    lengths = [int(length) for length in args.prompts.split(",")]
    model = ModelConfig.from_folder(args.model)
    config = GroupConfig(
        model_path=args.model,
        dtype="bfloat16",
        quantization=args.quantization,
        activation_dtype=args.activation_dtype,
        prefix_cache=False,
        threads=args.threads,
        max_model_len=max(lengths) + 16,
        num_blocks=max(lengths) // 16 + 64,
    )
    ops = CpuOps(torch.device("cpu"), threads=args.threads)
    shares: dict[int, list[float]] = {length: [] for length in lengths}
    with EngineBench(config) as bench:
        for number in range(args.rounds):
            for length in lengths:
                most = rate(ops, args.threads)
                prompt = [(7 * number + 13 * j) % 40_000 + 100 for j in range(length)]
                seconds = cpu_s(lambda prompt=prompt: bench.run([prompt], 1), args.threads)
                parts = operations(model, length)
                shares[length].append(sum(parts.values()) / seconds / most)
                line = {
                    "prompt": length,
                    "tokens_per_s": round(length / seconds, 1),
                    "gflop_s": round(sum(parts.values()) / seconds / 1e9, 1),
                    "most_gflop_s": round(most / 1e9, 1),
                    "attention_share": round(parts["attention"] / sum(parts.values()), 3),
                    "share_of_rate": round(shares[length][-1], 3),
                }
                if not args.json:
                    print(json.dumps(line), flush=True)
    print(
        json.dumps(
            {"share_of_rate": {n: round(statistics.median(s), 3) for n, s in shares.items()}}
        )
    )


if __name__ == "__main__":
    main()
