"""What `run.py` does, in order: each item with its time on an H200, measured or estimated.

Imports no torch: the parent process lists items, and children run them. Knows names and times;
knows nothing of kernels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["compile", "check", "bench", "tune"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """One child process.

    Attributes:
        kind: decides the part of the report, and what may run at the same time: checks do.
        names: names of checks, benches or tuners, in one child.
        estimate_s: seconds that the child takes; it starts only if that much time is left.
        limit_s: seconds after which the child is killed.
    """

    kind: Kind
    names: tuple[str, ...]
    estimate_s: float
    limit_s: float


def check(estimate_s: float, *names: str) -> Item:
    """A child for checks; 10 s of its time are imports and the CUDA context."""
    return Item(kind="check", names=names, estimate_s=estimate_s, limit_s=3 * estimate_s + 30)


def bench(estimate_s: float, name: str) -> Item:
    """A child for a bench."""
    return Item(kind="bench", names=(name,), estimate_s=estimate_s, limit_s=2 * estimate_s + 20)


def tune(estimate_s: float, name: str) -> Item:
    """A child for a tuner."""
    return Item(kind="tune", names=(name,), estimate_s=estimate_s, limit_s=2 * estimate_s)


HEADS = [f"d{dim} g{group}" for dim in (64, 128) for group in (4, 5, 16)]
COMPILE = Item(kind="compile", names=("kernels",), estimate_s=60, limit_s=150)
CHECKS = (
    check(20, "engine: Llama, graphs", "engine: Llama 4, graphs"),
    check(15, "engine: tiers"),
    check(15, "NCCL in a graph"),
    check(40, "sums over symmetric memory"),
    *(
        check(15, f"rope, attention {heads}", f"bits, decode and prefill {heads}")
        for heads in HEADS
    ),
    check(12, "rms_norm", "silu_mul", "rope_write_kv", "rope to int8 and fp8 caches"),
    check(
        15,
        "attention",
        "attention, chunk-local",
        "attention, window",
        "attention, window and sinks",
        "attention, int8 cache",
        "attention, fp8 cache",
        "attention, fast",
        "attention, fast, int8 cache",
        "attention, fast, fp8 cache",
    ),
    check(15, "product, dense", "product, int8", "product, fp8"),
    check(20, "product, int4", "product, int4_symmetric"),
    check(25, "product, split"),
    check(20, "experts", "rows between ranks", "rows to float8", "product, fp8 inputs"),
    check(15, "experts, fp8 inputs", "norms to float8"),
    check(15, "rows to NVFP4", "product, fp4 inputs"),
    check(15, "embedding", "quantized vocabularies", "logits"),
    check(15, "sampled tokens", "counts of 1"),
    check(
        15,
        "bits, decode and prefill",
        "bits, alone and in a batch",
        "bits, in halves with late sums",
    ),
)
BENCHES = (
    bench(35, "products by kind"),
    bench(15, "attention by cache"),
    bench(12, "sampling"),
    bench(25, "slices over a fake group"),
    bench(40, "sums over ranks"),
    bench(35, "Llama-3.1-8B"),
    bench(25, "layers of the large models"),
    bench(15, "attention, 128k"),
    bench(40, "against transformers"),
)
TUNERS = (tune(60, "tuning of attention"), tune(90, "tuning of products"))
ITEMS = (COMPILE, *CHECKS, *BENCHES, *TUNERS)
