"""Perplexity of weight formats on English text: Python's help topics, as found on any machine.

Usage: perplexity.py MODEL_DIR [--tokens 50000] [--weights bfloat16,int8,fp8,int4]
"""

from __future__ import annotations

import argparse
import json
import math
import pydoc_data.topics
from pathlib import Path

from tokenizers import Tokenizer

from arriero.cluster.bench import EngineBench
from arriero.shards.group import GroupConfig

WINDOW = 1024


def windows(path: str, num_tokens: int) -> list[list[int]]:
    """The text's tokens in windows that are scored apart."""
    tokenizer = Tokenizer.from_file(str(Path(path) / "tokenizer.json"))
    text = "\n\n".join(body for _, body in sorted(pydoc_data.topics.topics.items()))
    ids = tokenizer.encode(text, add_special_tokens=False).ids[:num_tokens]
    return [ids[i : i + WINDOW] for i in range(0, len(ids), WINDOW)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=50_000)
    parser.add_argument("--weights", default="bfloat16,int8,fp8,int4")
    args = parser.parse_args()
    asked = windows(args.model, args.tokens)
    base = None
    for weights in args.weights.split(","):
        config = GroupConfig(
            model_path=args.model,
            quantization=None if weights == "bfloat16" else weights,
            prefix_cache=False,
            max_model_len=2048,
        )
        with EngineBench(config) as bench:
            scores = bench.prompt_logprobs(asked)
        perplexity = math.exp(-sum(map(sum, scores)) / sum(map(len, scores)))
        base = base or perplexity
        print(
            json.dumps(
                {
                    "weights": weights,
                    "tokens": sum(map(len, asked)),
                    "perplexity": round(perplexity, 4),
                    "change": f"{perplexity / base - 1:+.3%}",
                }
            ),
            flush=True,
        )


if __name__ == "__main__":
    main()
