"""Adapters that a leader takes while it serves, as clients of a gateway see them."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import openai
import pytest

from arriero.cluster.replica.adapter_actions import (
    AdapterArguments,
    AdapterReport,
    WantedAdapter,
)
from arriero.cluster.replica.adapter_admin import AdapterAdminHandler
from arriero.router.http.lora_adapters import ChangeAdapter
from arriero.router.text.model_card import ModelCard
from arriero.shards.adapters.adapter import WEIGHTS_FILE
from arriero.shards.adapters.reader import AdapterReader
from arriero.shards.checkpoint.reader import Checkpoint
from arriero.shards.config.adapters import AdapterSlots
from arriero.shards.config.group import GroupConfig
from arriero.shards.engine.types import EngineConfig
from arriero.shards.errors import Unauthenticated
from arriero.shards.protocol import wire
from support.adapters import write_adapter
from support.eventually import eventually_async
from support.frontdoor import LLAMA3, LLAMA_SPECIALS, make_card, make_tokenizer
from support.fronted import Front, fronted
from support.models import tiny_llama

VOCAB = 400
PROMPT = list(range(5, 45))


@dataclass
class Served:
    """A leader behind a gateway, with a folder of adapters."""

    front: Front
    handler: AdapterAdminHandler
    root: Path

    async def want(self, *names: str, version: int = 1) -> AdapterReport:
        wanted = [
            WantedAdapter(name=name, path=str(self.root / name), version=version) for name in names
        ]
        arguments = AdapterArguments(wanted=tuple(wanted))
        return await self.handler.answer(memoryview(wire.encode(arguments)))

    async def listed(self) -> dict[str, str | None]:
        models = (await self.front.ask.models.list()).data
        return {model.id: model.model_dump()["parent"] for model in models}

    async def tokens(self, model: str, max_tokens: int = 8) -> list[str]:
        answer = await self.front.ask.completions.create(
            model=model,
            prompt=PROMPT,
            logprobs=0,
            max_tokens=max_tokens,
            temperature=0,
            extra_body={"ignore_eos": True},
        )
        return list(answer.choices[0].logprobs.tokens)  # type: ignore[union-attr,arg-type]


@asynccontextmanager
async def serving(
    folder: Path, change_adapter: ChangeAdapter | None = None
) -> AsyncIterator[Served]:
    tiny_llama(folder / "model", vocab=VOCAB)
    root = folder / "adapters"
    root.mkdir()
    for seed, name in enumerate(("poet", "clerk"), 1):
        write_adapter(root / name, seed)
    slots = AdapterSlots(device=1, host=2, max_rank=8, root=str(root))
    config = GroupConfig(
        model_path=str(folder / "model"),
        dtype="float32",
        num_blocks=256,
        max_sequences=8,
        threads=1,
        adapter_slots=slots,
    )

    def card(limits: EngineConfig) -> ModelCard:
        return replace(make_card(make_tokenizer(LLAMA_SPECIALS), LLAMA3), vocab_size=VOCAB)

    async with fronted(config, card, change_adapter=change_adapter) as front:
        model = Checkpoint.open(config.model_path).config
        handler = AdapterAdminHandler(
            front.group.engine,
            AdapterReader(slots, model, ()),
            has_root=True,
            listed=(),
            publish=front.link.set_adapters,
        )
        yield Served(front, handler, root)


async def test_adapters_come_change_and_go(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:

        async def shows(*names: str) -> None:
            wanted: dict[str, str | None] = {name: "tiny" for name in names} | {"tiny": None}
            for _ in range(100):
                if await served.listed() == wanted:
                    return
                await asyncio.sleep(0.02)
            raise AssertionError(f"{await served.listed()} instead of {wanted}")

        await shows()
        report = await served.want("poet", "clerk")
        assert not [adapter.error for adapter in report.adapters if adapter.error]
        await shows("poet", "clerk")
        first = {name: await served.tokens(name) for name in ("tiny", "poet", "clerk")}
        assert len({tuple(tokens) for tokens in first.values()}) == 3

        shutil.copy(served.root / "clerk" / WEIGHTS_FILE, served.root / "poet" / WEIGHTS_FILE)
        assert await served.tokens("poet") == first["poet"], "files alone change nothing"
        await served.want("poet", "clerk", version=2)
        await asyncio.sleep(0.1)
        assert await served.tokens("poet") == first["clerk"], "old blocks or old weights"

        long_answer = asyncio.create_task(served.tokens("clerk", 200))
        await eventually_async(lambda: served.front.group.engine.stats().num_running == 1, 30)
        await served.want("poet", version=2)
        await shows("poet")
        with pytest.raises(openai.NotFoundError):
            await served.tokens("clerk")
        assert len(await long_answer) == 200, "a request in flight ends as usual"


async def test_a_refused_adapter_changes_nothing(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        await served.want("poet")
        await asyncio.sleep(0.1)
        before = await served.tokens("poet")
        (served.root / "poet" / WEIGHTS_FILE).write_bytes(b"no weights")
        report = await served.want("poet", "missing", version=2)
        errors = {adapter.name: adapter.error for adapter in report.adapters}
        assert WEIGHTS_FILE in errors["poet"] and "missing" in errors["missing"]
        assert await served.tokens("poet") == before, "the content before serves on"
        assert "missing" not in await served.listed()
        report = await served.want("poet")
        assert [adapter.error for adapter in report.adapters] == [""]


async def test_a_prepared_adapter_is_shown_by_the_next_wish_or_dropped(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:

        async def prepare(name: str, version: int) -> str:
            adapter = WantedAdapter(name=name, path=str(served.root / name), version=version)
            arguments = AdapterArguments(prepare=adapter)
            report = await served.handler.answer(memoryview(wire.encode(arguments)))
            (entry,) = report.adapters
            return entry.error or entry.digest

        await served.want("poet")
        before = await served.tokens("poet")
        clerk = await prepare("clerk", 2)
        assert clerk in served.front.group.engine._scheduler.adapters
        await served.want("poet")
        assert clerk not in served.front.group.engine._scheduler.adapters, "dropped"
        assert "clerk" not in await served.listed()
        weights = served.root / "poet" / WEIGHTS_FILE
        shutil.copy(served.root / "clerk" / WEIGHTS_FILE, weights)
        await prepare("poet", 2)
        assert await served.tokens("poet") == before, "prepared is not shown"
        weights.write_bytes(b"no weights")  # the commit does not read again
        report = await served.want("poet", version=2)
        assert [adapter.error for adapter in report.adapters] == [""]
        await asyncio.sleep(0.1)
        assert await served.tokens("poet") != before
        assert WEIGHTS_FILE in await prepare("poet", 3)


async def test_vllms_paths_pass_the_admin_token_on(tmp_path: Path) -> None:
    calls: list[tuple[str, str, str, str, bool]] = []

    async def change(given: str, action: str, name: str, path: str, replace: bool) -> str:
        if given != "Bearer secret":
            raise Unauthenticated("an admin token is needed")
        calls.append((given, action, name, path, replace))
        return f"{action} {name}"

    async with serving(tmp_path, change) as served:
        async with httpx.AsyncClient(base_url=served.front.url) as ask:
            load, unload = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
            body = {"lora_name": "poet", "lora_path": "/a/poet", "load_inplace": True}
            refused = await ask.post(load, json=body)
            assert refused.status_code == 401 and not calls
            headers = {"authorization": "Bearer secret"}
            loaded = await ask.post(load, json=body, headers=headers)
            assert (loaded.status_code, loaded.text) == (200, "add poet")
            gone = await ask.post(unload, json={"lora_name": "poet"}, headers=headers)
            assert (gone.status_code, gone.text) == (200, "remove poet")
            assert calls == [
                ("Bearer secret", "add", "poet", "/a/poet", True),
                ("Bearer secret", "remove", "poet", "", False),
            ]
            wrong = await ask.post(load, json=body | {"rank": 8}, headers=headers)
            assert wrong.status_code == 400


async def test_a_gateway_of_no_deployment_refuses(tmp_path: Path) -> None:
    async with serving(tmp_path) as served, httpx.AsyncClient(base_url=served.front.url) as ask:
        path, body = "/v1/unload_lora_adapter", {"lora_name": "poet"}
        assert (await ask.post(path, json=body)).status_code == 401
        headers = {"authorization": "Bearer secret"}
        assert (await ask.post(path, json=body, headers=headers)).status_code == 403
