"""A batch over eight adapters against the base model alone, in one run: ratios of speed.

Two engines over the same weights take turns, so that other load on the machine meets both: a group
without adapters, and a group with eight. The prompts are computed before the measurement, so that
only decodes count.

    python tests/bench/adapters.py models/SmolLM2-135M-Instruct [--output 64] [--json] [--no-peft]

With peft installed the table shows what its batches of several adapters (`adapter_names` of
`generate`) lose, over its own base model.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from arriero.cluster.engine_bench import Cell, EngineBench
from arriero.shards.adapters.adapter import WEIGHTS_FILE
from arriero.shards.adapters.bank_plan import adapted_modules
from arriero.shards.adapters.peft_config import CONFIG_FILE
from arriero.shards.checkpoint.reader import Checkpoint
from arriero.shards.config.adapters import AdapterFile
from arriero.shards.config.group import GroupConfig
from arriero.shards.families.registry import family_of

NUM_ADAPTERS, RANK = 8, 16
KINDS = ("attention", "mlp")
TARGETS = {"batch over 8 adapters": 0.85, "base requests beside adapters": 0.98}
"""Least ratio of speeds, over the group without adapters."""


@dataclass(frozen=True)
class Turn:
    """A round of one engine: seconds, CPU seconds of the process, tokens per second."""

    elapsed_s: float
    cpu_s: float
    tokens_per_s: float


def write_adapters(model: Path, folder: Path) -> tuple[AdapterFile, ...]:
    """Adapters of every matrix of attention and MLP, as peft writes them for "all-linear"."""
    from safetensors.torch import save_file

    config = Checkpoint.open(model).config
    modules = adapted_modules(family_of(config).modules(config, True))
    changed = [module for module in modules if module.kind in KINDS]
    names = sorted({module.name.rpartition(".")[2] for module in changed})
    files = []
    for number in range(NUM_ADAPTERS):
        at = folder / str(number)
        at.mkdir()
        settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": names}
        (at / CONFIG_FILE).write_text(json.dumps(settings | {"task_type": "CAUSAL_LM"}))
        generator = torch.Generator().manual_seed(number)
        tensors = {}
        for module in changed:
            outs, ins = module.shape
            prefix = f"base_model.model.{module.name}"
            a = torch.randn(RANK, ins, generator=generator) / ins**0.5
            b = torch.randn(outs, RANK, generator=generator) / 100
            tensors[f"{prefix}.lora_A.weight"] = a
            tensors[f"{prefix}.lora_B.weight"] = b
        save_file(tensors, at / WEIGHTS_FILE)
        files.append(AdapterFile(name=f"a{number}", path=str(at)))
    return tuple(files)


def run_once(bench: EngineBench, cell: Cell, adapters: Sequence[str] = ()) -> Turn:
    """Compute the prompts, then measure the decodes."""
    prompts = cell.prompts()
    bench.run(prompts, 1, adapters=adapters)
    started_s = time.process_time()
    figures = bench.run(prompts, cell.output, adapters=adapters)
    return Turn(
        elapsed_s=figures.elapsed_s,
        cpu_s=time.process_time() - started_s,
        tokens_per_s=figures.output_tok_s,
    )


def measure(
    model: Path, files: tuple[AdapterFile, ...], cell: Cell, settings: dict[str, Any], rounds: int
) -> list[dict[str, Any]]:
    """Rounds of both engines in turns: medians of speeds and ratios.

    The engines are built twice, in both orders: where an engine's memory lies is luck, and moves
    its speed by some percent.
    """
    turns: dict[str, list[Turn]] = {"base": [], **{name: [] for name in TARGETS}}
    plain = GroupConfig(model_path=str(model), num_blocks=cell.blocks() + 64, **settings)
    with_adapters = replace(plain, adapters=files)
    for order in ((plain, with_adapters), (with_adapters, plain)):
        with EngineBench(order[0]) as first, EngineBench(order[1]) as second:
            base, beside = (first, second) if order[0] is plain else (second, first)
            mixed = [beside.adapters[i % len(files)] for i in range(cell.requests)]
            runs: list[tuple[EngineBench, Sequence[str]]] = [
                (base, ()),
                (beside, mixed),
                (beside, ()),
            ]
            numbered = list(zip(turns, runs, strict=True))
            for number in range(rounds):
                for name, (bench, adapters) in numbered if number % 2 else numbered[::-1]:
                    turns[name].append(run_once(bench, cell, adapters))
                print(f"round {number + 1} of {rounds}", file=sys.stderr, flush=True)
    return [_row(name, turns["base"], turns[name]) for name in TARGETS]


def _row(name: str, base: Sequence[Turn], measured: Sequence[Turn]) -> dict[str, Any]:
    pairs = list(zip(base, measured, strict=True))
    ratio = median(before.elapsed_s / after.elapsed_s for before, after in pairs)
    return {
        "case": name,
        "base_tokens_per_s": median(turn.tokens_per_s for turn in base),
        "tokens_per_s": median(turn.tokens_per_s for turn in measured),
        "ratio": ratio,
        "cpu_ratio": median(before.cpu_s / after.cpu_s for before, after in pairs),
        "target": TARGETS[name],
        "reached": ratio >= TARGETS[name],
    }


def peft_row(
    model: Path, files: Sequence[AdapterFile], cell: Cell, dtype: str, rounds: int, threads: int
) -> dict[str, Any]:
    """peft's batches of several adapters over its base model, in turns; prompts included."""
    import peft
    import transformers

    torch.set_num_threads(threads)
    base = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
    adapted = peft.PeftModel.from_pretrained(base, files[0].path, adapter_name=files[0].name)
    for file in files[1:]:
        adapted.load_adapter(file.path, adapter_name=file.name)
    adapted.eval()
    ids = torch.tensor(cell.prompts())
    options = {
        "max_new_tokens": cell.output,
        "min_new_tokens": cell.output,
        "do_sample": False,
        "attention_mask": torch.ones_like(ids),
    }
    names = [files[i % len(files)].name for i in range(cell.requests)]
    choices = {"base": ["__base__"] * cell.requests, "mixed": names}
    elapsed_s: dict[str, list[float]] = {"base": [], "mixed": []}
    with torch.inference_mode():
        for number in range(rounds):
            for choice in sorted(choices, reverse=bool(number % 2)):
                started_s = time.perf_counter()
                if choice == "base":  # without adapters at all: peft's best case
                    with adapted.disable_adapter():
                        adapted.generate(input_ids=ids, **options)
                else:
                    adapted.generate(input_ids=ids, adapter_names=names, **options)
                elapsed_s[choice].append(time.perf_counter() - started_s)
    tokens = cell.requests * cell.output
    pairs = zip(elapsed_s["base"], elapsed_s["mixed"], strict=True)
    return {
        "case": "peft: batch over 8 adapters",
        "base_tokens_per_s": median(tokens / each for each in elapsed_s["base"]),
        "tokens_per_s": median(tokens / each for each in elapsed_s["mixed"]),
        "ratio": median(before / after for before, after in pairs),
    }


def median(values: Iterable[float]) -> float:
    """The median, to three decimals."""
    return round(statistics.median(values), 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--output", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=4, help="for each order of building")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--quantization", help="of the base model: int8, int4 or fp8")
    parser.add_argument("--no-peft", action="store_true", help="leave out peft's own figure")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    cell = Cell(requests=args.requests, prompt=args.prompt, output=args.output)
    settings = {
        "dtype": args.dtype,
        "quantization": args.quantization,
        "threads": args.threads,
        "max_model_len": max(64, args.prompt + args.output + 16),
    }
    with tempfile.TemporaryDirectory() as folder:
        files = write_adapters(args.model, Path(folder))
        rows = measure(args.model, files, cell, settings, args.rounds)
        if not args.no_peft:
            rows.append(peft_row(args.model, files, cell, args.dtype, args.rounds, args.threads))
    if args.json:
        print(json.dumps({"bench": "adapters", "rounds": args.rounds, "rows": rows}))
        return
    print(table(rows, args.rounds))


def table(rows: list[dict[str, Any]], rounds: int) -> str:
    """A line for each case."""
    lines = [
        f"medians of {rounds} rounds in turns; tokens/s are decodes (peft: with the prompts)",
        f"{'case':32} {'base':>8} {'measured':>8} {'ratio':>6} {'bar':>5}    {'CPU':>6}",
    ]
    for row in rows:
        line = (
            f"{row['case']:32} {row['base_tokens_per_s']:8.1f} {row['tokens_per_s']:8.1f} "
            f"{row['ratio']:6.3f}"
        )
        if "target" in row:
            reached = "ok" if row["reached"] else "--"
            line += f" {row['target']:5.2f} {reached} {row['cpu_ratio']:6.3f}"
        lines.append(line)
    return "\n".join(lines)


if __name__ == "__main__":
    main()
