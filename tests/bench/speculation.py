"""Speculative decoding against decoding without, in one run: ratios of speed, and the same tokens.

Two engines over the same weights take turns, so that other load on the machine meets both. The
prompts are computed before the measurement, so that only decodes count.

    python tests/bench/speculation.py models/SmolLM2-135M-Instruct [--output 128] [--json]
        [--llama-lookup PROGRAM --gguf FILE]

The agents (`agent_turns.py`) answer turn after turn; their table also shows which share of the
answers stood in earlier answers of the session, and which share in the turn's own prompt.

With llama.cpp's `llama-lookup` and a GGUF file of the same model, the table shows what its prompt
lookup gains on the same prompt, over its own plain decoding.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from arriero.cluster.engine_bench import EngineBench, params
from arriero.shards.config.group import GroupConfig
from arriero.shards.config.sampling_params import SamplingParams
from arriero.shards.config.speculation import SpeculationConfig

from agent_turns import LEARNED, Session, repeated, sessions  # isort: skip
from llama_lookup import LlamaLookup  # isort: skip

Prompts = list[list[int]]
Row = dict[str, Any]
AGENTS_KIND, AGENTS_TARGET = "suffix", 2.0


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


@contextmanager
def engines(model: Path, kind: str, threads: int) -> Iterator[dict[str, EngineBench]]:
    """An engine without drafts and an engine with drafts of a kind."""
    benches: dict[str, EngineBench] = {}
    try:
        for each in ("off", kind):
            benches[each] = EngineBench(
                GroupConfig(
                    model_path=str(model),
                    threads=threads,
                    num_blocks=4096,
                    max_model_len=2048,
                    speculation=SpeculationConfig.checked(each),
                )
            )
        yield benches
    finally:
        for bench in benches.values():
            bench.close()


def measure(model: Path, case: Case, output: int, rounds: int, threads: int) -> Row:
    """Rounds of off and the kind in turns: medians of speeds and ratios, and what was accepted."""
    turns: list[dict[str, Turn]] = []
    with engines(model, case.kind, threads) as benches:
        for number in range(case.warm + rounds):
            prompts = case.prompts(number)
            turn = both(benches, number, prompts, output, case.sampling)
            if number >= case.warm:
                turns.append(turn)
    return row_of(case.name, case.kind, case.target, turns)


def both(
    benches: dict[str, EngineBench],
    number: int,
    prompts: Prompts,
    output: int,
    sampling: SamplingParams | None,
    salt: bytes = b"",
) -> dict[str, Turn]:
    """The same prompts on both engines, in an order that changes with `number`."""
    names = list(benches)
    order = names if number % 2 else names[::-1]
    turn = {name: run_once(benches[name], prompts, output, sampling, salt) for name in order}
    off, on = (turn[name].outputs for name in names)
    assert off == on, f"other tokens with speculation for {prompts}"
    return turn


def row_of(name: str, kind: str, target: float, turns: list[dict[str, Turn]]) -> Row:
    """A line of the table."""
    off, on = ([turn[key] for turn in turns] for key in ("off", kind))
    pairs = list(zip(off, on, strict=True))
    ratio = median(before.elapsed_s / after.elapsed_s for before, after in pairs)
    return {
        "case": name,
        "kind": kind,
        "off_tokens_per_s": median(turn.tokens_per_s for turn in off),
        "tokens_per_s": median(turn.tokens_per_s for turn in on),
        "ratio": ratio,
        "cpu_ratio": median(before.cpu_s / after.cpu_s for before, after in pairs),
        "target": target,
        "reached": ratio >= target,
        "mean_accepted_length": median(turn.mean_accepted_length for turn in on),
    }


def measure_agents(
    model: Path, agents: list[Session], output: int, rounds: int, threads: int
) -> list[Row]:
    """A line for each agent, and a line for all agents together."""
    by_agent: dict[str, list[dict[str, Turn]]] = {agent.name: [] for agent in agents}
    shares: dict[str, list[tuple[float, float]]] = {agent.name: [] for agent in agents}
    totals: list[dict[str, Turn]] = []
    with engines(model, AGENTS_KIND, threads) as benches:
        for number in range(rounds):
            everything: list[dict[str, Turn]] = []
            for agent in agents:
                answered: Prompts = []
                measured: list[dict[str, Turn]] = []
                for at, prompt in enumerate(agent.prompts):
                    salt = f"round {number}".encode()
                    sampling = agent.sampling(output)
                    turn = both(benches, number + at, [prompt], output, sampling, salt)
                    (answer,) = turn["off"].outputs
                    if at >= LEARNED:
                        measured.append(turn)
                        before = repeated(answer, answered), repeated(answer, [prompt])
                        shares[agent.name].append(before)
                    answered.append(answer)
                by_agent[agent.name].append(total(measured))
                everything += measured
            totals.append(total(everything))
    rows = []
    for name, turns in by_agent.items():
        row = row_of(f"agent {name}", AGENTS_KIND, AGENTS_TARGET, turns)
        row["in_earlier_answers"] = median(share for share, _ in shares[name])
        row["in_prompt"] = median(share for _, share in shares[name])
        rows.append(row)
    return [*rows, row_of("all agents", AGENTS_KIND, AGENTS_TARGET, totals)]


def total(turns: list[dict[str, Turn]]) -> dict[str, Turn]:
    """Several turns as one."""
    return {
        name: Turn(
            elapsed_s=sum(turn[name].elapsed_s for turn in turns),
            cpu_s=sum(turn[name].cpu_s for turn in turns),
            outputs=[output for turn in turns for output in turn[name].outputs],
            mean_accepted_length=statistics.mean(turn[name].mean_accepted_length for turn in turns),
        )
        for name in turns[0]
    }


@dataclass(frozen=True)
class Turn:
    """A round of one engine: seconds, CPU seconds of the process, and what it gave."""

    elapsed_s: float
    cpu_s: float
    outputs: Prompts
    mean_accepted_length: float

    @property
    def tokens_per_s(self) -> float:
        """Rate of the decodes."""
        return sum(map(len, self.outputs)) / self.elapsed_s


def run_once(
    bench: EngineBench,
    prompts: Prompts,
    output: int,
    sampling: SamplingParams | None,
    salt: bytes = b"",
) -> Turn:
    """Compute the prompts, then measure the decodes."""
    bench.answers(prompts, 1, one_token(sampling), salt)
    started_s = time.process_time()
    figures, outputs = bench.answers(prompts, output, sampling, salt)
    return Turn(
        elapsed_s=figures.elapsed_s,
        cpu_s=time.process_time() - started_s,
        outputs=outputs,
        mean_accepted_length=figures.mean_accepted_length,
    )


def median(values: Iterable[float]) -> float:
    """The median, to three decimals."""
    return round(statistics.median(values), 3)


def one_token(sampling: SamplingParams | None) -> SamplingParams:
    """Parameters of a request that computes the prompt and no more."""
    return params(1) if sampling is None else replace(sampling, max_tokens=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--output", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", type=int, nargs="*", help="numbers of cases, from 0")
    parser.add_argument("--no-agents", action="store_true", help="leave out the agents")
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
    if not args.no_agents:
        agents = sessions(tokenizer)
        rows += measure_agents(args.model, agents, args.output, args.rounds, args.threads)
    if args.llama_lookup is not None:
        peer = LlamaLookup(program=args.llama_lookup, model=args.gguf, threads=args.threads)
        for case, row in zip(chosen, rows, strict=False):
            if case.text is not None:
                row["llama_lookup_ratio"] = peer.ratio(case.text, args.output, args.rounds)
    if args.json:
        print(json.dumps({"bench": "speculation", "rounds": args.rounds, "rows": rows}))
        return
    print(table(rows, args.rounds))


def table(rows: list[Row], rounds: int) -> str:
    """A line for each case."""
    lines = [
        f"medians of {rounds} rounds, off and the kind in turns; tokens/s are decodes",
        f"{'case':32} {'kind':7} {'off':>8} {'on':>8} {'ratio':>6} {'bar':>5}    "
        f"{'CPU':>5} {'tokens a step':>13} {'earlier':>7} {'prompt':>6} {'llama.cpp lookup':>16}",
    ]
    for row in rows:
        reached = "ok" if row["reached"] else "--"
        optional = (
            row.get("in_earlier_answers"),
            row.get("in_prompt"),
            row.get("llama_lookup_ratio"),
        )
        earlier, prompt, peer = ("" if value is None else f"{value:.2f}" for value in optional)
        lines.append(
            f"{row['case']:32} {row['kind']:7} {row['off_tokens_per_s']:8.1f} "
            f"{row['tokens_per_s']:8.1f} {row['ratio']:6.2f} {row['target']:5.2f} {reached} "
            f"{row['cpu_ratio']:5.2f} {row['mean_accepted_length']:13.2f} {earlier:>7} {prompt:>6} "
            f"{peer:>16}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
