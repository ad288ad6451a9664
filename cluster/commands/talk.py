"""`arriero chat` and `arriero generate`: requests to a gateway through gRPC.

Knows flags, the terminal and the client; knows nothing of Ray.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from arriero.cluster.commands.options import StateDir
from arriero.cluster.commands.terminal import ERR
from arriero.shards.errors import GroupFailed, Unavailable

if TYPE_CHECKING:
    import grpc

    from arriero.router.client.client import Client
    from arriero.router.proto.arriero.v1 import inference_pb2 as pb

Address = Annotated[
    str | None, typer.Option(help="host:port of a gateway; by default the gateway of `up`.")
]
Model = Annotated[str, typer.Option(help="Name of the model; optional with a single model.")]
MaxTokens = Annotated[int | None, typer.Option(help="Most output tokens.")]
Temperature = Annotated[float | None, typer.Option(help="Sampling temperature; 0 is greedy.")]
TopP = Annotated[
    float | None, typer.Option(help="Sample from the smallest set of tokens with this probability.")
]
Seed = Annotated[
    int | None, typer.Option(help="Seed of sampling; the same seed gives the same tokens.")
]
Ca = Annotated[
    Path | None,
    typer.Option(help="PEM file of the gateway's certificate authority; turns TLS on."),
]
ApiKey = Annotated[
    str | None,
    typer.Option(envvar="ARRIERO_API_KEY", help="API key, for a gateway that needs keys."),
]
AsJson = Annotated[
    bool, typer.Option("--json", help="A line of JSON per answer, at the end of the answer.")
]
Timeout = Annotated[float, typer.Option(help="Limit of an answer, in seconds.")]

_ASK_LIMIT_S = 600.0


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatAnswer:
    """A printed answer and the speed of the answer.

    Attributes:
        text: the whole text.
        num_tokens: output tokens.
        ttft_s: seconds to the first token.
        tokens_per_s: tokens per second after the first token.
    """

    text: str
    num_tokens: int
    ttft_s: float
    tokens_per_s: float


def add_to(app: typer.Typer) -> None:
    """Add the commands to `app`."""
    app.command("chat")(chat)
    app.command("generate")(generate)


def chat(
    message: Annotated[str | None, typer.Option(help="Send this message only, then end.")] = None,
    system: Annotated[str | None, typer.Option(help="The system message.")] = None,
    model: Model = "",
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: Seed = None,
    timeout: Timeout = 600.0,
    address: Address = None,
    ca: Ca = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
    state_dir: StateDir = None,
) -> None:
    """Chat with a model; an empty line or Ctrl-D ends the chat."""
    fields = _fields(model, max_tokens, temperature, top_p, seed)
    messages = [{"role": "system", "content": system}] if system else []
    with _client(_gateway(address, state_dir), timeout, ca, api_key) as client:
        while True:
            text = message if message is not None else _read_line()
            if not text:
                return
            messages.append({"role": "user", "content": text})
            answer = _print(client.chat(messages, **fields), as_json=as_json)
            messages.append({"role": "assistant", "content": answer.text})
            if message is not None:
                return


def generate(
    prompt: Annotated[str, typer.Argument(help="Text to continue; - reads stdin.")],
    model: Model = "",
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: Seed = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="Text that ends the output; may repeat.")
    ] = None,
    timeout: Timeout = 600.0,
    address: Address = None,
    ca: Ca = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
    state_dir: StateDir = None,
) -> None:
    """Continue a text, without a chat template."""
    text = sys.stdin.read() if prompt == "-" else prompt
    fields = _fields(model, max_tokens, temperature, top_p, seed)
    with _client(_gateway(address, state_dir), timeout, ca, api_key) as client:
        _print(client.generate(text, stop=stop, **fields), as_json=as_json)


def ask(gateway: str, model: str, question: str, *, as_json: bool = False) -> ChatAnswer:
    """Ask a question, greedily, and print the answer while the answer streams."""
    messages = [{"role": "user", "content": question}]
    with _client(gateway, _ASK_LIMIT_S) as client:
        answers = client.chat(messages, model=model, temperature=0.0, max_tokens=64)
        return _print(answers, as_json=as_json)


def continue_text(gateway: str, model: str, text: str, *, as_json: bool = False) -> ChatAnswer:
    """Continue a text, greedily with a repetition penalty, and print the output as a stream."""
    with _client(gateway, _ASK_LIMIT_S) as client:
        answers = client.generate(
            text, model=model, temperature=0.0, max_tokens=96, repetition_penalty=1.1
        )
        return _print(answers, as_json=as_json)


@contextmanager
def status_as_error() -> Iterator[None]:
    """Turn gRPC statuses into errors of arriero."""
    import grpc

    try:
        yield
    except grpc.RpcError as error:
        assert isinstance(error, grpc.Call | grpc.aio.AioRpcError), "the error of a call"
        text = error.details() or error.code().name
        timed_out = error.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        raise (Unavailable if timed_out else GroupFailed)(text) from None


def credentials(ca: Path | None) -> grpc.ChannelCredentials | None:
    """TLS credentials that trust the authorities in the file `ca`; None for no TLS."""
    import grpc

    return None if ca is None else grpc.ssl_channel_credentials(ca.read_bytes())


@contextmanager
def _client(
    gateway: str, timeout_s: float, ca: Path | None = None, api_key: str | None = None
) -> Iterator[Client]:
    from arriero.router.client.client import Client

    tls = credentials(ca)
    with (
        status_as_error(),
        Client(gateway, credentials=tls, api_key=api_key, timeout_s=timeout_s) as client,
    ):
        yield client


def _fields(
    model: str,
    max_tokens: int | None,
    temperature: float | None,
    top_p: float | None,
    seed: int | None,
) -> dict[str, Any]:
    return {
        "model": model,
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "seed": seed,
    }


def _gateway(address: str | None, state_dir: Path | None) -> str:
    from arriero.cluster import deployment_file as state

    if address is not None:
        return address
    deployment = state.read(state.state_folder(state_dir))
    if deployment is None or not deployment.gateway:
        raise Unavailable(
            "nothing is up; deploy with `arriero up`, or give a gateway with --address"
        )
    return deployment.gateway


def _print(answers: Iterator[pb.GenerateResponse], *, as_json: bool = False) -> ChatAnswer:
    """Print the text to stdout while the answer streams; or at the end, a line of JSON."""
    start_s = time.perf_counter()
    text, num_tokens, first_s = "", 0, 0.0
    for answer in answers:
        for output in answer.outputs:
            if num_tokens == 0 and output.token_ids:
                first_s = time.perf_counter()
            num_tokens += len(output.token_ids)
            text += output.text
            if not as_json:
                sys.stdout.write(output.text)
                sys.stdout.flush()
    decode_s = time.perf_counter() - first_s
    printed = ChatAnswer(
        text=text,
        num_tokens=num_tokens,
        ttft_s=first_s - start_s,
        tokens_per_s=(num_tokens - 1) / decode_s if num_tokens > 1 else 0.0,
    )
    print(json.dumps(asdict(printed)) if as_json else "", flush=True)
    return printed


def _read_line() -> str:
    try:
        return ERR.input("> ", markup=False).strip()
    except EOFError:
        return ""
