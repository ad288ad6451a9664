"""What does a draw of tokens cost on CPU, beside the product that makes the logits?

    PYTHONPATH=src python tests/bench/draws.py --vocab 49152 --hidden 576 --rows 1,8,32

One thread, by the thread's CPU time. The logits are normal numbers with a deviation of 3: the sum
of the likelihoods is then some ten times the greatest, as in a model's freer answers. The product
is that of a bf16 table. Knows logits; knows nothing of models.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from arriero.kernels.cpu.backend import CpuOps
from arriero.kernels.sampling_rows import SamplingRows

DEVIATION = 3.0


def sampling_rows(rows: int) -> dict[str, SamplingRows]:
    """Parameters of each kind of draw."""

    def full(value: float, dtype: torch.dtype) -> torch.Tensor:
        return torch.full((rows,), value, dtype=dtype)

    plain = SamplingRows(
        temperature_R=full(0.8, torch.float32),
        top_k_R=full(0, torch.int32),
        top_p_R=full(1, torch.float32),
        min_p_R=full(0, torch.float32),
        seed_R=torch.arange(rows),
        position_R=full(0, torch.int64),
    )
    top_k, top_p = full(50, torch.int32), full(0.95, torch.float32)
    greedy = replace(plain, temperature_R=full(0, torch.float32), all_greedy=True)
    return {
        "greedy": greedy,
        "temperature": plain,
        "top-k, top-p": replace(plain, top_k_R=top_k, top_p_R=top_p),
        "top-p": replace(plain, top_p_R=top_p),
        "min-p": replace(plain, min_p_R=full(0.05, torch.float32)),
        "greedy, log-prob": replace(greedy, num_logprobs=0),
        "greedy, 5 log-probs": replace(greedy, num_logprobs=5),
    }


def median_ms(run: Callable[[], object], repeats: int) -> float:
    """Median of this thread's CPU time."""
    run()
    times = []
    for _ in range(repeats):
        started = time.thread_time_ns()
        run()
        times.append((time.thread_time_ns() - started) * 1e-6)
    return statistics.median(times)


def main() -> None:
    """Print a line for each kind of draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--vocab", type=int, default=49152)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--rows", default="1,8,32")
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    ops = CpuOps(torch.device("cpu"), 1)
    weight_VH = torch.randn(arguments.vocab, arguments.hidden)
    vocab = ops.pack_vocab(weight_VH, 0, torch.bfloat16)
    norm_H = torch.ones(arguments.hidden)
    for num_rows in map(int, arguments.rows.split(",")):
        x_RH = torch.randn(num_rows, arguments.hidden)
        product = partial(ops.logits, x_RH, norm_H, 1e-5, vocab)
        product_ms = median_ms(product, arguments.repeats)
        print(f"{num_rows} rows of {arguments.vocab}: product {product_ms:.2f} ms")
        logits_RV = torch.randn(num_rows, arguments.vocab) * DEVIATION
        for name, rows in sampling_rows(num_rows).items():
            ms = median_ms(partial(ops.sample, logits_RV, rows), arguments.repeats)
            print(f"  {name:20} {ms:8.3f} ms, {ms / product_ms:6.2%} of the product", flush=True)


if __name__ == "__main__":
    main()
