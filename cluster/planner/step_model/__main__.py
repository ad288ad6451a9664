"""`make gpu-account`: the GPU work of a step of the large models, as tables or JSON.

Knows the arguments; knows nothing of how an account is computed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from arriero.cluster.planner.catalog import device
from arriero.cluster.planner.step_model import table
from arriero.cluster.planner.step_model.cases import GPUS, PER_NODE, case_steps
from arriero.cluster.planner.step_model.constants import CONSTANTS, with_bench
from arriero.shards.errors import SpecError


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the account.

    Args:
        arguments: words of the command line; None takes those of the process.

    Returns:
        The exit code: 2 for an argument that is refused.
    """
    parser = argparse.ArgumentParser(prog="gpu-account", description="GPU work of a step by item.")
    parser.add_argument("--gpu", action="append", help=f"a GPU of the planner ({', '.join(GPUS)})")
    parser.add_argument("--bench", type=Path, help="JSON of `make gpu-bench`: measured constants")
    parser.add_argument("--items", action="store_true", help="a table by item for each step too")
    parser.add_argument("--constants", action="store_true", help="the constants and their sources")
    parser.add_argument("--json", action="store_true", help="the whole account as JSON")
    chosen = parser.parse_args(arguments)
    gpus = tuple(chosen.gpu or GPUS)
    try:
        devices = [device(gpu, None, PER_NODE) for gpu in gpus]
        constants = CONSTANTS
        if chosen.bench is not None:
            constants = with_bench(CONSTANTS, chosen.bench, devices[0])
        steps = list(case_steps(tuple(entry.name for entry in devices), constants))
    except SpecError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    if chosen.json:
        print(json.dumps(table.as_json(steps, constants), indent=1))
        return 0
    print(table.summary(steps))
    if chosen.constants:
        print(f"\n{table.constants_table(constants)}")
    if chosen.items:
        for step in steps:
            print(f"\n{table.items(step)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
