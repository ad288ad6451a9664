"""Ray Data over the deployment's models: `processor(...)` for data sets of prompts.

Actors of the data set's job call the gateways through gRPC as background requests, without HTTP
between. A row that cannot be answered is a row with the column `error`, never the end of the job.
Knows rows, columns and the client; knows nothing of groups and of how a request is computed.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import ray

from arriero.cluster.registry.registry import NAME, NAMESPACE
from arriero.cluster.registry.snapshot import RegistrySnapshot
from arriero.shards.errors import ArrieroError, InvalidRequest, Unavailable

if TYPE_CHECKING:
    import pyarrow
    from ray.data import Dataset

    from arriero.router.client.client import AsyncClient
    from arriero.router.proto.arriero.v1 import inference_pb2 as pb

RESUME_S = 120.0
RETRIES = 1000
"""Further attempts of a row that finds no room; the time limit ends them earlier."""
REGISTRY_S = 5.0
"""Seconds to wait for the list of gateways."""
_ERROR_CHARS = 2000

Row = dict[str, Any]
RowFunction = Callable[[Row], Row]


@dataclass(frozen=True, kw_only=True, slots=True)
class RowAnswer:
    """The columns that a processor adds to a row.

    Attributes:
        generated_text: output; None for a row that failed.
        finish_reason: "stop" or "length"; None for a row that failed.
        num_input_tokens, num_generated_tokens: tokens of prompt and output.
        error: kind and text of the error; None for a row that was answered.
    """

    generated_text: str | None = None
    finish_reason: str | None = None
    num_input_tokens: int | None = None
    num_generated_tokens: int | None = None
    error: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ProcessorSettings:
    """Settings of the actors; see `processor`."""

    model: str = ""
    address: str | Sequence[str] | None = None
    sampling: Mapping[str, Any] | None = None
    api_key: str | None = None
    ca: str | Path | None = None
    timeout_s: float | None = None
    background: bool = True


def processor(
    *,
    model: str = "",
    address: str | Sequence[str] | None = None,
    sampling: Mapping[str, Any] | None = None,
    preprocess: RowFunction | None = None,
    postprocess: RowFunction | None = None,
    batch_size: int = 64,
    concurrency: int = 1,
    api_key: str | None = None,
    ca: str | Path | None = None,
    timeout_s: float | None = None,
    background: bool = True,
) -> Callable[[Dataset], Dataset]:
    """A function that answers each row of a data set.

    A row has `messages` (mappings with `role` and `content`) or `prompt` (text or token ids), and
    may have `sampling`, a mapping of fields such as `max_tokens`, over the processor's own. The
    columns of `RowAnswer` are added.

    Args:
        model: id of the model; "" for the only model.
        address: HOST:PORT of a gateway or of several; None for the gateways of the deployment in
            this Ray cluster.
        sampling: fields of the requests, such as `max_tokens` and `temperature`.
        preprocess: makes a row of prompts from a row of the data set.
        postprocess: makes the row of the result.
        batch_size: rows that an actor has in flight at once for each batch.
        concurrency: number of actors.
        api_key: sent with each call; None for gateways without keys.
        ca: PEM file of the gateways' certificate authority, on every node; None for no TLS.
        timeout_s: limit of a row in seconds, waits included; None for no limit.
        background: let rows wait for what interactive requests leave free.
    """
    settings = ProcessorSettings(
        model=model,
        address=address,
        sampling=sampling,
        api_key=api_key,
        ca=ca,
        timeout_s=timeout_s,
        background=background,
    )

    def process(rows: Dataset) -> Dataset:
        from ray.data import ActorPoolStrategy

        if preprocess is not None:
            rows = rows.map(preprocess)
        rows = rows.map_batches(
            RowCaller,
            fn_constructor_args=(settings,),
            batch_size=batch_size,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(size=concurrency),
            num_cpus=0,  # an actor waits for gateways
        )
        return rows if postprocess is None else rows.map(postprocess)

    return process


class RowCaller:
    """The actor's class: answers batches of rows.

    Args:
        settings: gateways, model and fields.
    """

    def __init__(self, settings: ProcessorSettings) -> None:
        self._settings = settings
        self._client: AsyncClient | None = None

    async def __call__(self, batch: pyarrow.Table) -> AsyncIterator[pyarrow.Table]:
        """The batch with the columns of `RowAnswer`."""
        answers = await asyncio.gather(*map(self._answer, batch.to_pylist()))
        yield _with_answers(batch, answers)

    async def _answer(self, row: Row) -> RowAnswer:
        import grpc

        try:
            return await self._ask(row)
        except grpc.RpcError as error:
            details = error.details() if isinstance(error, grpc.aio.AioRpcError) else ""
            return _failed("RpcError", details or str(error))
        except (ArrieroError, TypeError, ValueError) as error:
            return _failed(type(error).__name__, str(error))

    async def _ask(self, row: Row) -> RowAnswer:
        settings = self._settings
        fields = {**(settings.sampling or {}), **_given(row.get("sampling"))}
        fields["model"] = settings.model
        client = self._connected()
        messages, prompt = row.get("messages"), row.get("prompt")
        if (messages is None) == (prompt is None):
            raise InvalidRequest("prompt", "the row needs either `messages` or `prompt`")
        if messages is not None:
            return await _gathered(client.chat([_given(part) for part in messages], **fields))
        assert prompt is not None, "a row has a prompt or messages"
        return await _gathered(client.generate(prompt, **fields))

    def _connected(self) -> AsyncClient:
        """The client, made on the event loop that uses the client."""
        import grpc

        from arriero.router.client.client import AsyncClient

        settings = self._settings
        if self._client is None:
            ca = settings.ca
            self._client = AsyncClient(
                settings.address or DeployedGateways(),
                credentials=None if ca is None else _credentials(grpc, Path(ca)),
                api_key=settings.api_key,
                timeout_s=settings.timeout_s,
                resume_s=RESUME_S,
                retries=RETRIES,
                background=settings.background,
            )
        return self._client


def deployed_gateways() -> tuple[str, ...]:
    """HOST:PORT of each gateway of the deployment in this Ray cluster, in random order.

    A client begins with the first gateway; by the order actors spread over all gateways.

    Raises:
        Unavailable: no deployment is in the cluster, or its registry gives no answer.
    """
    try:
        registry = ray.get_actor(NAME, NAMESPACE)
        answer: Any = ray.get(registry.snapshot.remote(), timeout=REGISTRY_S)
    except ValueError:
        raise Unavailable(
            "no deployment is in this Ray cluster; `arriero up` deploys, or give `address`"
        ) from None
    except (ray.exceptions.RayError, TimeoutError) as error:
        raise Unavailable(f"the deployment's registry gives no answer: {error}") from None
    snapshot = cast(RegistrySnapshot, answer)
    addresses = [gateway.address for gateway in snapshot.gateways]
    return tuple(random.sample(addresses, len(addresses)))


class DeployedGateways:
    """`deployed_gateways`, or the addresses known last while the registry gives no answer."""

    def __init__(self) -> None:
        self._known: tuple[str, ...] = ()

    def __call__(self) -> tuple[str, ...]:
        """HOST:PORT of each gateway; errors as of `deployed_gateways`, before any is known."""
        try:
            self._known = deployed_gateways() or self._known
        except Unavailable:
            if not self._known:
                raise
        return self._known


async def _gathered(answers: AsyncIterator[pb.GenerateResponse]) -> RowAnswer:
    """The answer of a whole stream."""
    from arriero.router.proto.arriero.v1 import inference_pb2 as pb

    text, num_tokens, num_prompt = "", 0, 0
    reason = pb.FINISH_REASON_UNSPECIFIED
    async for answer in answers:
        if answer.HasField("start"):
            num_prompt = answer.start.prompt_tokens or num_prompt
        for output in answer.outputs:
            if output.index == 0:
                text += output.text
                num_tokens += len(output.token_ids)
                reason = output.finish_reason or reason
        if answer.HasField("usage"):
            num_prompt = answer.usage.prompt_tokens
    name = pb.FinishReason.Name(reason)
    return RowAnswer(
        generated_text=text,
        finish_reason=name.removeprefix("FINISH_REASON_").lower(),
        num_input_tokens=num_prompt,
        num_generated_tokens=num_tokens,
    )


def _with_answers(batch: pyarrow.Table, answers: Sequence[RowAnswer]) -> pyarrow.Table:
    import pyarrow

    types = {
        "generated_text": pyarrow.string(),
        "finish_reason": pyarrow.string(),
        "num_input_tokens": pyarrow.int64(),
        "num_generated_tokens": pyarrow.int64(),
        "error": pyarrow.string(),
    }
    for name, kind in types.items():
        values = pyarrow.array([asdict(answer)[name] for answer in answers], kind)
        if name in batch.column_names:
            batch = batch.drop_columns([name])
        batch = batch.append_column(name, values)
    return batch


def _given(fields: Mapping[str, Any] | None) -> Row:
    """The fields that a row sets: a column of mappings has every field in each row."""
    return {name: value for name, value in (fields or {}).items() if value is not None}


def _failed(kind: str, text: str) -> RowAnswer:
    return RowAnswer(error=f"{kind}: {text}"[:_ERROR_CHARS])


def _credentials(grpc: Any, ca: Path) -> Any:  # noqa: ANN401
    return grpc.ssl_channel_credentials(ca.read_bytes())
