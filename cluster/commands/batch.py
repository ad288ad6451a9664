"""`arriero batch run`: a file of requests against the gateways of a deployment.

Knows flags, the state file and the terminal; knows nothing of HTTP (`router/client/batch_run`).
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from arriero.cluster.commands.operations import admin
from arriero.cluster.commands.options import StateDir
from arriero.cluster.commands.talk import ApiKey, Ca
from arriero.cluster.commands.terminal import ERR, bar
from arriero.shards.errors import Unavailable

if TYPE_CHECKING:
    from arriero.router.client.batch_run import Show

app = typer.Typer(help="Run files of requests.", no_args_is_help=True)


@app.callback()
def batch() -> None:
    """Run files of requests."""


@app.command("run")
def run(
    source: Annotated[Path, typer.Argument(metavar="IN.jsonl", help="File of requests.")],
    output: Annotated[Path, typer.Argument(metavar="OUT.jsonl", help="File of answers.")],
    errors: Annotated[
        Path | None,
        typer.Option(help="File of errors; by default OUT.errors.jsonl.", show_default=False),
    ] = None,
    url: Annotated[
        list[str] | None,
        typer.Option(
            help="A gateway, such as http://127.0.0.1:8000; may repeat. By default the gateways "
            "of `up`.",
            show_default=False,
        ),
    ] = None,
    in_flight: Annotated[int, typer.Option(min=1, max=4096, help="Most requests at once.")] = 64,
    max_line_bytes: Annotated[int, typer.Option(min=1, help="Most bytes of a line.")] = 32 << 20,
    give_up: Annotated[
        float, typer.Option(min=0, help="Seconds without any answer after which the run ends.")
    ] = 300.0,
    ca: Ca = None,
    api_key: ApiKey = None,
    as_json: Annotated[bool, typer.Option("--json", help="The numbers as JSON on stdout.")] = False,
    state_dir: StateDir = None,
) -> None:
    """Run a file of requests; the same command resumes an interrupted run.

    The exit code is 1 when a line is in the file of errors.
    """
    from arriero.router.client.batch_run import BatchRun, BatchRunConfig

    config = BatchRunConfig(
        source=source,
        output=output,
        errors=errors or output.with_suffix(".errors.jsonl"),
        urls=url or partial(_gateways, state_dir, "http" if ca is None else "https"),
        api_key=api_key,
        ca=ca,
        in_flight=in_flight,
        max_line_bytes=max_line_bytes,
        give_up_s=give_up,
    )
    with _progress(source.name) as show:
        totals = asyncio.run(BatchRun(config, show).run())
    if as_json:
        print(json.dumps(asdict(totals)))
    else:
        print(
            f"{totals.total} lines: {totals.answered} answered, {totals.resumed} finished before, "
            f"{totals.failed} failed; {totals.errors} in {config.errors}"
        )
    if totals.errors:
        raise typer.Exit(1)


@contextmanager
def _progress(title: str) -> Iterator[Show]:
    """A bar on a terminal; nothing elsewhere."""
    if not ERR.is_terminal:
        yield lambda done, total: None
        return
    with bar(title) as advance:
        yield lambda done, total: advance(done, total, f"{done}/{total}")


def _gateways(state_dir: Path | None, scheme: str) -> list[str]:
    with admin(state_dir) as client:
        addresses = [gateway.http for gateway in client.status().gateways if gateway.http]
    if not addresses:
        raise Unavailable("no gateway has HTTP; set `gateway.http`, or give --url")
    return [f"{scheme}://{address}" for address in addresses]
