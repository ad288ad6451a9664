"""Rows a second of `arriero.cluster.data.processor` beside Ray's own HTTP processor.

    ARRIERO_TEST_MODEL=… python tests/bench/data_rows.py [--rows 10000] [--kill] [--real] [--json]

Two groups and two gateways on a Ray cluster of their own; the data set runs on the same cluster. A
tiny random model computes, with the checkpoint's tokenizer, so that the way of a row counts; with
`--real` the checkpoint itself. First the processors take turns, with the same 1,000 rows
(`--compared-rows`), the same requests and as many actors and rows in flight. Then our processor
alone answers `--rows`; with `--kill` a group is killed when half of these rows are back. Prints a
JSON line for each run, and in a long run for each 1,000 rows; the exit code is 1 when a row is
missing, there twice, or without an answer. `--json`: the last line is one JSON object of all runs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from arriero.cluster.connection import connected
from support.tiny_deployment import TinyDeployment, tiny_deployment

if TYPE_CHECKING:
    from ray.data import Dataset

Row = dict[str, Any]
Process = Callable[["Dataset"], "Dataset"]
BATCH, ACTORS, MAX_TOKENS, PROGRESS = 64, 2, 8, 1000


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """What came of a run.

    Attributes:
        name: of the processor.
        num_rows: rows of the data set.
        seconds: from the start of the pipeline to the last row.
        names: how often each row came back.
        num_errors: rows with an error.
    """

    name: str
    num_rows: int
    seconds: float
    names: Counter[int]
    num_errors: int

    @property
    def right(self) -> bool:
        """Whether each row came back once and with an answer."""
        return self.names == Counter(range(self.num_rows)) and not self.num_errors

    def figures(self) -> Row:
        """The figures of the run."""
        return {
            "processor": self.name,
            "rows": self.names.total(),
            "rows_per_s": round(self.num_rows / self.seconds, 1),
            "errors": self.num_errors,
            "each_row_once": self.names == Counter(range(self.num_rows)),
        }


def run(
    name: str, process: Process, num_rows: int, at_half: Callable[[], None] | None = None
) -> Result:
    """Answer the rows; prints a line for each 1,000 rows.

    Args:
        name: of the processor.
        process: the processor.
        num_rows: rows of the data set.
        at_half: called when half of the rows are back.
    """
    import ray

    names: Counter[int] = Counter()
    num_errors = 0
    started_s = time.monotonic()
    for row in process(ray.data.range(num_rows)).iter_rows():
        names[row["id"]] += 1
        num_errors += row["error"] is not None
        count = names.total()
        if at_half is not None and count == num_rows // 2:
            at_half()
        if count % PROGRESS == 0 and count < num_rows:
            elapsed_s = time.monotonic() - started_s
            show({"processor": name, "rows_so_far": count, "rows_per_s": round(count / elapsed_s)})
    elapsed_s = time.monotonic() - started_s
    return Result(
        name=name, num_rows=num_rows, seconds=elapsed_s, names=names, num_errors=num_errors
    )


def show(figures: Row) -> Row:
    """Print the figures of a part at once."""
    print(json.dumps(figures), flush=True)
    return figures


def compare(deployed: TinyDeployment, args: argparse.Namespace) -> tuple[list[Row], bool]:
    """The printed lines of the runs, and whether each row was answered once in each run."""
    processors = {"grpc": by_grpc(), "http": by_http(deployed.urls()[0])}
    for name, process in processors.items():
        run(name, process, min(args.compared_rows, 4 * BATCH))
    results: list[Result] = []
    lines: list[Row] = []
    for number in range(args.rounds):
        for name in list(processors)[:: 1 if number % 2 == 0 else -1]:
            results.append(run(name, processors[name], args.compared_rows))
            lines.append(show(results[-1].figures()))
    grpc_s, http_s = (
        statistics.median(result.seconds for result in results if result.name == name)
        for name in processors
    )
    lines.append(show({"grpc_over_http": round(http_s / grpc_s, 2), "rows": args.compared_rows}))
    kill = partial(deployed.kill_group, random.Random(1)) if args.kill else None
    name = "grpc, a group killed" if args.kill else "grpc"
    results.append(run(name, processors["grpc"], args.rows, kill))
    lines.append(show(results[-1].figures()))
    return lines, all(result.right for result in results)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    model = os.environ.get("ARRIERO_TEST_MODEL")
    parser.add_argument("--model", type=Path, default=model, required=not model)
    parser.add_argument("--rows", type=int, default=10_000, help="of the last, long run")
    parser.add_argument(
        "--compared-rows", type=int, default=1_000, help="of each run that compares processors"
    )
    parser.add_argument("--rounds", type=int, default=1, help="of the runs that compare")
    parser.add_argument("--kill", action="store_true", help="kill a group in the long run")
    parser.add_argument("--real", action="store_true", help="serve the checkpoint itself")
    parser.add_argument("--json", action="store_true", help="the last line is one JSON object")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = Path(args.model).resolve()
        with tiny_deployment(Path(folder), model, real=args.real) as deployed:
            os.environ |= deployed.environment
            with connected(deployed.deployment):
                lines, all_right = compare(deployed, args)
    if args.json:
        print(json.dumps({"runs": lines, "all_right": all_right}))
    sys.exit(not all_right)


if __name__ == "__main__":
    main()
