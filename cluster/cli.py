"""The command line, `arriero`.

Exit codes: 0 done; 1 failed; 2 wrong flag, spec or request; 3 nothing serves, or the deployment is
full; 4 no such model, group, node or key; 5 broken checkpoint; 130 interrupted (Ctrl-C); 143 ended
by SIGTERM. An error is one line on stderr.

Knows the exit code of each error; knows nothing of the commands' work (`commands/`). Commands that
need torch or Ray import both inside the function, so that all other commands answer at once.
"""

from __future__ import annotations

import sys

import typer

from arriero.cluster.commands import (
    adapters,
    admin_tokens,
    batch,
    bench,
    changes,
    deployment,
    doctor,
    get,
    keys,
    kv,
    models,
    operations,
    plan,
    remote_admin,
    talk,
    top,
    weights,
)
from arriero.shards.errors import (
    ArrieroError,
    CheckpointError,
    InvalidRequest,
    NotFound,
    Overloaded,
    SpecError,
    Unavailable,
)

_EXIT_CODES: tuple[tuple[type[ArrieroError], int], ...] = (
    (SpecError, 2),
    (InvalidRequest, 2),
    (Overloaded, 3),
    (Unavailable, 3),
    (NotFound, 4),
    (CheckpointError, 5),
)

app = typer.Typer(
    name="arriero",
    help="Serve Llama models across the machines of a Ray cluster.",
    epilog="Exit codes: 0 done; 1 failed; 2 wrong flag, spec or request; 3 nothing serves, or the"
    " deployment is full; 4 no such model, group, node or key; 5 broken checkpoint; 130 interrupted"
    " (Ctrl-C); 143 ended by SIGTERM.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.callback()(remote_admin.choose)
deployment.add_to(app)
operations.add_to(app)
changes.add_to(app)
get.add_to(app)
top.add_to(app)
doctor.add_to(app)
talk.add_to(app)
plan.add_to(app)
app.add_typer(models.app, name="models")
app.add_typer(keys.app, name="keys")
app.add_typer(admin_tokens.app, name="admin-token")
app.add_typer(adapters.app, name="adapters")
weights.add_to(app)
app.add_typer(kv.app, name="kv")
app.add_typer(batch.app, name="batch")
app.add_typer(bench.app, name="bench")


def main(args: list[str] | None = None) -> None:
    """Run a command and exit with the exit code of the command."""
    sys.exit(run(sys.argv[1:] if args is None else args))


def run(args: list[str]) -> int:
    """Run a command; returns the exit code."""
    try:
        app(args=args, prog_name="arriero")
    except SystemExit as end:  # the end of every typer command: 0; 2 wrong usage; 130 Ctrl-C
        return end.code if isinstance(end.code, int) else 0
    except OSError as error:
        _print_error(f"{error.filename}: {error.strerror}" if error.filename else str(error))
        return 1
    except ArrieroError as error:
        _print_error("; ".join([str(error), *getattr(error, "__notes__", ())]))
        return next((code for kind, code in _EXIT_CODES if isinstance(error, kind)), 1)
    return 0


def _print_error(text: str) -> None:
    print(f"arriero: {' '.join(text.split())}", file=sys.stderr)


if __name__ == "__main__":
    main()
