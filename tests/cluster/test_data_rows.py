"""Rows of a data set, asked of a real gateway without Ray Data."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from arriero.cluster import data
from arriero.cluster.data import DeployedGateways, ProcessorSettings, RowCaller
from arriero.shards.errors import Unavailable
from support.frontdoor import LLAMA3, LLAMA_SPECIALS, endless, make_card, make_tokenizer, serve

pyarrow = pytest.importorskip("pyarrow", reason="needs the extra arriero[data]")


async def test_a_bad_row_is_a_row_with_an_error() -> None:
    rows: list[dict[str, Any]] = [
        {"n": 1, "prompt": "hello", "messages": None, "sampling": None},
        {"n": 2, "prompt": None, "messages": None, "sampling": None},
        {"n": 3, "prompt": "hello", "messages": None, "sampling": {"max_tokens": -4}},
        {
            "n": 4,
            "prompt": None,
            "messages": [{"role": "user", "content": "hi"}],
            "sampling": {"max_tokens": 5},
        },
    ]
    tokenizer = make_tokenizer(LLAMA_SPECIALS, bos="<|begin_of_text|>")
    async with serve(make_card(tokenizer, LLAMA3), endless) as stack:
        settings = ProcessorSettings(address=stack.address, sampling={"max_tokens": 3})
        caller = RowCaller(settings)
        async with asyncio.timeout(60):
            (answered,) = [table async for table in caller(pyarrow.Table.from_pylist(rows))]
        assert caller._client is not None
        await caller._client.close()
        assert {request.priority for request in stack.engine.submitted} == {1_000_000}
    values = answered.to_pylist()
    assert [value["n"] for value in values] == [1, 2, 3, 4]
    assert [value["num_generated_tokens"] for value in values] == [3, None, None, 5]
    assert [value["finish_reason"] for value in values] == ["length", None, None, "length"]
    assert [value["error"] is None for value in values] == [True, False, False, True]
    assert "either `messages` or `prompt`" in values[1]["error"]
    assert values[2]["error"].startswith("InvalidRequest: `max_tokens`")
    assert values[0]["num_input_tokens"] > 0 and values[0]["generated_text"]


def test_rows_go_on_while_the_registry_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[tuple[str, ...] | Unavailable] = [
        Unavailable("no deployment"),
        ("127.0.0.1:1", "127.0.0.1:2"),
        Unavailable("the registry gives no answer"),
        (),
        ("127.0.0.1:3",),
    ]

    def answer() -> tuple[str, ...]:
        given = answers.pop(0)
        if isinstance(given, Unavailable):
            raise given
        return given

    monkeypatch.setattr(data, "deployed_gateways", answer)
    gateways = DeployedGateways()
    with pytest.raises(Unavailable, match="no deployment"):
        gateways()
    known = ("127.0.0.1:1", "127.0.0.1:2")
    assert [gateways(), gateways(), gateways(), gateways()] == [known] * 3 + [("127.0.0.1:3",)]
