"""Speculative decoding against decoding without, in one run: ratios of speed, and the same tokens.

Two engines over the same weights take turns, so that other load on the machine meets both. The
prompts are computed before the measurement, so that only decodes count.

    python tests/bench/speculation.py models/SmolLM2-135M-Instruct [--output 128] [--json]
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from arriero.cluster.engine_bench import EngineBench, params
from arriero.shards.config.group import GroupConfig
from arriero.shards.config.sampling_params import SamplingParams
from arriero.shards.config.speculation import SpeculationConfig

Prompts = list[list[int]]


@dataclass(frozen=True)
class Case:
    """A load, and the ratio that speculation must reach.

    Attributes:
        name: what the load is.
        kind: kind of drafts.
        prompts: prompts of a round.
        target: least ratio of speeds, with over without.
        sampling: parameters; greedy for None.
        warm: rounds before the measurement, from which the source of drafts learns.
    """

    name: str
    kind: str
    prompts: Callable[[int], Prompts]
    target: float
    sampling: SamplingParams | None = None
    warm: int = 0


PASSAGE = (
    "The harbour master keeps a book of every ship that enters the port: name, flag, cargo, "
    "length and the hour of arrival. At noon the clerk copies new entries to the ledger, and in "
    "the evening the ledger goes to the town hall, where three people compare each line with the "
    "pilots' notes. Ships that carry grain are inspected first, ships with timber wait, and mail "
    "boats pass at once."
)
CALL = (
    '{"tool": "read_file", "arguments": {"path": "src/app/main.py", "start_line": 1, "end_line": '
    '200}, "reason": "look at the entry point before a change"}\n'
)


def cases(tokenizer: Tokenizer, output: int) -> list[Case]:
    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text).ids
        return ids

    def copied(round_: int) -> Prompts:
        return [encode(f"{PASSAGE}\n\n{PASSAGE}\n\n{PASSAGE[:60]}")]

    def agent(round_: int) -> Prompts:
        return [encode(f"Task {round_}: list the calls.\n{CALL[:40]}")]

    def unlike(round_: int) -> Prompts:
        rng = random.Random(round_)
        return [[rng.randrange(100, 40_000) for _ in range(24)] for _ in range(32)]

    def story(round_: int) -> Prompts:
        return [encode(f"Chapter {round_}. On that evening, far from the city,")]

    drawn = SamplingParams(temperature=1.0, max_tokens=output, ignore_eos=True, seed=5)
    return [
        Case("copy-heavy, one request", "ngram", copied, 2.0),
        Case("repeated outputs, one request", "suffix", agent, 2.0, warm=2),
        Case("batch of 32, nothing to copy", "ngram", unlike, 0.97, sampling=drawn),
        Case("drawn text, one request", "ngram", story, 0.97, sampling=drawn),
    ]


def measure(model: Path, case: Case, output: int, rounds: int, threads: int) -> dict[str, Any]:
    """Take turns; gives the median of the rounds' ratios and what was accepted."""
    benches = {}
    for kind in ("off", case.kind):
        config = GroupConfig(
            model_path=str(model),
            threads=threads,
            num_blocks=4096,
            max_model_len=2048,
            speculation=SpeculationConfig.checked(kind),
        )
        benches[kind] = EngineBench(config)
    ratios, cpu_ratios, lengths = [], [], []
    try:
        for number in range(case.warm + rounds):
            prompts = case.prompts(number)
            seconds: dict[str, tuple[float, float]] = {}
            digests = set()
            for kind in ("off", case.kind) if number % 2 else (case.kind, "off"):
                bench = benches[kind]
                bench.run(prompts, 1, one_token(case.sampling))
                started_s = time.process_time()
                figures = bench.run(prompts, output, case.sampling)
                seconds[kind] = figures.elapsed_s, time.process_time() - started_s
                digests.add(figures.tokens_digest)
                if kind != "off" and number >= case.warm:
                    lengths.append(figures.mean_accepted_length)
            assert len(digests) == 1, f"{case.name}: other tokens with speculation"
            if number >= case.warm:
                (off_s, off_cpu_s), (on_s, on_cpu_s) = seconds["off"], seconds[case.kind]
                ratios.append(off_s / on_s)
                cpu_ratios.append(off_cpu_s / on_cpu_s)
    finally:
        for bench in benches.values():
            bench.close()
    return {
        "case": case.name,
        "kind": case.kind,
        "ratio": round(statistics.median(ratios), 3),
        "cpu_ratio": round(statistics.median(cpu_ratios), 3),
        "target": case.target,
        "mean_accepted_length": round(statistics.mean(lengths), 2),
    }


def one_token(sampling: SamplingParams | None) -> SamplingParams:
    """Parameters of a request that computes the prompt and no more."""
    first = params(1)
    return first if sampling is None else SamplingParams(temperature=1.0, max_tokens=1, seed=5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--output", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", type=int, nargs="*", help="numbers of cases, from 0")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    chosen = cases(tokenizer, args.output)
    if args.only is not None:
        chosen = [chosen[number] for number in args.only]
    rows = [measure(args.model, case, args.output, args.rounds, args.threads) for case in chosen]
    if args.json:
        print(json.dumps({"bench": "speculation", "rows": rows}))
        return
    for row in rows:
        print(
            f"{row['case']:32} {row['kind']:7} {row['ratio']:6.2f} x (least {row['target']}), CPU "
            f"time {row['cpu_ratio']:.2f} x, {row['mean_accepted_length']} tokens of a step"
        )


if __name__ == "__main__":
    main()
