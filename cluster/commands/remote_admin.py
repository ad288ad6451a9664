"""Access to Admin without a state file: `arriero --admin HOST:PORT COMMAND`.

For a deployment that another machine brought up, such as a pod of Kubernetes. Knows the flags and
environment variables of Admin's address, token and certificate authority; knows nothing of the
commands.
"""

from __future__ import annotations

from contextvars import ContextVar
from pathlib import Path
from typing import Annotated

import typer

from arriero.cluster import deployment_file
from arriero.cluster.deployment_file import Deployment
from arriero.shards.errors import SpecError

_deployment: ContextVar[Deployment | None] = ContextVar("_deployment", default=None)


def choose(
    admin: Annotated[
        str,
        typer.Option(
            envvar="ARRIERO_ADMIN", help="host:port of Admin, in place of the state file's."
        ),
    ] = "",
    admin_token_file: Annotated[
        Path | None,
        typer.Option(envvar=deployment_file.TOKEN_FILE, help="File that holds Admin's token."),
    ] = None,
    admin_ca: Annotated[
        Path | None,
        typer.Option(envvar="ARRIERO_ADMIN_CA", help="Authority of Admin's certificate, PEM."),
    ] = None,
    admin_name: Annotated[
        str,
        typer.Option(envvar="ARRIERO_ADMIN_NAME", help="Name in it; else the host of --admin."),
    ] = "",
) -> None:
    """Store the flags that come before the name of the command."""
    _deployment.set(None)
    if not admin:
        return
    if admin_token_file is None:
        raise SpecError(
            f"`--admin`={admin} needs Admin's token; give --admin-token-file FILE or"
            f" {deployment_file.TOKEN_FILE}"
        )
    _deployment.set(
        Deployment(
            ray_address="",
            admin=admin,
            admin_token=deployment_file.read_token(admin_token_file),
            admin_ca="" if admin_ca is None else admin_ca.read_text(encoding="utf-8"),
            admin_name=admin_name,
        )
    )


def chosen() -> Deployment | None:
    """The deployment of the flags; None without `--admin`."""
    return _deployment.get()
