"""A file of requests over HTTP: what an interruption, a lost gateway and bad lines leave."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from arriero.router.client.batch_files import OutputFiles
from arriero.router.client.batch_run import BatchRun, BatchRunConfig, BatchTotals
from arriero.router.gateway import GatewayConfig
from arriero.shards.errors import SpecError, Unavailable
from support.eventually import eventually_async
from support.frontdoor import LLAMA3, endless, make_card
from support.gateways import Gateways, serve_by

CONFIG = GatewayConfig(http_address="127.0.0.1:0", models=("tiny",), lost_s=0.5)


def line(name: str, **body: Any) -> bytes:  # noqa: ANN401
    body = {"prompt": "hello", "max_tokens": 3} | body
    value = {"custom_id": name, "method": "POST", "url": "/v1/completions", "body": body}
    return json.dumps(value).encode() + b"\n"


def config(
    folder: Path,
    urls: list[str] | Callable[[], list[str]],
    **changes: Any,  # noqa: ANN401
) -> BatchRunConfig:
    values: dict[str, Any] = {"in_flight": 4, "give_up_s": 20.0}
    return BatchRunConfig(
        source=folder / "in.jsonl",
        output=folder / "out.jsonl",
        errors=folder / "errors.jsonl",
        urls=urls,
        **(values | changes),
    )


def url(served: Gateways, number: int = 0) -> str:
    return f"http://127.0.0.1:{served.gateways[number].http_port}"


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in path.read_text().splitlines()]


def names(path: Path) -> Counter[str]:
    return Counter(value["custom_id"] for value in read(path))


async def test_every_line_is_in_one_of_the_files(
    llama_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    faults = [b"{\n", line("r1"), b'{"custom_id": "m"}\n', b"x" * 5000 + b"\n"]
    data = [*(line(f"r{number}") for number in range(10)), *faults, line("no", max_tokens=-5)]
    (tmp_path / "in.jsonl").write_bytes(b"".join(data))
    async with serve_by([make_card(llama_tokenizer, LLAMA3)], endless, CONFIG) as served:
        settings = config(tmp_path, [url(served)], max_line_bytes=4000)
        shown: list[tuple[int, int]] = []
        totals = await BatchRun(settings, lambda done, total: shown.append((done, total))).run()
        assert totals == BatchTotals(total=15, answered=10, failed=5, errors=5)
        assert shown[-1] == (15, 15)
        again = await BatchRun(settings).run()
        assert again == BatchTotals(total=15, resumed=15, errors=5)
        assert {request.priority for request in served.engines[0].submitted} == {1_000_000}
    assert names(settings.output) == {f"r{number}": 1 for number in range(10)}
    errors = {value["error"]["line"]: value["error"] for value in read(settings.errors)
              if value["error"]}  # fmt: skip
    assert {number: error["code"] for number, error in errors.items()} == {
        11: "invalid_json_line",
        12: "duplicate_custom_id",
        13: "missing_required_parameter",
        14: "line_too_long",
    }
    assert "has 5000 bytes; the limit is 4000" in errors[14]["message"]
    (refused,) = [value for value in read(settings.errors) if not value["error"]]
    assert (refused["custom_id"], refused["response"]["status_code"]) == ("no", 400)


async def test_a_run_that_was_cut_off_goes_on(llama_tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(b"".join(line(f"r{number}") for number in range(40)))
    cards = [make_card(llama_tokenizer, LLAMA3)]
    async with serve_by(cards, endless, CONFIG, step_s=0.01) as served:
        settings = config(tmp_path, [url(served)])
        cut = asyncio.create_task(BatchRun(settings).run())
        async with asyncio.timeout(60):
            while not settings.output.exists() or len(settings.output.read_bytes()) < 3000:
                await asyncio.sleep(0.01)
        cut.cancel()
        await asyncio.gather(cut, return_exceptions=True)
        whole = settings.output.read_bytes()
        assert whole.endswith(b"\n") and whole.count(b"\n") < 40
        settings.output.write_bytes(whole[:-20])  # as after a crash in the middle of a line
        totals = await BatchRun(settings).run()
        assert totals.resumed == whole.count(b"\n") - 1
        assert totals.answered == 40 - totals.resumed
    assert names(settings.output) == {f"r{number}": 1 for number in range(40)}


async def test_a_lost_gateway_costs_no_line(llama_tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(b"".join(line(f"r{number}") for number in range(60)))
    cards = [make_card(llama_tokenizer, LLAMA3)]
    async with serve_by(cards, endless, CONFIG, CONFIG, step_s=0.01) as served:
        settings = config(tmp_path, [url(served, 0), url(served, 1)])
        run = asyncio.create_task(BatchRun(settings).run())
        async with asyncio.timeout(60):
            while not settings.output.exists() or len(settings.output.read_bytes()) < 3000:
                await asyncio.sleep(0.01)
        await served.kill(1)
        totals = await run
    assert totals == BatchTotals(total=60, answered=60)
    assert names(settings.output) == {f"r{number}": 1 for number in range(60)}


async def test_a_new_gateway_is_learnt(llama_tokenizer: Tokenizer, tmp_path: Path) -> None:
    """All gateways that the run knew are gone; another is at an address of its own."""
    (tmp_path / "in.jsonl").write_bytes(b"".join(line(f"r{number}") for number in range(60)))
    cards = [make_card(llama_tokenizer, LLAMA3)]
    async with serve_by(cards, endless, CONFIG, CONFIG, step_s=0.01) as served:
        answers = iter([[url(served, 0)], Unavailable("the head is away"), [url(served, 1)]])

        def discover() -> list[str]:
            answer = next(answers)
            if isinstance(answer, Unavailable):
                raise answer
            return answer

        settings = config(tmp_path, discover)
        run = asyncio.create_task(BatchRun(settings).run())
        async with asyncio.timeout(60):
            while not settings.output.exists() or len(settings.output.read_bytes()) < 3000:
                await asyncio.sleep(0.01)
        await served.kill(0)
        totals = await run
    assert totals == BatchTotals(total=60, answered=60)
    assert names(settings.output) == {f"r{number}": 1 for number in range(60)}


async def test_a_request_that_a_stop_cuts_off_may_go_elsewhere(llama_tokenizer: Tokenizer) -> None:
    cards = [make_card(llama_tokenizer, LLAMA3)]
    async with serve_by(cards, endless, CONFIG, step_s=0.02) as served:
        async with served.http(0) as http:
            body = {"model": "tiny", "prompt": "hello", "max_tokens": 400}
            asking = asyncio.create_task(http.post("/v1/completions", json=body))
            await eventually_async(lambda: served.engines[0].running, 30)
            await served.kill(0)
            answer = await asking
    assert answer.status_code == 503 and "stopping" in answer.json()["error"]["message"]


async def test_without_a_gateway_the_run_ends(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(line("a"))
    with pytest.raises(Unavailable, match=r"no gateway answered for 0\.2 s"):
        await BatchRun(config(tmp_path, ["http://127.0.0.1:1"], give_up_s=0.2)).run()


def test_files_of_others_stay_as_they_are(tmp_path: Path) -> None:
    output, errors = tmp_path / "out", tmp_path / "errors"
    with OutputFiles(output, errors):
        with pytest.raises(SpecError, match="another run writes the file"):
            OutputFiles(output, errors)
    output.write_text("a diary\n")
    with pytest.raises(SpecError, match="line 1 is no line of a batch's output"):
        OutputFiles(output, errors)
    assert output.read_text() == "a diary\n"
