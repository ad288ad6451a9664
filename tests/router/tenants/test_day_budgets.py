"""Budgets for a day: refused with the time of the reset, counted over gateways and restarts."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from arriero.cluster.registry.token_ledger import TokenLedger
from arriero.router.client.client import AsyncClient
from arriero.router.gateway import GatewayConfig
from arriero.router.tenants.day_budgets import DayBudgets, day_of
from arriero.router.tenants.keys import add_key
from arriero.router.tenants.tenant import Tenant
from arriero.shards.errors import Overloaded
from arriero.shards.protocol import wire
from support.frontdoor import LLAMA3, endless, make_card
from support.gateways import serve_by

DAY_S = 86_400.0
NOON_S = 20_000 * DAY_S + DAY_S / 2
ACME = Tenant(name="acme", tokens_per_day=100, tokens_per_day_by_model={"big": 30})
FREE = Tenant(name="free")


class Clock:
    """Seconds since 1970, by hand."""

    def __init__(self) -> None:
        self.now_s = NOON_S

    def __call__(self) -> float:
        return self.now_s


def test_a_budget_ends_at_midnight() -> None:
    clock = Clock()
    budgets = DayBudgets(clock)
    budgets.check(ACME, "small")
    budgets.charge(ACME, "small", 99)
    budgets.check(ACME, "small")
    budgets.charge(ACME, "small", 51)  # the last request may overdraw
    words = r"used 150 tokens today, and `tokens_per_day` is 100; .* at 2024-10-05T00:00:00Z"
    with pytest.raises(Overloaded, match=words) as refused:
        budgets.check(ACME, "small")
    assert str(refused.value).endswith("in 43200 s")
    assert refused.value.retry_after_s == DAY_S / 2
    budgets.check(FREE, "small")
    clock.now_s += DAY_S / 2
    budgets.check(ACME, "small")
    assert budgets.used("acme") == 0


def test_a_model_has_a_budget_of_its_own() -> None:
    budgets = DayBudgets(Clock())
    budgets.charge(ACME, "big", 30)
    with pytest.raises(Overloaded, match=r"`tokens_per_day_by_model\.big` is 30"):
        budgets.check(ACME, "big")
    budgets.check(ACME, "small")
    budgets.charge(ACME, "small", 70)
    with pytest.raises(Overloaded, match="`tokens_per_day` is 100"):
        budgets.check(ACME, "small")
    budgets.charge(FREE, "big", 10**9)  # nobody asks for the sums of a tenant without a budget
    assert budgets.take()[1].keys() == {"acme"}


def test_gateways_count_together_and_start_again() -> None:
    clock, ledger = Clock(), TokenLedger()
    first, second = DayBudgets(clock), DayBudgets(clock)

    def spend(budgets: DayBudgets) -> None:
        day, spent = budgets.take()
        budgets.merge(day, ledger.add(day, spent))

    first.charge(ACME, "small", 60)
    second.charge(ACME, "small", 30)
    for budgets in (first, second, first):
        spend(budgets)
    assert first.used("acme") == second.used("acme") == 90
    first.charge(ACME, "small", 10)
    with pytest.raises(Overloaded):
        first.check(ACME, "small")
    again = DayBudgets(clock)  # a gateway that starts reads the sums
    spend(first)
    spend(again)
    with pytest.raises(Overloaded):
        again.check(ACME, "small")
    clock.now_s += DAY_S
    for budgets in (again, second, first):
        spend(budgets)
        assert budgets.used("acme") == 0


def test_a_ledger_that_is_away_loses_nothing() -> None:
    clock, ledger = Clock(), TokenLedger()
    budgets = DayBudgets(clock)
    budgets.charge(ACME, "small", 40)
    day, spent = budgets.take()
    assert budgets.used("acme") == 40, "what is on its way counts"
    budgets.charge(ACME, "small", 5)
    budgets.give_back(day, spent)
    assert budgets.used("acme") == 45
    day, spent = budgets.take()
    budgets.charge(ACME, "small", 1)
    budgets.merge(day, ledger.add(day, spent))
    assert budgets.used("acme") == 46 and ledger.tokens == {"acme": {"small": 45}}
    assert ledger.add(day - 1, {"acme": {"small": 9}}) == {}  # a clock that is behind
    assert ledger.tokens == {"acme": {"small": 45}}
    stored = json.loads(json.dumps(wire.to_builtins(ledger)))
    assert wire.from_builtins(stored, TokenLedger) == ledger


async def test_both_listeners_say_when_to_come_back(
    llama_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    path = tmp_path / "keys.yaml"
    key, other = add_key(path, "acme"), add_key(path, "other")
    config = GatewayConfig(
        http_address="127.0.0.1:0",
        keys=path,
        tenants=(Tenant(name="acme", tokens_per_day=40),),
        num_gateways=4,
    )
    ask = {"prompt": [60, 61, 62], "max_tokens": 20}
    async with serve_by([make_card(llama_tokenizer, LLAMA3)], endless, config) as served:
        await served.warm(0, key)
        async with served.http(0, headers={"authorization": f"Bearer {key}"}) as client:
            for _ in range(2):  # 23 tokens each; a budget is not shared out among gateways
                assert (await client.post("/v1/completions", json=ask)).status_code == 200
            assert served.gateways[0].budgets.used("acme", "tiny") == 46
            refused = await client.post("/v1/completions", json=ask)
        assert refused.status_code == 429
        error = refused.json()["error"]
        assert (
            error["code"] == "rate_limit_exceeded" and "`tokens_per_day` is 40" in error["message"]
        )
        left_s = (day_of(time.time()) + 1) * DAY_S - time.time()
        assert abs(int(refused.headers["retry-after"]) - left_s) < 10
        async with AsyncClient(f"127.0.0.1:{served.ports[0]}", api_key=key) as client:
            with pytest.raises(Overloaded, match="full again at") as seen:
                async for _ in client.generate([60], max_tokens=2):
                    pass
            assert abs(seen.value.retry_after_s - left_s) < 10
        async with AsyncClient(f"127.0.0.1:{served.ports[0]}", api_key=other) as client:
            assert [m async for m in client.generate([60], max_tokens=2)]
