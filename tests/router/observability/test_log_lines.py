"""Lines of a process's log: JSON with the id of the request, and a line for each stage."""

from __future__ import annotations

import asyncio
import io
import json
import logging
from collections.abc import Iterator

import httpx
import pytest
from tokenizers import Tokenizer

from arriero.cluster.hosts.log_level import set_log_level
from arriero.router.gateway import GatewayConfig
from arriero.router.observability.log_lines import formatter, set_request_id
from support.frontdoor import LLAMA3, endless, make_card, serve

ASK = {"messages": [{"role": "user", "content": "secret words"}], "max_tokens": 4}


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    """What the logger `arriero` writes, as a process of a deployment sets it up."""
    logger, text = logging.getLogger("arriero"), io.StringIO()
    before = logger.level, list(logger.handlers)
    logger.handlers = [logging.StreamHandler(text)]
    yield text
    logger.level, logger.handlers = before


def test_a_line_of_json(log: io.StringIO) -> None:
    set_log_level("info", "json")
    logger = logging.getLogger("arriero.router.x")
    set_request_id("req-1")
    logger.info("it is %d degrees", 7)
    logger.warning("other", extra={"request_id": "req-2"})
    logger.debug("not at this level")
    set_request_id("")
    try:
        raise ValueError("broken")
    except ValueError:
        logger.exception("line\nwith a break")
    first, second, third = map(json.loads, log.getvalue().splitlines())
    assert first["message"] == "it is 7 degrees" and first["request_id"] == "req-1"
    assert (first["level"], first["logger"]) == ("info", "arriero.router.x")
    assert first["time"].endswith("Z") and first["pid"] > 0
    assert second["request_id"] == "req-2"
    assert "request_id" not in third and "ValueError: broken" in third["exception"]
    set_log_level("debug", "text")  # a reload changes both
    set_request_id("req-3")
    logger.debug("now")
    set_request_id("")
    assert log.getvalue().splitlines()[-1].endswith("DEBUG arriero.router.x: now [req-3]")


def test_text_names_the_request_once() -> None:
    record = logging.LogRecord("a", logging.INFO, "", 0, "request req-9 failed", None, None)
    record.request_id = "req-9"
    assert formatter("text").format(record).endswith("request req-9 failed")


async def test_a_line_for_each_stage(llama_tokenizer: Tokenizer, log: io.StringIO) -> None:
    set_log_level("debug", "json")
    config = GatewayConfig(http_address="127.0.0.1:0")
    async with serve(make_card(llama_tokenizer, LLAMA3), endless, config=config) as stack:
        async with httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{stack.gateway.http_port}"
        ) as client:
            for _ in range(10):  # the first request imports; a busy machine takes seconds
                if (await client.post("/v1/chat/completions", json=ASK)).status_code == 200:
                    break
                await asyncio.sleep(0.5)
            for path in ("/v1/chat/completions", "/v1/chat/completions?"):
                headers = {"x-request-id": "mine"}
                assert (await client.post(path, json=ASK, headers=headers)).status_code == 200
        async for _ in stack.client.generate([60], max_tokens=2, request_id="by-grpc"):
            pass
    lines = [json.loads(line) for line in log.getvalue().splitlines()]
    assert "secret words" not in log.getvalue()
    for request_id, times in (("mine", 2), ("by-grpc", 1)):
        stages = [line["message"] for line in lines if line.get("request_id") == request_id]
        for words in (
            "prompt tokens",
            "turn after",
            "goes to group g0",
            "first token",
            "finished:",
        ):
            assert sum(words in stage for stage in stages) == times, (request_id, words, stages)
    submitted = [line for line in lines if line["logger"] == "arriero.router.link.server"]
    assert any(line.get("request_id", "").startswith("by-grpc") for line in submitted)
