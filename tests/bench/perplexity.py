"""Perplexity of weight formats on English text: Python's help topics, as found on any machine.

Usage: perplexity.py MODEL_DIR [--tokens 50000] [--weights bfloat16,int8,fp8,int4,int4-plain]

int8, fp8 and int4 are quantized while they load; the scales and zero points of "int4" are float16's
numbers. Parts of a name say more, and leave them float32: "plain" rounds to the nearest level
without search, "g64" makes groups of 64 columns, "half" rounds scales and zero points to float16
and "bf16" to bfloat16. A form that begins with "written-" is what `arriero models quantize` writes.
"kv-int8" and "kv-fp8" are bfloat16 weights with such a KV cache, fp8 on the reference backend.
"""

from __future__ import annotations

import argparse
import json
import math
import pydoc_data.topics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from arriero.cluster.engine_bench import EngineBench
from arriero.kernels.quantize import quantize_int4
from arriero.kernels.quantized_weight import QuantizedWeight
from arriero.shards.checkpoint.quantize import TO, quantize_checkpoint
from arriero.shards.config.group import GroupConfig
from arriero.shards.models import loader

WINDOW = 1024


def windows(path: str, num_tokens: int) -> list[list[int]]:
    """The text's tokens in windows that are scored apart."""
    tokenizer = Tokenizer.from_file(str(Path(path) / "tokenizer.json"))
    text = "\n\n".join(body for _, body in sorted(pydoc_data.topics.topics.items()))
    ids = tokenizer.encode(text, add_special_tokens=False).ids[:num_tokens]
    return [ids[i : i + WINDOW] for i in range(0, len(ids), WINDOW)]


def int4(how: list[str], weight_OI: Tensor) -> QuantizedWeight:
    """Int4 of a kind; see above."""
    group = next((int(one[1:]) for one in how if one[0] == "g"), 32)
    made = quantize_int4(weight_OI, group, search="plain" not in how)
    for name, dtype in (("half", torch.float16), ("bf16", torch.bfloat16)):
        if name in how:
            assert made.zeros is not None, "these levels have zero points"
            scales, zeros = (one.to(dtype).float() for one in (made.scales, made.zeros))
            made = replace(made, scales=scales, zeros=zeros)
    return made


@contextmanager
def prepared(model: str, weights: str) -> Iterator[GroupConfig]:
    """The group that runs a model's weights in a form."""
    plain = GroupConfig(model_path=model, prefix_cache=False, max_model_len=2048)
    if weights == "bfloat16":
        yield plain
    elif weights == "kv-int8":
        yield replace(plain, kv_dtype="int8")
    elif weights == "kv-fp8":
        yield replace(plain, kv_dtype="fp8", kernels="reference")
    elif weights.startswith("int4-"):
        searched = loader.QUANTIZERS["int4"]
        loader.QUANTIZERS["int4"] = partial(int4, weights.split("-")[1:])
        yield replace(plain, quantization="int4")
        loader.QUANTIZERS["int4"] = searched
    elif weights.startswith("written-"):
        with tempfile.TemporaryDirectory() as work:
            to = next(one for one in TO if one == weights.removeprefix("written-"))
            quantize_checkpoint(Path(model), Path(work) / "model", to)
            yield replace(plain, model_path=f"{work}/model")
    else:
        yield replace(plain, quantization=weights)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=50_000)
    parser.add_argument("--weights", default="bfloat16,int8,fp8,int4,int4-plain")
    args = parser.parse_args()
    asked = windows(args.model, args.tokens)
    base = None
    for weights in args.weights.split(","):
        with prepared(args.model, weights) as config, EngineBench(config) as bench:
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
