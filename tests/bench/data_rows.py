"""Rows a second of `arriero.cluster.data.processor` beside Ray's own HTTP processor.

    ARRIERO_TEST_MODEL=… python tests/bench/data_rows.py [--rows 10000] [--kill] [--real]

Two groups and two gateways on a Ray cluster of their own; the data set runs on the same cluster. A
tiny random model computes, with the checkpoint's tokenizer, so that the way of a row counts; with
`--real` the checkpoint itself. The processors take turns, with the same rows, the same requests and
as many actors and rows in flight. With `--kill` a last run of our processor loses a group in the
middle. Prints a JSON line for each run; the exit code is 1 when a row is missing, there twice, or
without an answer.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from arriero.cluster.connection import connected
from support.tiny_deployment import TinyDeployment, tiny_deployment

if TYPE_CHECKING:
    from ray.data import Dataset

Row = dict[str, Any]
Process = Callable[["Dataset"], "Dataset"]
BATCH, ACTORS, MAX_TOKENS = 64, 2, 8


def messages(number: int) -> list[dict[str, str]]:
    """The request of a row."""
    return [{"role": "user", "content": f"Name {number} things."}]


def by_grpc() -> Process:
    """Our processor."""
    from arriero.cluster.data import processor

    return processor(
        model="tiny",
        sampling={"max_tokens": MAX_TOKENS, "temperature": 0.0},
        preprocess=lambda row: {"id": row["id"], "messages": messages(row["id"])},
        postprocess=lambda row: {"id": row["id"], "error": row["error"]},
        batch_size=BATCH,
        concurrency=ACTORS,
    )


def by_http(url: str) -> Process:
    """Ray's HTTP processor, which knows a single gateway."""
    from ray.data.llm import HttpRequestProcessorConfig, build_processor

    config = HttpRequestProcessorConfig(
        url=f"{url}/chat/completions",
        headers={"x-background": "1"},
        batch_size=BATCH,
        concurrency=ACTORS,
        max_retries=10,
    )

    def preprocess(row: Row) -> Row:
        fields = {"model": "tiny", "max_tokens": MAX_TOKENS, "temperature": 0.0}
        return {"id": row["id"], "payload": {**fields, "messages": messages(row["id"])}}

    def postprocess(row: Row) -> Row:
        choices = row["http_response"].get("choices")
        return {"id": row["id"], "error": None if choices else "no choices"}

    process: Process = build_processor(config, preprocess=preprocess, postprocess=postprocess)
    return process


def run(process: Process, num_rows: int) -> tuple[float, Counter[int], int]:
    """Seconds, how often each row came back, and the number of rows with an error."""
    import ray

    names: Counter[int] = Counter()
    num_errors = 0
    started_s = time.monotonic()
    for row in process(ray.data.range(num_rows)).iter_rows():
        names[row["id"]] += 1
        num_errors += row["error"] is not None
    return time.monotonic() - started_s, names, num_errors


def report(name: str, num_rows: int, result: tuple[float, Counter[int], int]) -> bool:
    """Print a run; False when a row is missing, there twice, or without an answer."""
    seconds, names, num_errors = result
    complete = names == Counter(range(num_rows))
    figures = {
        "processor": name,
        "rows": names.total(),
        "rows_per_s": round(num_rows / seconds, 1),
        "errors": num_errors,
        "each_row_once": complete,
    }
    print(json.dumps(figures), flush=True)
    return complete and not num_errors


def compare(deployed: TinyDeployment, args: argparse.Namespace) -> bool:
    """Run the processors in turn; whether each row was answered once in each run."""
    warm = min(args.rows, 4 * BATCH)
    processors = {"grpc": by_grpc(), "http": by_http(deployed.urls()[0])}
    for process in processors.values():
        run(process, warm)
    seconds: dict[str, list[float]] = {name: [] for name in processors}
    all_right = True
    for number in range(args.rounds):
        for name in list(processors)[:: 1 if number % 2 == 0 else -1]:
            result = run(processors[name], args.rows)
            all_right &= report(name, args.rows, result)
            seconds[name].append(result[0])
    grpc_s, http_s = (statistics.median(seconds[name]) for name in ("grpc", "http"))
    print(json.dumps({"grpc_over_http": round(http_s / grpc_s, 2)}), flush=True)
    if args.kill:
        killer = threading.Timer(grpc_s / 2, deployed.kill_group, [random.Random(1)])
        killer.start()
        all_right &= report("grpc, a group killed", args.rows, run(processors["grpc"], args.rows))
        killer.join()
    return all_right


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=os.environ.get("ARRIERO_TEST_MODEL"))
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--kill", action="store_true", help="kill a group in a last run")
    parser.add_argument("--real", action="store_true", help="serve the checkpoint itself")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = Path(args.model).resolve()
        with tiny_deployment(Path(folder), model, real=args.real) as deployed:
            os.environ |= deployed.environment
            with connected(deployed.deployment):
                all_right = compare(deployed, args)
    sys.exit(not all_right)


if __name__ == "__main__":
    main()
