"""Keys for some models alone, on both listeners; and what a stranger learns without a key."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from tokenizers import Tokenizer

from arriero.router.client.client import AsyncClient
from arriero.router.gateway import GatewayConfig
from arriero.router.tenants.keys import add_key, read_keys, rotate_key
from arriero.shards.errors import InvalidRequest, NotFound, SpecError
from support.frontdoor import LLAMA3, endless, make_card
from support.gateways import Gateways, serve_by

ASK = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}


@dataclass
class Served:
    """A gateway over the models `big`, `mid` and `small`, and a key of each kind."""

    served: Gateways
    all: str
    small: str
    two: str
    none: str

    def ask(self, key: str) -> httpx.AsyncClient:
        return self.served.http(0, headers={"authorization": f"Bearer {key}"} if key else {})

    def grpc(self, key: str) -> AsyncClient:
        return AsyncClient(f"127.0.0.1:{self.served.ports[0]}", api_key=key)


@pytest.fixture
async def three(llama_tokenizer: Tokenizer, tmp_path: Path) -> AsyncIterator[Served]:
    path = tmp_path / "keys.yaml"
    keys = [
        add_key(path, "acme"),
        add_key(path, "acme", models=["small"]),
        add_key(path, "acme", models=["small", "mid"]),
        add_key(path, "acme", models=["of-later"]),
    ]
    cards = [
        make_card(llama_tokenizer, LLAMA3, model=name, group=f"{name}-0")
        for name in ("big", "mid", "small")
    ]
    config = GatewayConfig(http_address="127.0.0.1:0", keys=path, models=("big", "mid", "small"))
    async with serve_by(cards, endless, config) as served:
        await served.warm(0, keys[1])
        yield Served(served, *keys)


async def test_a_key_reaches_its_models_alone(three: Served) -> None:
    async with three.ask(three.small) as ask:
        listed = (await ask.get("/v1/models")).json()["data"]
        assert [model["id"] for model in listed] == ["small"]
        bodies = {
            "/v1/chat/completions": ASK,
            "/v1/completions": {"prompt": "hello", "max_tokens": 4},
            "/v1/responses": {"input": "hello", "max_output_tokens": 4},
            "/v1/messages": ASK,
            "/v1/messages/count_tokens": {"messages": ASK["messages"]},
            "/tokenize": {"prompt": "hello"},
            "/detokenize": {"tokens": [60]},
        }
        for path, body in bodies.items():
            assert (await ask.post(path, json=body | {"model": "small"})).status_code == 200, path
            refused = await ask.post(path, json=body | {"model": "big"})
            unknown = await ask.post(path, json=body | {"model": "none"})
            assert refused.status_code == unknown.status_code == 404, path
            # a model that the key may not use looks like one that does not exist
            said = json.dumps(refused.json() | {"request_id": ""})
            assert said == json.dumps(unknown.json() | {"request_id": ""}).replace(
                "'none'", "'big'"
            )
            assert "available models: small" in said and "mid" not in said, path
            if path.startswith("/v1/messages"):
                assert refused.json()["error"]["type"] == "not_found_error"
            else:
                assert refused.json()["error"]["code"] == "model_not_found"
        assert (await ask.post("/v1/chat/completions", json=ASK)).json()["model"] == "small"
        assert (await ask.get("/v1/models/small")).status_code == 200
        assert (await ask.get("/v1/models/big")).status_code == 404


async def test_a_key_for_two_models_and_one_for_all(three: Served) -> None:
    async with three.ask(three.two) as ask:
        listed = (await ask.get("/v1/models")).json()["data"]
        assert [model["id"] for model in listed] == ["mid", "small"]
        refused = await ask.post("/v1/chat/completions", json=ASK)
        assert refused.status_code == 400 and "one of: mid, small" in refused.text
    async with three.ask(three.none) as ask:
        assert (await ask.get("/v1/models")).json()["data"] == []
        assert (await ask.post("/v1/chat/completions", json=ASK)).status_code == 404
    async with three.ask(three.all) as ask:  # on the connection of no other key
        assert len((await ask.get("/v1/models")).json()["data"]) == 3
        assert (await ask.post("/v1/chat/completions", json=ASK | {"model": "big"})).is_success


async def test_grpc_has_the_same_limits(three: Served) -> None:
    async with three.grpc(three.small) as client:
        assert [model.id for model in await client.models()] == ["small"]
        assert [m async for m in client.generate([60], model="small", max_tokens=2)]
        for model in ("big", "none"):
            with pytest.raises(NotFound, match=r"available models: small$"):
                async for _ in client.generate([60], model=model, max_tokens=2):
                    pass
        with pytest.raises(NotFound):
            await client.model("mid")
    async with three.grpc(three.two) as client:
        with pytest.raises(InvalidRequest, match="one of: mid, small"):
            async for _ in client.generate([60], max_tokens=2):
                pass


async def test_strangers_learn_only_whether_it_is_well(three: Served) -> None:
    async with three.ask("") as ask:
        assert (await ask.get("/health")).json() == {"status": "ok"}
    async with three.ask("arr-000000000000-" + "0" * 64) as ask:
        assert (await ask.get("/health")).json() == {"status": "ok"}
    async with three.ask(three.small) as ask:
        assert set((await ask.get("/health")).json()["groups"]) == {"small-0"}


def test_the_models_of_a_key_are_stored_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    old = add_key(path, "acme", models=["a", "b"]).split("-")[1]
    _, entry = rotate_key(path, old, 60)
    assert entry.models == ("a", "b")
    assert {entry.models for entry in read_keys(path).values()} == {("a", "b")}
    path.write_text(path.read_text().replace("- a\n", "- 7\n"))
    with pytest.raises(SpecError, match=r"`keys\[0\].models` must be a list of the ids of models"):
        read_keys(path)
