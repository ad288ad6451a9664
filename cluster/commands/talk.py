"""`arriero chat` and `arriero generate`: a gRPC client of what is up."""

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
    str | None, typer.Option(help="host:port of a gateway; by default what `up` brought up.")
]
Model = Annotated[str, typer.Option(help="Which model; may stay out when one is served.")]
MaxTokens = Annotated[int | None, typer.Option(help="Most output tokens.")]
Temperature = Annotated[float | None, typer.Option(help="0 is greedy.")]
TopP = Annotated[float | None, typer.Option(help="Keep the smallest set of this mass.")]
Seed = Annotated[int | None, typer.Option(help="The same seed gives the same tokens.")]
Ca = Annotated[
    Path | None,
    typer.Option(help="Certificates in PEM that the gateway's is from; then it speaks TLS."),
]
ApiKey = Annotated[
    str | None,
    typer.Option(envvar="ARRIERO_API_KEY", help="Where the gateway asks for keys."),
]
AsJson = Annotated[
    bool, typer.Option("--json", help="Each answer as a line of JSON, once it is whole.")
]
Timeout = Annotated[float, typer.Option(help="Seconds that an answer may take.")]

_ASK_LIMIT_S = 600.0


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatAnswer:
    """An answer that has been printed: its text, and how fast it came."""

    text: str
    num_tokens: int
    ttft_s: float
    tokens_per_s: float


def add_to(app: typer.Typer) -> None:
    """Add the commands to `app`."""
    app.command("chat")(chat)
    app.command("generate")(generate)


def chat(
    message: Annotated[str | None, typer.Option(help="Ask this alone, and end.")] = None,
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
    """Talk to a model; an empty line or Ctrl-D ends it."""
    fields = _fields(model, max_tokens, temperature, top_p, seed)
    said = [{"role": "system", "content": system}] if system else []
    with _client(_gateway(address, state_dir), timeout, ca, api_key) as client:
        while True:
            asked = message if message is not None else _ask_for_line()
            if not asked:
                return
            said.append({"role": "user", "content": asked})
            answer = _print(client.chat(said, **fields), as_json=as_json)
            said.append({"role": "assistant", "content": answer.text})
            if message is not None:
                return


def generate(
    prompt: Annotated[str, typer.Argument(help="Text to continue; - reads stdin.")],
    model: Model = "",
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: Seed = None,
    stop: Annotated[list[str] | None, typer.Option(help="End at this text.")] = None,
    timeout: Timeout = 600.0,
    address: Address = None,
    ca: Ca = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
    state_dir: StateDir = None,
) -> None:
    """Continue a text."""
    text = sys.stdin.read() if prompt == "-" else prompt
    fields = _fields(model, max_tokens, temperature, top_p, seed)
    with _client(_gateway(address, state_dir), timeout, ca, api_key) as client:
        _print(client.generate(text, stop=stop, **fields), as_json=as_json)


def ask(gateway: str, model: str, question: str, *, as_json: bool = False) -> ChatAnswer:
    """Ask one question, greedily, and print the answer as it streams."""
    messages = [{"role": "user", "content": question}]
    with _client(gateway, _ASK_LIMIT_S) as client:
        answers = client.chat(messages, model=model, temperature=0.0, max_tokens=64)
        return _print(answers, as_json=as_json)


def go_on(gateway: str, model: str, text: str, *, as_json: bool = False) -> ChatAnswer:
    """Continue a text, greedily but for repetitions, and print what comes as it streams."""
    with _client(gateway, _ASK_LIMIT_S) as client:
        answers = client.generate(
            text, model=model, temperature=0.0, max_tokens=96, repetition_penalty=1.1
        )
        return _print(answers, as_json=as_json)


@contextmanager
def status_as_error() -> Iterator[None]:
    """Turn the gRPC statuses that the client passes on into errors of ours."""
    import grpc

    try:
        yield
    except grpc.RpcError as error:
        assert isinstance(error, grpc.Call | grpc.aio.AioRpcError), "a failed call is a call"
        text = error.details() or error.code().name
        late = error.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        raise (Unavailable if late else GroupFailed)(text) from None


def credentials(ca: Path | None) -> grpc.ChannelCredentials | None:
    """Of a client that believes those authorities; None speaks in the clear."""
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
        raise Unavailable("nothing is up; `arriero up` deploys, or --address names a gateway")
    return deployment.gateway


def _print(answers: Iterator[pb.GenerateResponse], *, as_json: bool = False) -> ChatAnswer:
    """Print the text as it comes, to stdout as it is; or once it is whole, a line of JSON."""
    begun_s = time.perf_counter()
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
    whole = ChatAnswer(
        text=text,
        num_tokens=num_tokens,
        ttft_s=first_s - begun_s,
        tokens_per_s=(num_tokens - 1) / decode_s if num_tokens > 1 else 0.0,
    )
    print(json.dumps(asdict(whole)) if as_json else "", flush=True)
    return whole


def _ask_for_line() -> str:
    try:
        return ERR.input("> ", markup=False).strip()
    except EOFError:
        return ""
