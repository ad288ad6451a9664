"""How near bf16 comes to float32: whole greedy continuations that agree with transformers' own.

44 prompts of English text and code, 32 tokens each. Weights are bf16 everywhere; transformers in
float32 computes with them exactly, and its own bf16 is shown beside ours.

What transformers gives is kept in build/fidelity.json, since it takes minutes; delete the file to
compute it again.

Usage: fidelity.py MODEL_DIR [--weights bfloat16,int8,int4,fp8]
"""

from __future__ import annotations

import argparse
import json
import os
import pydoc_data.topics
import random
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer

from arriero.cluster.engine_bench import EngineBench
from arriero.shards.config.group import GroupConfig
from arriero.shards.model_config.dense import ModelConfig

NUM_PROMPTS, NUM_TOKENS = 44, 32
KEPT = Path("build/fidelity.json")


def prompts(path: str, count: int = NUM_PROMPTS) -> list[list[int]]:
    """Half from Python's help topics, half from its sources, 8 to 200 tokens long."""
    tokenizer = Tokenizer.from_file(str(Path(path) / "tokenizer.json"))
    rng = random.Random(8)
    topics = sorted(pydoc_data.topics.topics.items())
    sources = sorted(Path(os.__file__).parent.glob("*.py"))
    out: list[list[int]] = []
    while len(out) < count:
        if len(out) % 2:
            text = rng.choice(sources).read_text(errors="ignore")
        else:
            text = rng.choice(topics)[1]
        length = rng.choice((8, 20, 40, 80, 120, 200))
        start = rng.randrange(max(1, len(text) - 6 * length))
        ids = tokenizer.encode(text[start : start + 6 * length], add_special_tokens=False).ids
        if len(ids) >= length:
            out.append(ids[:length])
    return out


def transformers_greedy(path: str, asked: list[list[int]], dtype: torch.dtype) -> list[list[int]]:
    """Greedy tokens of transformers; prompts of one length go together, so nothing is padded."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    out: list[list[int]] = [[] for _ in asked]
    for length in sorted({len(one) for one in asked}):
        places = [i for i, one in enumerate(asked) if len(one) == length]
        ids = torch.tensor([asked[i] for i in places])
        # min_new_tokens keeps the end tokens out; they are banned for ours too
        tokens = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NUM_TOKENS,
            min_new_tokens=NUM_TOKENS,
            do_sample=False,
        )
        for i, row in zip(places, tokens[:, length:].tolist(), strict=True):
            out[i] = row
    return out


def kept(name: str, asked: list[list[int]], run: Callable[[], list[list[int]]]) -> list[list[int]]:
    """What `run` gave for these prompts, now or before."""
    held = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    if held.get("prompts") != asked:
        held = {"prompts": asked}
    if name not in held:
        held[name] = run()
        KEPT.parent.mkdir(exist_ok=True)
        KEPT.write_text(json.dumps(held))
    found: list[list[int]] = held[name]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--weights", default="bfloat16")
    args = parser.parse_args()
    asked = prompts(args.model)
    end = ModelConfig.from_folder(args.model).eos_token_ids
    exact = kept("float32", asked, lambda: transformers_greedy(args.model, asked, torch.float32))
    theirs = kept("bfloat16", asked, lambda: transformers_greedy(args.model, asked, torch.bfloat16))
    found: dict[str, object] = {"prompts": len(asked), "tokens": NUM_TOKENS}
    found["transformers bfloat16"] = agreement(theirs, exact)
    for weights in args.weights.split(","):
        config = GroupConfig(
            model_path=args.model,
            quantization=None if weights == "bfloat16" else weights,
            prefix_cache=False,
            max_model_len=2048,
        )
        with EngineBench(config) as bench:
            ours = bench.greedy(asked, NUM_TOKENS, banned=end)
        found[f"arriero {weights}"] = agreement(ours, exact)
    print(json.dumps(found))


def agreement(got: list[list[int]], exact: list[list[int]]) -> dict[str, float]:
    """Prompts whose whole continuation agrees, and the mean length of the agreeing start."""
    same = sum(a == b for a, b in zip(got, exact, strict=True))
    lengths = [
        next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), NUM_TOKENS)
        for a, b in zip(got, exact, strict=True)
    ]
    return {"whole": same, "share": same / len(exact), "mean_prefix": sum(lengths) / len(lengths)}


if __name__ == "__main__":
    main()
