"""Ray Data over a deployment: our processor, and Ray's own HTTP processor unchanged."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

pytest.importorskip("pandas", reason="needs the extra arriero[data]")
pytest.importorskip("pyarrow", reason="needs the extra arriero[data]")
ray = pytest.importorskip("ray")

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(900)]


@contextmanager
def one_gateway() -> Iterator[tuple[str, str]]:
    """gRPC and HTTP addresses of a gateway over a made-up model, in a thread of its own."""
    import asyncio
    import threading

    from arriero.router.gateway import GatewayConfig
    from support.frontdoor import LLAMA3, LLAMA_SPECIALS, endless, make_card, make_tokenizer, serve

    ready, addresses = threading.Event(), []
    loop = asyncio.new_event_loop()
    ending = asyncio.Event()

    async def run() -> None:
        tokenizer = make_tokenizer(LLAMA_SPECIALS, bos="<|begin_of_text|>")
        config = GatewayConfig(http_address="127.0.0.1:0", models=("tiny",))
        async with serve(make_card(tokenizer, LLAMA3), endless, config=config) as stack:
            addresses.extend([stack.address, f"127.0.0.1:{stack.gateway.http_port}"])
            ready.set()
            await ending.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(run(),), daemon=True)
    thread.start()
    assert ready.wait(120)
    try:
        yield addresses[0], addresses[1]
    finally:
        loop.call_soon_threadsafe(ending.set)
        thread.join(60)
        loop.close()


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.mark.filterwarnings("ignore")
def test_rows_through_the_processor(cluster: None) -> None:
    from arriero.cluster.data import processor

    rows: list[dict[str, Any]] = [{"n": n, "prompt": f"number {n}"} for n in range(20)]
    rows[7]["prompt"] = "x" * 5000  # longer than the context
    with one_gateway() as (grpc_address, _):
        process = processor(address=grpc_address, sampling={"max_tokens": 4}, batch_size=8)
        answered = sorted(process(ray.data.from_items(rows)).take_all(), key=lambda row: row["n"])
    assert [row["n"] for row in answered] == list(range(20))
    assert [row["n"] for row in answered if row["error"] is not None] == [7]
    assert {row["num_generated_tokens"] for row in answered if row["n"] != 7} == {4}


@pytest.mark.filterwarnings("ignore")
def test_the_public_http_processor(cluster: None) -> None:
    from ray.data.llm import HttpRequestProcessorConfig, build_processor

    with one_gateway() as (_, http_address):
        config = HttpRequestProcessorConfig(
            url=f"http://{http_address}/v1/chat/completions",
            headers={"x-background": "1"},
            batch_size=8,
            concurrency=1,
        )
        process = build_processor(
            config,
            preprocess=lambda row: {
                "payload": {
                    "model": "tiny",
                    "messages": [{"role": "user", "content": f"number {row['id']}"}],
                    "max_tokens": 4,
                }
            },
            postprocess=lambda row: {
                "tokens": row["http_response"]["usage"]["completion_tokens"],
                "answer": row["http_response"]["choices"][0]["message"]["content"],
            },
        )
        answered = process(ray.data.range(20)).take_all()
    assert [row["tokens"] for row in answered] == [4] * 20
