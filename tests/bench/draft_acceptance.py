"""How often is a drafted token right: coupled draws, against rejection sampling, for a model pair?

Usage: PYTHONPATH=tests draft_acceptance.py TARGET --draft FOLDER --eagle3 FOLDER [--tokens 256]

Each row of the table is a temperature and a depth of the chain, over positions whose drafts before
were all right. `coupled` counts drafts that equal the target's draw: both draw by an exponential
race with the same noise for each token, at the same seed and position. `rejection` is the mean of
sum(min(p, q)), which standard rejection sampling accepts; `greedy` the mean of p(argmax q), for
drafts without noise. The column `deviation` is that of the mean `coupled`.
The tokens of each run are compared with a run without drafts. A head runs with its taps, and with
each tap one layer earlier and later, as the wrong meaning of explicit tap ids would take them.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from arriero.kernels.select import ops_for
from arriero.shards.config.sampling_params import SamplingParams
from arriero.shards.models.eagle3.config import Eagle3Config
from support.draft_loop import DraftLoop

NAMES = ("coupled", "deviation", "rejection", "greedy")
ASKS = (
    "Explain how a bicycle works.",
    "Write a Python function that reverses a list.",
    "Tell a short story about a lighthouse.",
    "What is the difference between weather and climate?",
    "Give three reasons to read books.",
    "Summarize: The copyright holder grants you a licence to copy, change and distribute the work.",
    "How do I boil an egg?",
    "List the planets of the solar system with a fact about each.",
)


class Measured(DraftLoop):
    """A loop that compares the distributions of drafts and draws."""

    temperature = 0.0

    def start(self, temperature: float) -> None:
        """Forget what was measured."""
        self.temperature = temperature
        self.sums: dict[int, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        self.counts: dict[int, int] = defaultdict(int)
        self._drafted: dict[tuple[int, int], tuple[int, Tensor, int]] = {}
        self._chain: list[tuple[np.ndarray, np.ndarray, Tensor, Tensor]] = []
        network, draw = self.drafter._network, type(self.drafter)._draw
        drafter = self.drafter

        def recorded(logits: Tensor, slots: np.ndarray, positions: np.ndarray) -> Tensor:
            distributions = self.distribution(logits)
            drawn = draw(drafter, logits, slots, positions)
            self._chain.append((slots, positions, distributions, drawn))
            return drawn

        drafter._draw = recorded  # type: ignore[method-assign, assignment]
        self._size = self.model_config.vocab_size
        ids = network.token_ids_V
        self._ids = torch.arange(self._size) if ids is None else ids.long()

    def distribution(self, logits: Tensor) -> Tensor:
        """Probabilities, float64."""
        logits = logits.double()
        if not self.temperature:
            return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
        return (logits / self.temperature).softmax(-1)

    def note_drafts(self) -> None:
        """Keep the draft distributions of the last chain by slot and position."""
        for depth, (slots, positions, distributions, drawn) in enumerate(self._chain):
            q = torch.zeros(len(slots), self._size, dtype=torch.float64)
            q[:, self._ids] = distributions
            rows = zip(slots.tolist(), positions.tolist(), q, drawn.tolist(), strict=True)
            for slot, position, row, token in rows:
                self._drafted[slot, position] = depth, row, token
        self._chain = []

    def compare(self, slot: int, position: int, logits: Tensor, token: int) -> None:
        """Compare a draw of the target with the draft for its position."""
        if (slot, position) not in self._drafted:
            return
        depth, q, draft = self._drafted.pop((slot, position))
        p = self.distribution(logits)
        sums = self.sums[depth]
        self.counts[depth] += 1
        sums["coupled"] += float(draft == token)
        sums["rejection"] += float(torch.minimum(p, q).sum())
        sums["greedy"] += float(p[q.argmax()])


def run(loop: Measured, prompts: list[list[int]], temperature: float, tokens: int, k: int) -> Any:  # noqa: ANN401
    """Draft and verify; gives the table's rows and the tokens."""
    loop.start(temperature)
    texts = [
        loop.enter(slot, prompt, SamplingParams(temperature=temperature, seed=100 + slot))
        for slot, prompt in enumerate(prompts)
    ]
    slots = list(range(len(prompts)))
    steps = 0
    while min(len(text.tokens) - text.num_prompt for text in texts) < tokens:
        loop.step(slots, k, ahead=k)
        loop.note_drafts()
        steps += 1
    rows = {}
    for depth in sorted(loop.counts):
        count = loop.counts[depth]
        row = {name: loop.sums[depth][name] / count for name in NAMES}
        row["deviation"] = (row["coupled"] * (1 - row["coupled"]) / count) ** 0.5
        rows[depth] = row | {"n": count}
    emitted = [n for text in texts for n in text.emitted]
    out = [text.tokens[text.num_prompt :][:tokens] for text in texts]
    return rows, sum(emitted) / max(1, len(emitted)), out


def plain(loop: Measured, prompts: list[list[int]], temperature: float, tokens: int) -> Any:  # noqa: ANN401
    """The tokens without drafts."""
    loop.start(temperature)
    texts = [
        loop.enter(slot, prompt, SamplingParams(temperature=temperature, seed=100 + slot))
        for slot, prompt in enumerate(prompts)
    ]
    for _ in range(tokens):
        loop.step(list(range(len(prompts))))
    return [text.tokens[text.num_prompt :][:tokens] for text in texts]


def main() -> None:
    """Measure each drafter at each temperature."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("target", type=Path)
    parser.add_argument("--draft", type=Path)
    parser.add_argument("--eagle3", type=Path)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--texts", type=int, default=8)
    parser.add_argument("--depth", type=int, default=3)
    parser.add_argument("--temperatures", default="0,0.7,1")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(arguments.target / "tokenizer.json"))
    prompts = [
        tokenizer.encode(
            f"<|im_start|>user\n{ask}<|im_end|>\n<|im_start|>assistant\n", add_special_tokens=False
        ).ids
        for ask in ASKS[: arguments.texts]
    ]
    runs: list[tuple[str, str, Path, tuple[int, ...] | None]] = []
    if arguments.draft:
        runs.append(("draft", "draft", arguments.draft, None))
    if arguments.eagle3:
        head = Eagle3Config.from_folder(arguments.eagle3)
        layers = json.loads((arguments.target / "config.json").read_text())["num_hidden_layers"]
        taps = head.taps(layers)
        runs.append((f"eagle3, taps {taps}", "eagle3", arguments.eagle3, taps))
        for shift in (-1, 1):
            moved = tuple(tap + shift for tap in taps)
            runs.append((f"eagle3, taps {moved}", "eagle3", arguments.eagle3, moved))
    results = []
    known: dict[float, Any] = {}
    for name, kind, folder, taps_ in runs:
        ops = ops_for(torch.device("cpu"), threads=1)
        loop = Measured(
            arguments.target,
            kind,  # type: ignore[arg-type]
            folder,
            ops,
            sequences=len(prompts),
            dtype="bfloat16",
            taps=taps_,
        )
        for temperature in map(float, arguments.temperatures.split(",")):
            if temperature not in known:
                known[temperature] = plain(loop, prompts, temperature, arguments.tokens)
            rows, mean, tokens = run(loop, prompts, temperature, arguments.tokens, arguments.depth)
            assert tokens == known[temperature], "drafts changed a token"
            results.append(
                {"drafter": name, "temperature": temperature, "mean": mean, "rows": rows}
            )
            show(name, temperature, mean, rows)
    if arguments.json:
        print(json.dumps(results))


def show(name: str, temperature: float, mean: float, rows: dict[int, dict[str, float]]) -> None:
    """Print a part of the table."""
    print(f"{name}, temperature {temperature:g}: {mean:.2f} tokens a verified step", flush=True)
    print("  depth      n " + " ".join(f"{column:>10}" for column in NAMES))
    for depth, row in rows.items():
        numbers = " ".join(f"{row[column]:10.3f}" for column in NAMES)
        print(f"  {depth + 1:5d} {row['n']:6d} {numbers}", flush=True)


if __name__ == "__main__":
    main()
