"""`arriero up`, `down` and `demo`: start and end of a deployment.

Knows flags, output and interrupts (Ctrl-C, SIGTERM, SIGHUP); the steps are in `cluster/deploy.py`.
"""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from arriero.cluster import interrupts
from arriero.cluster.commands.options import StateDir, set_options, with_option_groups
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


@dataclass(frozen=True, kw_only=True, slots=True)
class _ModelOptions:
    """The model and its groups, without a spec."""

    model: Annotated[Path | None, typer.Option(help="Checkpoint folder, without a spec.")] = None
    name: Annotated[str | None, typer.Option(help="Name of the model for clients.")] = None
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None
    quantization: Annotated[
        str | None, typer.Option(help="int8, int4 or fp8: quantize the weights during loading.")
    ] = None
    groups: Annotated[int | None, typer.Option(help="Number of replica groups.")] = None
    tp: Annotated[int | None, typer.Option(help="Tensor-parallel slices of a stage.")] = None
    pp: Annotated[int | None, typer.Option(help="Pipeline stages.")] = None
    dp: Annotated[
        int | None, typer.Option(help="Data-parallel ranks of attention (mixtures of experts).")
    ] = None
    device: Annotated[str | None, typer.Option(help="cpu, cuda or auto.")] = None
    threads: Annotated[int | None, typer.Option(help="CPU threads of a slice.")] = None
    kv_memory: Annotated[
        str | None, typer.Option(help="Bytes of a group's KV cache, for example 512MiB.")
    ] = None
    max_model_len: Annotated[int | None, typer.Option(help="Most tokens of a sequence.")] = None
    sliding_window: Annotated[
        int | None, typer.Option(help="Last tokens that a token attends to (dense models).")
    ] = None
    attention_sinks: Annotated[
        int | None, typer.Option(help="First tokens that stay visible beside the window.")
    ] = None
    changes_answers: Annotated[
        bool | None,
        typer.Option(
            help="Accept other answers from a window that the model was not trained with."
        ),
    ] = None


@dataclass(frozen=True, kw_only=True, slots=True)
class _GatewayOptions:
    """Addresses of the gateway."""

    host: Annotated[str | None, typer.Option(help="Address of the gateway's gRPC.")] = None
    port: Annotated[
        int | None, typer.Option(help="Port of the gateway's gRPC; 0 takes any free port.")
    ] = None
    http_host: Annotated[str | None, typer.Option(help="Address of the gateway's HTTP.")] = None
    http_port: Annotated[
        int | None, typer.Option(help="Port of the gateway's HTTP; 0 takes any free port.")
    ] = None
    cors: Annotated[
        str | None,
        typer.Option(help="Origins of web pages that may call HTTP, with commas; '*' for all."),
    ] = None
    address: Annotated[
        str | None, typer.Option(help="Ray cluster to join; else $RAY_ADDRESS, else a local one.")
    ] = None
    start_timeout_s: Annotated[
        float | None, typer.Option("--timeout", help="Limit of the start, in seconds.")
    ] = None


@with_option_groups
def up(
    model: _ModelOptions,
    gateway: _GatewayOptions,
    spec: Annotated[Path | None, typer.Argument(help="Deployment spec, arriero.yaml.")] = None,
    foreground: Annotated[
        bool, typer.Option(help="Stay until Ctrl-C, which ends the deployment.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The addresses as JSON.")] = False,
    state_dir: StateDir = None,
) -> None:
    """Deploy; returns when every group has generated a token, and leaves the deployment serving."""
    if spec is None and model.model is None:
        raise SpecError("nothing to serve: give a spec (`arriero up arriero.yaml`) or --model PATH")
    deployment = bring_up(spec, set_options(model, gateway), state_dir)
    http = f" and http://{deployment.http} (HTTP)" if deployment.http else ""
    if as_json:
        addresses = {
            "gateway": deployment.gateway,
            "http": deployment.http,
            "admin": deployment.admin,
        }
        print(json.dumps(addresses), flush=True)
    else:
        OUT.print(f"serving at {deployment.gateway} (gRPC){http}", markup=False, soft_wrap=True)
        if deployment.console:
            OUT.print(f"console at {deployment.console}", markup=False, soft_wrap=True)
    if foreground:
        _wait_for_interrupt(state_dir)


def down(
    force: Annotated[
        bool,
        typer.Option(
            help="Let no stream finish, and forget a joined cluster that cannot be reached."
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="JSON on stdout.")] = False,
    state_dir: StateDir = None,
) -> None:
    """End the deployment that `up` started, and nothing else."""
    from arriero.cluster import deploy
    from arriero.cluster import deployment_file as state

    with spinner() as show:
        was_up = deploy.down(state.state_folder(state_dir), show, force=force)
    if as_json:
        print(json.dumps({"was_up": was_up}))
    else:
        OUT.print("down" if was_up else "nothing was up", markup=False)


def demo(
    model: Annotated[
        str, typer.Option(help="smollm2, or tiny-maverick (a mixture of experts, without chat).")
    ] = "smollm2",
    tp: Annotated[int, typer.Option(help="Tensor-parallel slices of a stage.")] = 1,
    pp: Annotated[int | None, typer.Option(help="Pipeline stages; 2 for smollm2.")] = None,
    dp: Annotated[
        int | None, typer.Option(help="Data-parallel ranks of attention; 2 for tiny-maverick.")
    ] = None,
    question: Annotated[
        str | None, typer.Option(help="The question; for tiny-maverick, the text to continue.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The answer and times as JSON.")] = False,
) -> None:
    """Serve a small model from a group of slices, ask a question, and end the deployment."""
    from arriero.cluster.commands import models, talk

    mixture = model == models.TINY_MAVERICK
    if not mixture and model != models.DEMO:
        raise SpecError(f"`model`={model!r} is none of {models.DEMO}, {models.TINY_MAVERICK}")
    folder = models.tiny_maverick() if mixture else models.demo_model()
    pp, dp = pp or (1 if mixture else 2), dp or (2 if mixture else 1)
    flags = {"model": str(folder), "tp": tp, "pp": pp, "dp": dp, "port": 0}
    text = question or (_BEGINNING if mixture else _QUESTION)
    start_s = time.monotonic()
    with temporary_deployment(flags) as deployment:
        up_s = time.monotonic() - start_s
        ERR.print(f"{folder.name} served by {tp * pp * dp} slices after {up_s:.1f} s", markup=False)
        if not as_json:
            OUT.print(f"\n> {text}\n", markup=False)
        send = talk.continue_text if mixture else talk.ask
        answer = send(deployment.gateway, folder.name, text, as_json=as_json)
        if as_json:
            return
        OUT.print(
            f"\ntime to first token {answer.ttft_s * 1000:.0f} ms,"
            f" {answer.tokens_per_s:.1f} tokens/s ({answer.num_tokens} tokens)",
            markup=False,
        )


def bring_up(spec: Path | None, flags: dict[str, Any], state_dir: Path | None) -> Deployment:
    """Deploy, and show the progress."""
    from arriero.cluster import deploy
    from arriero.cluster import deployment_file as state
    from arriero.cluster.spec.load import load

    checked = load(spec, flags)
    with spinner() as show, _interruptible() as check_interrupt:
        return deploy.up(checked, state.state_folder(state_dir), _after(check_interrupt, show))


@contextlib.contextmanager
def temporary_deployment(flags: dict[str, Any]) -> Iterator[Deployment]:
    """A deployment on a new local cluster; ends at the end of the block, also after an error."""
    from arriero.cluster import deploy
    from arriero.cluster import deployment_file as state
    from arriero.cluster.spec.load import load

    checked = load(None, flags)
    with (
        tempfile.TemporaryDirectory(prefix="arriero-state-") as name,
        _interruptible() as check_interrupt,
    ):
        folder = Path(name)
        try:
            with spinner() as show:
                # the folder of this deployment's state is removed at the end
                logs = state.state_folder(None)
                show_step = _after(check_interrupt, show)
                deployment = deploy.up(checked, folder, show_step, keep_logs=logs)
            yield deployment
        finally:
            with spinner() as show, interrupts.ignored():
                deploy.down(folder, show)


def _wait_for_interrupt(state_dir: Path | None) -> None:
    ERR.print("Ctrl-C ends the deployment", markup=False)
    with _interruptible():
        try:
            signal.pause()
        except (KeyboardInterrupt, SystemExit):  # the end that the user asked for
            with interrupts.ignored():
                down(state_dir=state_dir)


@contextlib.contextmanager
def _interruptible() -> Iterator[Callable[[], None]]:
    """Treat SIGTERM and SIGHUP as Ctrl-C, so that both signals clean up too.

    Gives a function that raises the interrupt again after a library's callback has swallowed it.
    The function does nothing while an exception is handled: that clean-up must end.
    """
    pending = interrupts.Interrupts()

    def check_interrupt() -> None:
        if sys.exc_info()[0] is None:
            interrupts.install(pending.handle)
            pending.check()

    with interrupts.handled(pending.handle):
        yield check_interrupt


def _after(
    check_interrupt: Callable[[], None], show: Callable[[str], None]
) -> Callable[[str], None]:
    """`show` after `check_interrupt`; every wait calls `show` repeatedly."""

    def check_and_show(text: str) -> None:
        check_interrupt()
        show(text)

    return check_and_show
