"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

StateDir = Annotated[
    Path | None,
    typer.Option(
        envvar="ARRIERO_STATE",
        help="Folder of the state file of `up`; by default ~/.local/state/arriero.",
        show_default=False,
    ),
]
