"""`arriero up`, `down` and `demo`."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from arriero.cluster.commands.options import StateDir
from arriero.cluster.commands.terminal import ERR, OUT, spinner
from arriero.shards.errors import SpecError

if TYPE_CHECKING:
    from arriero.cluster.deployment_file import Deployment

_QUESTION = "What is the capital of France?"
_BEGINNING = "Return a list of the"


def add_to(app: typer.Typer) -> None:
    """Add the commands to `app`."""
    app.command("demo")(demo)
    app.command("up")(up)
    app.command("down")(down)


def up(
    spec: Annotated[Path | None, typer.Argument(help="The deployment spec, arriero.yaml.")] = None,
    model: Annotated[Path | None, typer.Option(help="Checkpoint folder; no spec needed.")] = None,
    name: Annotated[str | None, typer.Option(help="What clients call the model.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    quantization: Annotated[
        str | None, typer.Option(help="int8, int4 or fp8: weights are quantized while they load.")
    ] = None,
    groups: Annotated[int | None, typer.Option(help="Replica groups.")] = None,
    tp: Annotated[int | None, typer.Option(help="Tensor-parallel slices of a stage.")] = None,
    pp: Annotated[int | None, typer.Option(help="Pipeline stages.")] = None,
    dp: Annotated[
        int | None, typer.Option(help="Data-parallel attention, for mixtures of experts.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or auto.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads of a slice.")] = None,
    kv_memory: Annotated[str | None, typer.Option(help="KV cache of a group: 512MiB.")] = None,
    max_model_len: Annotated[int | None, typer.Option(help="Most tokens of a sequence.")] = None,
    sliding_window: Annotated[
        int | None, typer.Option(help="Tokens see the last so many alone (dense models).")
    ] = None,
    attention_sinks: Annotated[
        int | None, typer.Option(help="First tokens seen beside a window.")
    ] = None,
    changes_answers: Annotated[
        bool | None, typer.Option(help="A window that the model was not trained with is meant.")
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address of the gateway.")] = None,
    port: Annotated[int | None, typer.Option(help="Port of the gateway; 0: any.")] = None,
    http_host: Annotated[str | None, typer.Option(help="Address of its HTTP.")] = None,
    http_port: Annotated[int | None, typer.Option(help="Port of its HTTP; 0: any.")] = None,
    cors: Annotated[
        str | None,
        typer.Option(help="Origins of web pages that may call its HTTP, by commas; '*': any."),
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="Ray cluster to join; else $RAY_ADDRESS, else a local one.")
    ] = None,
    timeout: Annotated[float | None, typer.Option(help="Seconds a start may take.")] = None,
    foreground: Annotated[bool, typer.Option(help="Stay; Ctrl-C takes it down.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The addresses as JSON.")] = False,
    state_dir: StateDir = None,
) -> None:
    """Deploy; return once a real token came out of every group, leaving it serving."""
    flags = {
        "model": None if model is None else str(model),
        "name": name,
        "dtype": dtype,
        "quantization": quantization,
        "groups": groups,
        "tp": tp,
        "pp": pp,
        "dp": dp,
        "device": device,
        "threads": threads,
        "kv_memory": kv_memory,
        "max_model_len": max_model_len,
        "sliding_window": sliding_window,
        "attention_sinks": attention_sinks,
        "changes_answers": changes_answers,
        "host": host,
        "port": port,
        "http_host": http_host,
        "http_port": http_port,
        "cors": cors,
        "address": address,
        "start_timeout_s": timeout,
    }
    given = {flag: value for flag, value in flags.items() if value is not None}
    if spec is None and model is None:
        raise SpecError("nothing to serve: give a spec (`arriero up arriero.yaml`) or --model PATH")
    deployment = bring_up(spec, given, state_dir)
    http = f" and http://{deployment.http} (HTTP)" if deployment.http else ""
    if as_json:
        found = {"gateway": deployment.gateway, "http": deployment.http, "admin": deployment.admin}
        print(json.dumps(found), flush=True)
    else:
        OUT.print(f"serving at {deployment.gateway} (gRPC){http}", markup=False, soft_wrap=True)
    if foreground:
        _stay(state_dir)


def down(
    as_json: Annotated[bool, typer.Option("--json", help="JSON on stdout.")] = False,
    state_dir: StateDir = None,
) -> None:
    """Take down what `up` brought up, and only that."""
    from arriero.cluster import deploy
    from arriero.cluster import deployment_file as state

    with spinner() as say:
        found = deploy.down(state.state_folder(state_dir), say)
    if as_json:
        print(json.dumps({"was_up": found}))
    else:
        OUT.print("down" if found else "nothing was up", markup=False)


def demo(
    model: Annotated[
        str, typer.Option(help="smollm2; or tiny-maverick, a mixture of experts that continues.")
    ] = "smollm2",
    tp: Annotated[int, typer.Option(help="Tensor-parallel slices of a stage.")] = 1,
    pp: Annotated[int | None, typer.Option(help="Pipeline stages; 2 for smollm2.")] = None,
    dp: Annotated[
        int | None, typer.Option(help="Data-parallel attention; 2 for tiny-maverick.")
    ] = None,
    question: Annotated[str | None, typer.Option(help="What to ask, or to continue.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The answer and times as JSON.")] = False,
) -> None:
    """Serve a small model from a group of slices, ask it a question, and clean up."""
    from arriero.cluster.commands import models, talk

    routed = model == models.TINY_MAVERICK
    if not routed and model != models.DEMO:
        raise SpecError(f"`model`={model!r} is none of {models.DEMO}, {models.TINY_MAVERICK}")
    folder = models.tiny_maverick() if routed else models.demo_model()
    stages, lanes = pp or (1 if routed else 2), dp or (2 if routed else 1)
    flags = {"model": str(folder), "tp": tp, "pp": stages, "dp": lanes, "port": 0}
    asked = question or (_BEGINNING if routed else _QUESTION)
    begun_s = time.monotonic()
    with temporary_deployment(flags) as deployment:
        up_s = time.monotonic() - begun_s
        slices = tp * stages * lanes
        ERR.print(f"{folder.name} served by {slices} slices after {up_s:.1f} s", markup=False)
        if not as_json:
            OUT.print(f"\n> {asked}\n", markup=False)
        talk_on = talk.go_on if routed else talk.ask
        answer = talk_on(deployment.gateway, folder.name, asked, as_json=as_json)
        if as_json:
            return
        OUT.print(
            f"\ntime to first token {answer.ttft_s * 1000:.0f} ms,"
            f" {answer.tokens_per_s:.1f} tokens/s ({answer.num_tokens} tokens)",
            markup=False,
        )


def bring_up(spec: Path | None, flags: dict[str, Any], state_dir: Path | None) -> Deployment:
    """Deploy, with progress shown."""
    from arriero.cluster import deploy
    from arriero.cluster import deployment_file as state
    from arriero.cluster.spec.load import load

    checked = load(spec, flags)
    with spinner() as say, _interruptible() as heed:
        return deploy.up(checked, state.state_folder(state_dir), _after(heed, say))


@contextlib.contextmanager
def temporary_deployment(flags: dict[str, Any]) -> Iterator[Deployment]:
    """A deployment on a local cluster of its own, gone at the end whatever happens."""
    from arriero.cluster import deploy
    from arriero.cluster.spec.load import load

    checked = load(None, flags)
    with tempfile.TemporaryDirectory(prefix="arriero-state-") as name, _interruptible() as heed:
        folder = Path(name)
        try:
            with spinner() as say:
                deployment = deploy.up(checked, folder, _after(heed, say))
            yield deployment
        finally:
            with spinner() as say, _uninterrupted():
                deploy.down(folder, say)


def _stay(state_dir: Path | None) -> None:
    ERR.print("Ctrl-C takes it down", markup=False)
    with _interruptible():
        try:
            signal.pause()
        except KeyboardInterrupt:
            with _uninterrupted():
                down(state_dir=state_dir)


@contextlib.contextmanager
def _interruptible() -> Iterator[Callable[[], None]]:
    """Take SIGTERM and SIGHUP as Ctrl-C, so that they clean up too.

    Gives what raises an interrupt again that some library's callback has swallowed; it does
    nothing while an exception is on its way, whose cleaning up must not be cut short.
    """
    came = False

    def interrupt(number: int, frame: object) -> None:
        nonlocal came
        came = True
        raise KeyboardInterrupt

    def heed() -> None:
        if came and sys.exc_info()[0] is None:
            raise KeyboardInterrupt

    with _handled(interrupt, signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        yield heed


def _after(heed: Callable[[], None], say: Callable[[str], None]) -> Callable[[str], None]:
    """`say`, which is called again and again while there is something to wait for, made to heed."""

    def told(text: str) -> None:
        heed()
        say(text)

    return told


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Clean up in peace; it takes seconds and ends by itself."""
    with _handled(signal.SIG_IGN, signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        yield


@contextlib.contextmanager
def _handled(handler: Any, *signs: signal.Signals) -> Iterator[None]:  # noqa: ANN401
    old = {sign: signal.signal(sign, handler) for sign in signs}
    try:
        yield
    finally:
        for sign, before in old.items():
            signal.signal(sign, before)
