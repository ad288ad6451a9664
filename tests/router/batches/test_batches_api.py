"""`/v1/files` and `/v1/batches` over real sockets, asked by OpenAI's client."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from tokenizers import Tokenizer

from arriero.router.batches.config import BatchesConfig
from arriero.router.gateway import GatewayConfig
from arriero.router.tenants.keys import add_key
from support.eventually import eventually_async
from support.frontdoor import LLAMA3, Stack, endless, make_card, serve


def lines(count: int, **changes: object) -> bytes:
    """Requests whose answers have two tokens."""
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
    return b"".join(
        json.dumps(
            {
                "custom_id": f"r{number}",
                "method": "POST",
                "url": "/v1/chat/completions",
                "body": body,
                **changes,
            }
        ).encode()
        + b"\n"
        for number in range(count)
    )


def config(folder: Path, **limits: Any) -> GatewayConfig:  # noqa: ANN401
    return GatewayConfig(
        http_address="127.0.0.1:0",
        models=("tiny",),
        lost_s=0.5,
        batches=BatchesConfig(path=folder, **limits),
    )


def client(stack: Stack, key: str = "none") -> openai.AsyncOpenAI:
    url = f"http://127.0.0.1:{stack.gateway.http_port}/v1"
    return openai.AsyncOpenAI(base_url=url, api_key=key, max_retries=0)


@asynccontextmanager
async def asking(
    tokenizer: Tokenizer, settings: GatewayConfig, step_s: float = 0.0
) -> AsyncIterator[tuple[Stack, openai.AsyncOpenAI]]:
    card = make_card(tokenizer, LLAMA3, max_model_len=4096)
    async with serve(card, endless, config=settings, step_s=step_s) as stack, client(stack) as ask:
        yield stack, ask


async def begin(ask: openai.AsyncOpenAI, data: bytes, window: Any = "24h") -> Any:  # noqa: ANN401
    file = await ask.files.create(file=("in.jsonl", data), purpose="batch")
    return await ask.batches.create(
        input_file_id=file.id, endpoint="/v1/chat/completions", completion_window=window
    )


async def end(ask: openai.AsyncOpenAI, batch_id: str) -> Any:  # noqa: ANN401
    ended = ("completed", "failed", "expired", "cancelled")
    async with asyncio.timeout(60):
        while (batch := await ask.batches.retrieve(batch_id)).status not in ended:
            await asyncio.sleep(0.05)
    return batch


async def results(ask: openai.AsyncOpenAI, file_id: str | None) -> list[dict[str, Any]]:
    assert file_id is not None
    text = (await ask.files.content(file_id)).text
    return [json.loads(line) for line in text.splitlines()]


async def test_a_batch_from_upload_to_results(llama_tokenizer: Tokenizer, tmp_path: Path) -> None:
    bad = lines(1, custom_id="bad", body={"model": "tiny", "messages": [], "max_tokens": -7})
    async with asking(llama_tokenizer, config(tmp_path)) as (stack, ask):
        batch = await begin(ask, lines(20) + bad)
        assert (batch.status, batch.object) == ("validating", "batch")
        batch = await end(ask, batch.id)
        assert batch.status == "completed" and batch.completed_at is not None
        counts = batch.request_counts
        assert (counts.total, counts.completed, counts.failed) == (21, 20, 1)
        answers = await results(ask, batch.output_file_id)
        assert sorted(answer["custom_id"] for answer in answers) == sorted(
            f"r{number}" for number in range(20)
        )
        body = answers[0]["response"]["body"]
        assert answers[0]["error"] is None and answers[0]["response"]["status_code"] == 200
        assert body["object"] == "chat.completion" and body["usage"]["completion_tokens"] == 2
        (refused,) = await results(ask, batch.error_file_id)
        assert refused["custom_id"] == "bad" and refused["response"]["status_code"] == 400
        assert refused["response"]["body"]["error"]["param"] == "max_tokens"
        assert {request.priority for request in stack.engine.submitted} == {1_000_000}
        facts = await ask.files.retrieve(batch.output_file_id or "")
        assert facts.purpose == "batch_output" and facts.bytes > 0


async def test_faults_of_lines_fail_the_batch(llama_tokenizer: Tokenizer, tmp_path: Path) -> None:
    data = lines(2) + lines(1) + b"{\n" + lines(1, custom_id="u", url="/v1/completions")
    async with asking(llama_tokenizer, config(tmp_path)) as (stack, ask):
        batch = await end(ask, (await begin(ask, data)).id)
        assert batch.status == "failed" and batch.output_file_id is None
        faults = [(fault.code, fault.line, fault.param) for fault in batch.errors.data]
        assert faults == [
            ("duplicate_custom_id", 3, "custom_id"),
            ("invalid_json_line", 4, None),
            ("mismatched_url", 5, "url"),
        ]
        assert not stack.engine.submitted
        batch = await end(ask, (await begin(ask, b"\n")).id)
        assert [fault.code for fault in batch.errors.data] == ["empty_file"]


async def test_cancel_keeps_what_was_run(llama_tokenizer: Tokenizer, tmp_path: Path) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "max_tokens": 3000}
    data = lines(3) + b"".join(lines(1, custom_id=f"long{i}", body=body) for i in range(3))
    async with asking(llama_tokenizer, config(tmp_path), step_s=0.01) as (stack, ask):
        batch = await begin(ask, data)
        async with asyncio.timeout(60):
            while (await ask.batches.retrieve(batch.id)).request_counts.completed < 3:
                await asyncio.sleep(0.05)
        assert (await ask.batches.cancel(batch.id)).status == "cancelling"
        batch = await end(ask, batch.id)
        assert batch.status == "cancelled" and batch.cancelled_at is not None
        assert len(await results(ask, batch.output_file_id)) == 3
        unrun = await results(ask, batch.error_file_id)
        assert {line["custom_id"] for line in unrun} == {"long0", "long1", "long2"}
        assert {line["error"]["code"] for line in unrun} == {"batch_cancelled"}
        await eventually_async(lambda: not stack.engine.running, 10)
        with pytest.raises(openai.BadRequestError, match="cancelled"):
            await ask.batches.cancel(batch.id)


async def test_a_batch_expires(llama_tokenizer: Tokenizer, tmp_path: Path) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "max_tokens": 3000}
    async with asking(llama_tokenizer, config(tmp_path), step_s=0.01) as (_, ask):
        batch = await end(ask, (await begin(ask, lines(2, body=body), "2s")).id)
        assert batch.status == "expired" and batch.expired_at is not None
        unrun = await results(ask, batch.error_file_id)
        assert [line["error"]["code"] for line in unrun] == ["batch_expired"] * 2
        with pytest.raises(openai.BadRequestError, match="`completion_window`='1y'"):
            await begin(ask, lines(1), "1y")


async def test_pages_of_lists(llama_tokenizer: Tokenizer, tmp_path: Path) -> None:
    async with asking(llama_tokenizer, config(tmp_path)) as (_, ask):
        batches = {(await begin(ask, lines(1))).id for _ in range(5)}
        listed = [batch.id async for batch in ask.batches.list(limit=2)]
        assert len(listed) == 5 and set(listed) == batches
        files = [file async for file in ask.files.list(purpose="batch", limit=2)]
        assert len(files) == 5
        deleted = await ask.files.delete(files[0].id)
        assert deleted.deleted
        with pytest.raises(openai.NotFoundError):
            await ask.files.retrieve(files[0].id)
        with pytest.raises(openai.BadRequestError, match="`limit`=101"):
            await ask.batches.list(limit=101)
        with pytest.raises(openai.BadRequestError, match="`after`"):
            await ask.batches.list(after="batch_x")


async def test_what_is_refused(llama_tokenizer: Tokenizer, tmp_path: Path) -> None:
    limits = config(tmp_path, max_bytes=3000, max_file_bytes=2000, max_files=3)
    async with asking(llama_tokenizer, limits) as (stack, ask):
        with pytest.raises(openai.APIStatusError, match="more than") as large:
            await ask.files.create(file=("in.jsonl", b"x" * 100_000), purpose="batch")
        assert large.value.status_code == 413
        await ask.files.create(file=("in.jsonl", b"x" * 2000), purpose="batch")
        with pytest.raises(openai.BadRequestError, match="room for 1000") as full:
            await ask.files.create(file=("in.jsonl", b"x" * 1500), purpose="batch")
        assert full.value.code == "storage_full"
        for _ in range(2):
            await ask.files.create(file=("in.jsonl", b"x"), purpose="batch")
        with pytest.raises(openai.BadRequestError, match=r"`gateway\.batches\.max_files` is 3"):
            await ask.files.create(file=("in.jsonl", b"x"), purpose="batch")
        with pytest.raises(openai.BadRequestError, match="`purpose`='vision'"):
            await ask.files.create(file=("in.jsonl", b"x"), purpose="vision")
        with pytest.raises(openai.NotFoundError, match="there is no file"):
            await ask.batches.create(
                input_file_id="file-none",
                endpoint="/v1/chat/completions",
                completion_window="24h",
            )
        for batch_id in ("batch_none", "..%2F..%2Fx", "batch_" + "0" * 24):
            with pytest.raises(openai.NotFoundError):
                await ask.batches.retrieve(batch_id)
        url = f"http://127.0.0.1:{stack.gateway.http_port}"
        async with httpx.AsyncClient(base_url=url) as http:
            form = {"files": {"file": b"x"}, "data": {"purpose": "batch"}}
            page = await http.post("/v1/files", headers={"origin": "http://x"}, **form)  # type: ignore[arg-type]
            elsewhere = await http.post("/v1/batches", **form)  # type: ignore[arg-type]
        assert (page.status_code, elsewhere.status_code) == (415, 415)


async def test_tenants_are_apart(llama_tokenizer: Tokenizer, tmp_path: Path) -> None:
    keys = tmp_path / "keys.json"
    acme, other = add_key(keys, "acme"), add_key(keys, "other")
    settings = GatewayConfig(
        http_address="127.0.0.1:0",
        models=("tiny",),
        keys=keys,
        batches=BatchesConfig(path=tmp_path / "spool"),
    )
    card = make_card(llama_tokenizer, LLAMA3)
    async with (
        serve(card, endless, config=settings) as stack,
        client(stack, acme) as ours,
        client(stack, other) as theirs,
    ):
        batch = await begin(ours, lines(1))
        with pytest.raises(openai.NotFoundError):
            await theirs.batches.retrieve(batch.id)
        with pytest.raises(openai.NotFoundError):
            await theirs.batches.cancel(batch.id)
        with pytest.raises(openai.NotFoundError):
            await theirs.files.content(batch.input_file_id)
        with pytest.raises(openai.NotFoundError):
            await theirs.batches.create(
                input_file_id=batch.input_file_id,
                endpoint="/v1/chat/completions",
                completion_window="24h",
            )
        assert [file async for file in theirs.files.list()] == []
        batch = await end(ours, batch.id)
        assert batch.status == "completed"
        assert {request.tenant for request in stack.engine.submitted} == {"acme"}
