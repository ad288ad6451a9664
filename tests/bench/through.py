"""What serving costs: each cell through gRPC beside the engine alone, turn by turn.

A deployment of one slice stays up (client, gateway, leader and slice share the machine's cores);
`arriero bench serve` and `arriero bench engine` run in turn. Prints JSON: by cell, output tokens a
second of both, medians over the rounds, and the median of the rounds' ratios.

Usage: through.py MODEL_DIR [--rounds 3] [--quantization int8] [--requests 1,8,32,64]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

CELLS = {1: (32, 128), 8: (128, 128), 32: (128, 128), 64: (256, 128)}


def arriero(folder: str, *args: str) -> dict[str, Any]:
    """Run the command line; gives the JSON of its last line."""
    done = subprocess.run(
        [sys.executable, "-m", "arriero.cluster.cli", *args, "--json"],
        env=os.environ | {"ARRIERO_STATE": folder},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quantization")
    parser.add_argument("--requests", default="1,8,32,64")
    args = parser.parse_args()
    numbers = [int(one) for one in args.requests.split(",")]
    rates: dict[int, list[tuple[float, float]]] = {number: [] for number in numbers}
    how = [] if args.quantization is None else ["--quantization", args.quantization]
    with tempfile.TemporaryDirectory() as folder:
        model = {
            "name": "m", "path": str(args.model.resolve()), "quantization": args.quantization,
            "kv": {"blocks": 2048, "prefix_cache": False},
        }  # fmt: skip
        spec = Path(folder, "arriero.yaml")
        spec.write_text(yaml.safe_dump({"models": [model], "gateway": {"port": 0}}))
        arriero(folder, "up", str(spec))
        try:
            for _ in range(args.rounds):
                for number in numbers:
                    prompt, output = CELLS[number]
                    cell = ["--requests", str(number), "--prompt", str(prompt)]
                    cell += ["--output", str(output)]
                    served = arriero(folder, "bench", "serve", *cell)
                    alone = arriero(
                        folder, "bench", "engine", "--model", str(args.model), *how, *cell
                    )
                    rates[number].append((served["output_tok_s"], alone["output_tok_s"]))
        finally:
            arriero(folder, "down")
    for number, found in rates.items():
        served, alone = (round(statistics.median(one), 1) for one in zip(*found, strict=True))
        share = round(statistics.median(one / other for one, other in found), 3)
        print(json.dumps({"requests": number, "serve": served, "engine": alone, "share": share}))


if __name__ == "__main__":
    main()
