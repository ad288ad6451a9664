"""Speculative decoding against decoding without, in one run: ratios of speed, and the same tokens.

Two engines over the same weights take turns, so that other load on the machine meets both. The
prompts are computed before the measurement, so that only decodes count.

    python tests/bench/speculation.py models/SmolLM2-135M-Instruct [--output 128] [--json]
        [--llama-lookup PROGRAM --gguf FILE]

With llama.cpp's `llama-lookup` and a GGUF file of the same model, the table shows what its prompt
lookup gains on the same prompt, over its own plain decoding.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from arriero.cluster.engine_bench import EngineBench, params
from arriero.shards.config.group import GroupConfig
from arriero.shards.config.sampling_params import SamplingParams
from arriero.shards.config.speculation import SpeculationConfig

from llama_lookup import LlamaLookup  # isort: skip

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
        text: the prompt, for llama.cpp; None where there is no peer.
    """

    name: str
    kind: str
    prompts: Callable[[int], Prompts]
    target: float
    sampling: SamplingParams | None = None
    warm: int = 0
    text: str | None = None


PASSAGE = (
    "The harbour master keeps a book of every ship that enters the port: name, flag, cargo, "
    "length and the hour of arrival. At noon the clerk copies new entries to the ledger, and in "
    "the evening the ledger goes to the town hall, where three people compare each line with the "
    "pilots' notes. Ships that carry grain are inspected first, ships with timber wait, and mail "
    "boats pass at once."
)
COPIED = f"{PASSAGE}\n\n{PASSAGE}\n\n{PASSAGE[:60]}"
CALL = (
    '{"tool": "read_file", "arguments": {"path": "src/app/main.py", "start_line": 1, "end_line": '
    '200}, "reason": "look at the entry point before a change"}\n'
)


def cases(tokenizer: Tokenizer, output: int) -> list[Case]:
    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text).ids
        return ids

    def copied(round_: int) -> Prompts:
        return [encode(COPIED)]

    def agent(round_: int) -> Prompts:
        return [encode(f"Task {round_}: list the calls.\n{CALL[:40]}")]

    def unlike(round_: int) -> Prompts:
        rng = random.Random(round_)
        return [[rng.randrange(100, 40_000) for _ in range(24)] for _ in range(32)]

    def story(round_: int) -> Prompts:
        return [encode(f"Chapter {round_}. On that evening, far from the city,")]

    drawn = SamplingParams(temperature=1.0, max_tokens=output, ignore_eos=True, seed=5)
    return [
        Case("copy-heavy, one request", "ngram", copied, 2.0, text=COPIED),
        Case("repeated outputs, one request", "suffix", agent, 2.0, warm=2),
        Case("batch of 32, nothing to copy", "ngram", unlike, 0.97, sampling=drawn),
        Case("drawn text, one request", "ngram", story, 0.97, sampling=drawn),
    ]


def measure(model: Path, case: Case, output: int, rounds: int, threads: int) -> dict[str, Any]:
    """Rounds of off and the kind in turns: medians of speeds and ratios, and what was accepted."""
    benches: dict[str, EngineBench] = {}
    turns: list[dict[str, Turn]] = []
    try:
        for kind in ("off", case.kind):
            benches[kind] = EngineBench(
                GroupConfig(
                    model_path=str(model),
                    threads=threads,
                    num_blocks=4096,
                    max_model_len=2048,
                    speculation=SpeculationConfig.checked(kind),
                )
            )
        for number in range(case.warm + rounds):
            order = ("off", case.kind) if number % 2 else (case.kind, "off")
            prompts = case.prompts(number)
            turn = {kind: run_once(benches[kind], prompts, output, case.sampling) for kind in order}
            same = turn["off"].tokens_digest == turn[case.kind].tokens_digest
            assert same, f"{case.name}: other tokens with speculation"
            if number >= case.warm:
                turns.append(turn)
    finally:
        for bench in benches.values():
            bench.close()
    off, on = ([turn[kind] for turn in turns] for kind in ("off", case.kind))
    ratio = median(
        before.elapsed_s / after.elapsed_s for before, after in zip(off, on, strict=True)
    )
    cpu_ratio = median(before.cpu_s / after.cpu_s for before, after in zip(off, on, strict=True))
    return {
        "case": case.name,
        "kind": case.kind,
        "off_tokens_per_s": median(turn.tokens_per_s for turn in off),
        "tokens_per_s": median(turn.tokens_per_s for turn in on),
        "ratio": ratio,
        "cpu_ratio": cpu_ratio,
        "target": case.target,
        "reached": ratio >= case.target,
        "mean_accepted_length": median(turn.mean_accepted_length for turn in on),
    }


@dataclass(frozen=True)
class Turn:
    """A round of one engine: seconds, CPU seconds of the process, and what it gave."""

    elapsed_s: float
    cpu_s: float
    tokens_per_s: float
    tokens_digest: str
    mean_accepted_length: float


def run_once(
    bench: EngineBench, prompts: Prompts, output: int, sampling: SamplingParams | None
) -> Turn:
    """Compute the prompts, then measure the decodes."""
    bench.run(prompts, 1, one_token(sampling))
    started_s = time.process_time()
    figures = bench.run(prompts, output, sampling)
    return Turn(
        elapsed_s=figures.elapsed_s,
        cpu_s=time.process_time() - started_s,
        tokens_per_s=figures.output_tok_s,
        tokens_digest=figures.tokens_digest,
        mean_accepted_length=figures.mean_accepted_length,
    )


def median(values: Iterable[float]) -> float:
    """The median, to three decimals."""
    return round(statistics.median(values), 3)


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
    parser.add_argument("--llama-lookup", type=Path, help="llama.cpp's program of this name")
    parser.add_argument("--gguf", type=Path, help="the same model for that program")
    args = parser.parse_args()
    if (args.llama_lookup is None) != (args.gguf is None):
        parser.error("give both --llama-lookup and --gguf, or none")
    tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    chosen = cases(tokenizer, args.output)
    if args.only is not None:
        chosen = [chosen[number] for number in args.only]
    rows = [measure(args.model, case, args.output, args.rounds, args.threads) for case in chosen]
    if args.llama_lookup is not None:
        peer = LlamaLookup(program=args.llama_lookup, model=args.gguf, threads=args.threads)
        for case, row in zip(chosen, rows, strict=True):
            if case.text is not None:
                row["llama_lookup_ratio"] = peer.ratio(case.text, args.output, args.rounds)
    if args.json:
        print(json.dumps({"bench": "speculation", "rounds": args.rounds, "rows": rows}))
        return
    print(table(rows, args.rounds))


def table(rows: list[dict[str, Any]], rounds: int) -> str:
    """A line for each case."""
    lines = [
        f"medians of {rounds} rounds, off and the kind in turns; tokens/s are decodes",
        f"{'case':32} {'kind':7} {'off':>8} {'on':>8} {'ratio':>6} {'bar':>5}    "
        f"{'CPU':>5} {'tokens a step':>13} {'llama.cpp lookup':>16}",
    ]
    for row in rows:
        reached = "ok" if row["reached"] else "--"
        peer = row.get("llama_lookup_ratio")
        lines.append(
            f"{row['case']:32} {row['kind']:7} {row['off_tokens_per_s']:8.1f} "
            f"{row['tokens_per_s']:8.1f} {row['ratio']:6.2f} {row['target']:5.2f} {reached} "
            f"{row['cpu_ratio']:5.2f} {row['mean_accepted_length']:13.2f} "
            f"{'' if peer is None else f'{peer:.2f}':>16}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
