"""What a decode step costs outside the kernels, and a slice process's peak memory.

One slice in this process, N sequences decoding. The period of a step less the time inside the
ops (embed, the decoder, logits, sampling) is everything else: scheduler, plan, batch, results.
The KV pool is as large as the sequences need, so that all of it is in memory at the end.

Usage: overhead.py MODEL_DIR [--requests 32] [--steps 256] [--quantization int8]
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from arriero.cluster.engine_bench import EngineBench
from arriero.shards.config.group import GroupConfig
from arriero.shards.worker.runner import Runner

PROMPT = 64


def memory_mb(field: str) -> float:
    """A field of this process's memory status, in millions of bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return round(int(line.split()[1]) * 1024 / 1e6, 1)
    raise SystemExit(f"/proc/self/status has no {field}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--steps", type=int, default=256)
    parser.add_argument("--quantization")
    args = parser.parse_args()
    config = GroupConfig(
        model_path=args.model,
        quantization=args.quantization,
        prefix_cache=False,
        max_model_len=2048,
        num_blocks=args.requests * -(-(PROMPT + args.steps) // 16) + 8,
    )
    imported = memory_mb("VmRSS")
    inside = 0.0
    steps: list[tuple[float, float]] = []  # (end of the step, seconds inside the ops)

    def timed(run: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:  # noqa: ANN401
            nonlocal inside
            started = time.perf_counter()
            out = run(*given, **named)
            inside += time.perf_counter() - started
            return out

        return call

    plain = Runner.step

    def step(self: Runner, plan: Any, **named: Any) -> Any:  # noqa: ANN401
        nonlocal inside
        inside = 0.0
        result = plain(self, plan, **named)
        if len(plan.slots) == args.requests == len(plan.tokens):
            steps.append((time.perf_counter(), inside))
        return result

    Runner.step = step  # type: ignore[method-assign]
    with EngineBench(config) as bench:
        runner = bench._executor._runner
        assert runner is not None
        ops, model = runner._ops, runner._model
        for name in ("embed", "logits", "sample"):
            setattr(ops, name, timed(getattr(ops, name)))
        model.decoder = timed(model.decoder)
        weights, kv = runner.weights_nbytes, runner.kv_nbytes
        loaded = memory_mb("VmHWM")
        prompts = [
            [(7 * i + 13 * j) % 40000 + 100 for j in range(PROMPT)] for i in range(args.requests)
        ]
        bench.run(prompts, args.steps)
    periods = [b[0] - a[0] for a, b in itertools.pairwise(steps)]
    outside = [p - one[1] for p, one in zip(periods, steps[1:], strict=True)]
    peak = memory_mb("VmHWM")
    print(
        json.dumps(
            {
                "requests": args.requests,
                "steps": len(periods),
                "period_ms": round(statistics.median(periods) * 1e3, 3),
                "outside_kernels_ms": round(statistics.median(outside) * 1e3, 3),
                "weights_mb": round(weights / 1e6, 1),
                "kv_pool_mb": round(kv / 1e6, 1),
                "imported_mb": imported,
                "peak_while_loading_mb": loaded,
                "peak_mb": peak,
                "peak_less_weights_and_pool_mb": round(peak - (weights + kv) / 1e6, 1),
            }
        )
    )


if __name__ == "__main__":
    main()
