"""Perplexity of weight formats on English text: Python's help topics, as found on any machine.

Usage: perplexity.py MODEL_DIR [--tokens 50000] [--weights bfloat16,int8,fp8,int4,int4-plain]
           [--greedy 44x64] [--device cuda]

Caches of keys and values, perplexity and greedy tokens in one command:

    perplexity.py MODEL_DIR --weights bfloat16,kv-int8,kv-fp8,kv-fp8-calibrated --greedy 44x64

int8, fp8 and int4 are quantized while they load; the scales and zero points of "int4" are float16's
numbers. Parts of a name say more, and leave them float32: "plain" rounds to the nearest level
without search, "g64" makes groups of 64 columns, "half" rounds scales and zero points to float16
and "bf16" to bfloat16. A form that begins with "written-" is what `arriero models quantize` writes.
"q8-" in front rounds the inputs of int8 and int4 weights to int8 (`activation_dtype`).
"kv-int8" and "kv-fp8" are bfloat16 weights with such a KV cache. "kv-fp8-calibrated" gives a dense
model the scales of its keys and values over the first 2,000 tokens of the text.

A line of JSON comes after each piece of the text, with the perplexity up to there, and one with
the whole. `--greedy NxM` then continues N prompts by M greedy tokens each, and compares them with
those of the first form: the share of equal tokens, of equal continuations, and the mean length of
the equal start. After the first different token a continuation goes its own way.
"""

from __future__ import annotations

import argparse
import json
import math
import pydoc_data.topics
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from fidelity import prompts
from tokenizers import Tokenizer
from torch import Tensor

from arriero.cluster.engine_bench import EngineBench
from arriero.kernels.quantize import quantize_int4
from arriero.kernels.quantized_weight import QuantizedWeight
from arriero.shards.checkpoint.quantize import TO, quantize_checkpoint
from arriero.shards.config.group import GroupConfig
from arriero.shards.models import loader

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.calibrated import calibrated

CALIBRATION_TOKENS = 2_000
WINDOW = 1024
PIECE = 8
"""Windows between two lines of output."""


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
def prepared(model: str, weights: str, device: str) -> Iterator[GroupConfig]:
    """The group that runs a model's weights in a form."""
    plain = GroupConfig(model_path=model, prefix_cache=False, max_model_len=2048, device=device)
    if weights.startswith("q8-"):
        weights, plain = weights.removeprefix("q8-"), replace(plain, activation_dtype="int8")
    if weights == "bfloat16":
        yield plain
    elif weights == "kv-int8":
        yield replace(plain, kv_dtype="int8")
    elif weights == "kv-fp8":
        yield replace(plain, kv_dtype="fp8")
    elif weights == "kv-fp8-calibrated":
        tokens = [token for window in windows(model, CALIBRATION_TOKENS) for token in window]
        with tempfile.TemporaryDirectory() as work:
            calibrated(Path(model), Path(work) / "model", tokens)
            yield replace(plain, model_path=f"{work}/model", kv_dtype="fp8")
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


def scored(bench: EngineBench, asked: list[list[int]], weights: str) -> float:
    """Perplexity of the windows; prints a line after each piece of them."""
    total, count = 0.0, 0
    for start in range(0, len(asked), PIECE):
        scores = bench.prompt_logprobs(asked[start : start + PIECE])
        total += sum(map(sum, scores))
        count += sum(map(len, scores))
        tell(weights=weights, scored=count, perplexity_so_far=round(math.exp(-total / count), 4))
    return math.exp(-total / count)


def continued(bench: EngineBench, asked: list[list[int]], tokens: int) -> list[list[int]]:
    """Greedy continuations of all prompts, some at a time."""
    out: list[list[int]] = []
    for start in range(0, len(asked), PIECE):
        out += bench.greedy(asked[start : start + PIECE], tokens)
    return out


def agreement(got: list[list[int]], base: list[list[int]]) -> dict[str, object]:
    """How near continuations are to those of another form."""
    pairs = list(zip(got, base, strict=True))
    equal = [sum(x == y for x, y in zip(a, b, strict=True)) for a, b in pairs]
    starts = [
        next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(b))
        for a, b in pairs
    ]
    return {
        "equal_tokens": round(sum(equal) / sum(map(len, base)), 4),
        "equal_continuations": round(sum(a == b for a, b in pairs) / len(pairs), 4),
        "mean_equal_start": round(sum(starts) / len(starts), 1),
    }


def tell(**values: object) -> None:
    """A line of output."""
    print(json.dumps(values), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=50_000)
    parser.add_argument("--weights", default="bfloat16,int8,fp8,int4,int4-plain")
    parser.add_argument("--greedy", default="", help="prompts x tokens, such as 44x64")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args = parser.parse_args()
    asked = windows(args.model, args.tokens)
    num_prompts, num_tokens = map(int, args.greedy.split("x")) if args.greedy else (0, 0)
    starts = prompts(args.model, num_prompts)
    base, base_tokens = None, None
    for weights in args.weights.split(","):
        with prepared(args.model, weights, args.device) as config, EngineBench(config) as bench:
            perplexity = scored(bench, asked, weights)
            base = base or perplexity
            tell(
                weights=weights,
                tokens=sum(map(len, asked)),
                perplexity=round(perplexity, 4),
                change=f"{perplexity / base - 1:+.3%}",
            )
            if not starts:
                continue
            got = continued(bench, starts, num_tokens)
            base_tokens = base_tokens or got
            tell(
                weights=weights,
                prompts=num_prompts,
                greedy_tokens=num_tokens,
                **agreement(got, base_tokens),
            )


if __name__ == "__main__":
    main()
