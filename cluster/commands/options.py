"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    pass

StateDir = Annotated[
    Path | None,
    typer.Option(
        envvar="ARRIERO_STATE",
        help="Where the deployment is noted; by default ~/.local/state/arriero.",
        show_default=False,
    ),
]
