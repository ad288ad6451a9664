"""`arriero bench`: speed of the operations, of the engine in process, or of a deployment.

Knows flags and output; the measurements are in `kernels/bench.py` and `cluster/engine_bench.py`.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from arriero.cluster.commands.deployment import temporary_deployment
from arriero.cluster.commands.options import StateDir
from arriero.cluster.commands.talk import ApiKey, Ca, credentials, status_as_error
from arriero.cluster.commands.terminal import OUT, spinner
from arriero.shards.config.speculation import MAX_DRAFT_TOKENS, SpeculationConfig
from arriero.shards.errors import SpecError, Unavailable

if TYPE_CHECKING:
    from arriero.cluster.engine_bench import Cell, Figures
    from arriero.kernels.bench import Shape, Timing
    from arriero.router.client.client import AsyncClient

app = typer.Typer(
    help="Measure the operations, or N requests at once (greedy, without stops).",
    no_args_is_help=True,
)

_CELL_LIMIT_S = 3600.0
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]
Quantization = Annotated[str | None, typer.Option(help="Weights in int8, int4 or fp8.")]
ActivationDtype = Annotated[
    str | None, typer.Option(help="int8: round the inputs of int8 and int4 weights (CPUs).")
]
Requests = Annotated[int, typer.Option(min=1, help="Number of requests, all at once.")]
Prompt = Annotated[int, typer.Option(min=1, help="Prompt tokens of each request.")]
Output = Annotated[int, typer.Option(min=1, help="Output tokens of each request.")]
Tp = Annotated[int, typer.Option(min=1, help="Tensor-parallel slices of a stage.")]
Pp = Annotated[int, typer.Option(min=1, help="Pipeline stages.")]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
Json = Annotated[
    bool, typer.Option("--json", help="The last line on stdout is the result as JSON.")
]


@app.command("kernels")
def kernels(
    model: Annotated[
        str, typer.Option(help="Checkpoint folder, or a model name of `arriero plan`.")
    ] = "smollm2-135m",
    dtype: Dtype = "bfloat16",
    quantization: Quantization = None,
    tokens: Annotated[str, typer.Option(help="Batch sizes, with commas.")] = "1,8,32,256",
    context: Annotated[int, typer.Option(min=1, help="Tokens in the context of a decode.")] = 512,
    seconds: Annotated[
        float, typer.Option(help="Seconds of measurement for each operation.")
    ] = 0.2,
    tp: Tp = 1,
    device: Device = "cpu",
    backend: Annotated[
        str | None, typer.Option("--kernels", help="Backend: cpu, triton or reference.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
    json_: Json = False,
) -> None:
    """Measure each operation at the sizes of a layer: time, and share of the machine's limit."""
    import torch

    from arriero.kernels.bench import KernelBench
    from arriero.kernels.select import ops_for

    shape = _shape(model, dtype, quantization, tp)
    sizes = _sizes(tokens)
    with spinner() as show:
        show("packing weights")
        torch_device = torch.device(device)
        ops = ops_for(torch_device, backend, threads)
        bench = KernelBench(ops, shape, torch_device, seconds)
        timings: list[Timing] = []
        for size in sizes:
            show(f"batch of {size}")
            timings += bench.run(size, max(size, context))
    rates = bench.rates
    if json_:
        settings: dict[str, object] = {
            "bench": "kernels",
            "model": model,
            "dtype": dtype,
            "quantization": quantization,
        }
        settings |= {"tp": tp, "device": device, "kernels": ops.name}
        limits = {"memory_gb_s": rates.memory / 1e9, "matrix_gflop_s": rates.matrix / 1e9}
        print(json.dumps({**settings, **limits, "ops": [timing.as_dict() for timing in timings]}))
        return
    OUT.print(
        f"kernels {ops.name}: memory {rates.memory / 1e9:.1f} GB/s, matrix products "
        f"{rates.matrix / 1e9:.0f} GFLOP/s.\nEach cell: time, and share of the limit of these"
        f" rates. A decode attends to {context} tokens; a prefill chunk attends to itself."
    )
    OUT.print(_timing_table(timings, sizes))


def _timing_table(timings: Sequence[Timing], sizes: Sequence[int]) -> Table:
    table = Table("operation", *(f"T={size}" for size in sizes))
    for op in dict.fromkeys(timing.op for timing in timings):
        cells = {
            timing.tokens: f"{timing.us:.0f} us {timing.share:.0%}"
            for timing in timings
            if timing.op == op
        }
        table.add_row(op, *(cells.get(size, "-") for size in sizes))
    return table


def _sizes(tokens: str) -> list[int]:
    sizes = [int(size) if size.strip().isdecimal() else 0 for size in tokens.split(",")]
    if min(sizes) < 1:
        raise SpecError(
            f"`--tokens`={tokens!r} must be whole numbers from 1 up, for example 1,8,32"
        )
    return sizes


def _shape(model: str, dtype: str, quantization: str | None, tp: int) -> Shape:
    """Sizes of a layer on tensor-parallel rank 0."""
    import torch

    from arriero.cluster.planner.catalog import find_model
    from arriero.kernels.bench import Shape
    from arriero.shards.config.group import GroupConfig
    from arriero.shards.families.registry import family_of
    from arriero.shards.layout.families import parts_of
    from arriero.shards.layout.resolve import ITEMSIZE, QUANTIZATIONS

    if dtype not in ITEMSIZE:
        raise SpecError(f"`--dtype`={dtype!r} is none of {', '.join(ITEMSIZE)}")
    if quantization not in (None, *QUANTIZATIONS):
        raise SpecError(f"`--quantization`={quantization!r} is none of {', '.join(QUANTIZATIONS)}")
    config = find_model(model).config
    if family_of(config).experts(config) is not None:
        raise SpecError(f"`--model`={model!r} has experts; give a dense model")
    part = parts_of(config, GroupConfig(model_path="", tp=tp))[0]
    return Shape(
        hidden=config.hidden_size,
        columns=part.columns.size,
        q_heads=part.q_heads.size,
        kv_heads=part.kv_heads.size,
        head_dim=config.head_dim,
        vocab=part.vocab.size,
        dtype=getattr(torch, dtype),
        quantization=quantization,
    )


@app.command("engine")
def engine(
    model: Annotated[Path, typer.Option(help="Checkpoint folder.")],
    dtype: Dtype = "bfloat16",
    quantization: Quantization = None,
    activation_dtype: ActivationDtype = None,
    requests: Annotated[
        int | None,
        typer.Option(min=1, help="Number of requests, all at once: 8, or the prompts of the file."),
    ] = None,
    prompt: Prompt = 128,
    output: Output = 128,
    prompt_file: Annotated[
        Path | None,
        typer.Option(help="Prompts from a file: one, or of .jsonl one a line, in `prompt`."),
    ] = None,
    speculation: Annotated[
        str, typer.Option(help="How tokens are drafted: off, ngram, suffix, draft or eagle3.")
    ] = "off",
    draft_model: Annotated[
        str | None, typer.Option(help="Checkpoint folder of draft and eagle3.")
    ] = None,
    draft_tokens: Annotated[
        int, typer.Option(min=1, max=MAX_DRAFT_TOKENS, help="Most drafted tokens of a step.")
    ] = 16,
    tp: Tp = 1,
    pp: Pp = 1,
    device: Device = "cpu",
    kernels: Annotated[str | None, typer.Option(help="Backend: cpu, triton or reference.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of a slice.")] = None,
    json_: Json = False,
) -> None:
    """Measure the engine in this process; with --tp or --pp, the slices are child processes."""
    from arriero.cluster.bench_prompts import read_prompts
    from arriero.cluster.engine_bench import Cell, EngineBench
    from arriero.shards.config.group import GroupConfig

    if activation_dtype not in (None, "int8"):
        raise SpecError(f"`--activation-dtype`={activation_dtype!r} must be int8")
    drafts = SpeculationConfig.checked(speculation, draft_tokens, draft_model)
    if prompt_file is not None:
        prompts = read_prompts(prompt_file, model, requests)
    else:
        prompts = Cell(requests=requests or 8, prompt=prompt, output=output).prompts()
    requests, prompt = len(prompts), max(map(len, prompts))
    cell = Cell(requests=requests, prompt=prompt, output=output)
    config = GroupConfig(
        model_path=str(model),
        dtype=dtype,
        quantization=quantization,
        activation_dtype="int8" if activation_dtype else None,
        tp=tp,
        pp=pp,
        device=device,
        kernels=kernels,
        threads=threads,
        prefix_cache=False,
        max_sequences=max(256, requests),
        max_queued=max(4096, requests),
        num_blocks=cell.blocks(),
        speculation=drafts,
    )
    with spinner() as show:
        show("loading")
        with EngineBench(config, lambda loading: show(str(loading))) as bench:
            show(f"{requests} requests of {prompt} + {output} tokens")
            figures = bench.run(prompts, output)
    settings: dict[str, Any] = {"bench": "engine", "model": str(model), "speculation": speculation}
    settings |= {"dtype": dtype, "quantization": quantization}
    settings |= {"activation_dtype": activation_dtype}
    _print({**settings, "tp": tp, "pp": pp, "device": device}, cell, figures, json_)


@app.command("serve")
def serve(
    model: Annotated[
        Path | None, typer.Option(help="Checkpoint folder to deploy for the measurement.")
    ] = None,
    dtype: Dtype = "bfloat16",
    quantization: Quantization = None,
    requests: Requests = 8,
    prompt: Prompt = 128,
    output: Output = 128,
    tp: Tp = 1,
    pp: Pp = 1,
    json_: Json = False,
    ca: Ca = None,
    api_key: ApiKey = None,
    state_dir: StateDir = None,
) -> None:
    """Measure through gRPC: the deployment that is up, or with --model a temporary deployment.

    A temporary deployment has no prefix cache; the deployment that is up keeps the spec's setting.
    """
    from arriero.cluster import deployment_file as state
    from arriero.cluster.engine_bench import Cell

    cell = Cell(requests=requests, prompt=prompt, output=output)
    settings: dict[str, Any] = {"bench": "serve"}
    if model is None:
        deployment = state.read(state.state_folder(state_dir))
        if deployment is None:
            raise Unavailable("nothing is up; deploy with `arriero up`, or give --model PATH")
        with spinner() as show:
            figures = asyncio.run(_through_grpc(deployment.gateway, cell, show, ca, api_key))
    else:
        settings |= {"model": str(model), "dtype": dtype, "quantization": quantization}
        settings |= {"tp": tp, "pp": pp}
        flags = {
            "model": str(model),
            "dtype": dtype,
            "quantization": quantization,
            "tp": tp,
            "pp": pp,
            "port": 0,
            "kv": {"blocks": cell.blocks(), "prefix_cache": False},
            "limits": {"max_sequences": max(256, requests), "max_queued": max(4096, requests)},
        }
        with temporary_deployment(flags) as temporary, spinner() as show:
            figures = asyncio.run(_through_grpc(temporary.gateway, cell, show))
    _print(settings, cell, figures, json_)


async def _through_grpc(
    gateway: str,
    cell: Cell,
    show: Callable[[str], None],
    ca: Path | None = None,
    api_key: str | None = None,
) -> Figures:
    """Run the warm-up, then the cell: a stream per request, all on the same connection."""
    from arriero.cluster.engine_bench import WARM_UP
    from arriero.router.client.client import AsyncClient

    tls = credentials(ca)
    with status_as_error():
        async with AsyncClient(
            gateway, credentials=tls, api_key=api_key, timeout_s=_CELL_LIMIT_S
        ) as client:
            show("warming up")
            await _stream_cell(client, WARM_UP)
            show(f"{cell.requests} requests of {cell.prompt} + {cell.output} tokens")
            return await _stream_cell(client, cell)


async def _stream_cell(client: AsyncClient, cell: Cell) -> Figures:
    from arriero.cluster.engine_bench import Clock

    clock = Clock(cell.requests, cell.output)

    async def stream(index: int, prompt: list[int]) -> None:
        fields = {"temperature": 0.0, "ignore_eos": True, "seed": 0, "include_text": False}
        async for answer in client.generate(prompt, max_tokens=cell.output, **fields):
            for output in answer.outputs:
                clock.record(index, len(output.token_ids))

    clock.start()
    await asyncio.gather(*[stream(i, prompt) for i, prompt in enumerate(cell.prompts())])
    return clock.figures()


def _print(settings: dict[str, Any], cell: Cell, figures: Figures, as_json: bool) -> None:
    load = {"requests": cell.requests, "prompt": cell.prompt, "output": cell.output}
    if as_json:
        print(json.dumps({**settings, **load, **figures.as_dict()}))
        return
    OUT.print(
        f"{cell.requests} requests of {cell.prompt} + {cell.output} tokens:"
        f" {figures.output_tok_s} output tokens/s over {figures.elapsed_s} s"
    )
    if figures.mean_accepted_length > 1:
        OUT.print(f"tokens of a step with drafts: {figures.mean_accepted_length}")
    latencies = (("time to first token", figures.ttft_ms), ("between tokens", figures.itl_ms))
    for name, percentiles in latencies:
        OUT.print(f"{name}: " + ", ".join(f"{p} {value} ms" for p, value in percentiles.items()))
