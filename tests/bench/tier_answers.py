"""What holding KV blocks in a byte a number below the device does to answers.

    PYTHONPATH=src:tests ARRIERO_TEST_MODEL=… python tests/bench/tier_answers.py

Greedy continuations of prompts of English text, first computed, then again with the prompt's blocks
brought up from host memory; the device's pool holds two of them only, so each comes from there. A
JSON line for each type: the share of tokens equal up to where an answer first goes another way,
of tokens that are equal at their place, and of answers equal whole.
"""

from __future__ import annotations

import argparse
import json
import os
import pydoc_data.topics
import time

from tokenizers import Tokenizer

from arriero.shards.config.group import GroupConfig
from arriero.shards.config.kv_tiers import RowType, TierConfig
from arriero.shards.config.sampling_params import SamplingParams
from support.groups import Group, running

TYPES: dict[str, RowType | None] = {"computed": None, "int8": "int8", "fp8": "fp8"}


def texts(path: str, count: int, length: int) -> list[list[int]]:
    """Prompts out of Python's longest help topics, no two of them alike."""
    tokenizer = Tokenizer.from_file(f"{path}/tokenizer.json")
    topics = sorted(set(pydoc_data.topics.topics.values()), key=len)[-count:]
    return [tokenizer.encode(one, add_special_tokens=False).ids[:length] for one in topics]


def answers(group: Group, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    """Each prompt alone, its blocks saved before the next one comes."""
    greedy = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, seed=0)
    found = []
    for prompt in prompts:
        found.append(group.generate([prompt], greedy)[0].tokens)
        while group.engine.stats().tiers.get("moving", 1):
            time.sleep(0.01)
    return found


def measure(dtype: RowType | None, prompts: list[list[int]], args: argparse.Namespace) -> None:
    """Print one type's line."""
    config = GroupConfig(
        model_path=args.model,
        threads=1,
        num_blocks=2 * -(-(args.length + args.tokens) // 16),  # half of it may be on its way
        max_model_len=args.length + args.tokens,
        max_sequences=1,
        tiers=TierConfig(host_bytes=1 << 30, dtype=dtype),
    )
    with running(config) as group:
        computed = answers(group, prompts, args.tokens)
        before = group.engine.stats().tiers["loaded"]
        brought = answers(group, prompts, args.tokens)
        loaded = group.engine.stats().tiers["loaded"] - before
    least = sum((len(one) - 1) // 16 for one in prompts)
    assert loaded >= least, f"{loaded} blocks came up, of {least}"
    starts = equal = whole = 0
    for one, other in zip(computed, brought, strict=True):
        same = [a == b for a, b in zip(one, other, strict=True)]
        starts += [*same, False].index(False)
        equal += sum(same)
        whole += all(same)
    total = len(prompts) * args.tokens
    found = {"until_first_other": starts / total, "equal": equal / total}
    shares = {name: round(share, 3) for name, share in found.items()}
    row = {"tier_dtype": dtype or "as computed", "blocks_brought_up": loaded, **shares}
    print(json.dumps(row | {"answers_equal": f"{whole} of {len(prompts)}"}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    model = os.environ.get("ARRIERO_TEST_MODEL")
    parser.add_argument("--model", default=model, required=not model)
    parser.add_argument("--types", default=",".join(TYPES))
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=64)
    args = parser.parse_args()
    prompts = texts(args.model, args.prompts, args.length)
    for name in args.types.split(","):
        measure(TYPES[name], prompts, args)


if __name__ == "__main__":
    main()
