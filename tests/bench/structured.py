"""What structured output costs: tokens a second of a batch whose output is held to a grammar.

One engine in this process, `--batch` sequences at once, each `--tokens` long; in turn free and held
to a JSON schema whose output is long enough, so that noise falls on both. Prints the medians, and
the grammar's cost as a share of the free rate.

Usage: structured.py MODEL_DIR [--batch 32] [--tokens 64] [--rounds 5] [--threads 2]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from arriero.shards.config.group import GroupConfig
from arriero.shards.config.sampling_params import SamplingParams
from support.groups import Group, running

SCHEMA = {
    "type": "array",
    "minItems": 1000,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "minLength": 3, "maxLength": 30},
            "colour": {"enum": ["red", "green", "blue"]},
            "weight": {"type": "integer", "minimum": 1, "maximum": 500},
            "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 3},
        },
        "required": ["name", "colour", "weight", "tags"],
        "additionalProperties": False,
    },
}


def rate(group: Group, args: argparse.Namespace, grammar: str, seed: int) -> float:
    """Tokens a second, the prompts' computing included."""
    params = [
        SamplingParams(
            temperature=1.0,
            seed=seed * 1000 + number,
            max_tokens=args.tokens,
            ignore_eos=not grammar,
            grammar=grammar,
        )
        for number in range(args.batch)
    ]
    prompts = [[seed + 5, number + 5, *range(100, 130)] for number in range(args.batch)]
    begun_s = time.perf_counter()
    answers = group.generate(prompts, params)
    taken_s = time.perf_counter() - begun_s
    assert all(len(one.tokens) == args.tokens for one in answers), "an output ended early"
    return args.batch * args.tokens / taken_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    config = GroupConfig(
        model_path=args.model, dtype="bfloat16", threads=args.threads, max_model_len=1024
    )
    grammar = f"start: %json {json.dumps(SCHEMA)}\n"
    rates: dict[str, list[float]] = {"free": [], "held": []}
    with running(config) as group:
        for text in ("", grammar):
            rate(group, args, text, 0)
        for number in range(1, args.rounds + 1):
            rates["free"].append(rate(group, args, "", number))
            rates["held"].append(rate(group, args, grammar, number))
    free, held = (statistics.median(rates[name]) for name in ("free", "held"))
    print(f"free {free:.0f} tokens/s, held to a schema {held:.0f}: it costs {1 - held / free:.1%}")


if __name__ == "__main__":
    main()
