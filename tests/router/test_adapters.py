"""An adapter is a model of its own at the front door, over a real engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import openai
import pytest

from arriero.router.backend import GroupLoad, GroupView
from arriero.router.routing.adapters import with_adapter
from arriero.router.routing.choose import order
from arriero.router.tenants import model_scope
from arriero.router.text.model_card import ModelCard, ServedAdapter
from arriero.shards.config.group import GroupConfig
from arriero.shards.config.sampling_params import SamplingParams
from arriero.shards.engine.types import EngineConfig, EngineRequest
from arriero.shards.errors import InvalidRequest, NotFound
from support.adapters import write_adapter
from support.frontdoor import LLAMA3, LLAMA_SPECIALS, make_card, make_tokenizer
from support.fronted import Front, fronted
from support.models import tiny_llama

VOCAB = 400
PROMPT = list(range(5, 45))
ASKED = {"max_tokens": 12, "temperature": 0, "extra_body": {"ignore_eos": True}}


@pytest.fixture
async def front(tmp_path: Path) -> AsyncIterator[Front]:
    tiny_llama(tmp_path / "model", vocab=VOCAB)
    files = (write_adapter(tmp_path / "poet", 1), write_adapter(tmp_path / "clerk", 2))
    config = GroupConfig(
        model_path=str(tmp_path / "model"),
        dtype="float32",
        num_blocks=256,
        max_sequences=8,
        threads=1,
        adapters=files,
    )

    def card(limits: EngineConfig) -> ModelCard:
        served = [
            ServedAdapter(name=file.name, digest=digest)
            for file, digest in zip(files, limits.adapters, strict=True)
        ]
        made = make_card(make_tokenizer(LLAMA_SPECIALS), LLAMA3, adapters=tuple(served))
        return replace(made, vocab_size=VOCAB)

    async with fronted(config, card) as front:
        yield front


async def tokens(front: Front, model: str) -> list[str]:
    answer = await front.ask.completions.create(
        model=model,
        prompt=PROMPT,
        logprobs=0,
        **ASKED,  # type: ignore[call-overload]
    )
    assert answer.model == model
    return list(answer.choices[0].logprobs.tokens)


async def test_a_request_names_its_adapter(front: Front) -> None:
    listed = {one.id: one.model_dump() for one in (await front.ask.models.list()).data}
    assert set(listed) == {"tiny", "poet", "clerk"}
    assert listed["tiny"]["parent"] is None and listed["poet"]["parent"] == "tiny"
    assert (await front.ask.models.retrieve("clerk")).id == "clerk"

    first = {model: await tokens(front, model) for model in listed}
    assert len({tuple(answer) for answer in first.values()}) == 3
    again = {model: await tokens(front, model) for model in reversed(listed)}
    assert again == first, "an adapter read another's blocks"
    own = front.group.submit(
        PROMPT,
        SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, seed=0),
        adapter=front.group.engine.config.adapters[0],
    )
    assert own


async def test_an_adapter_that_is_not_served_is_named(front: Front) -> None:
    with pytest.raises(openai.NotFoundError, match="clerk, poet"):
        await front.ask.completions.create(model="baker", prompt="a", max_tokens=1)
    stranger = EngineRequest(
        request_id="x",
        prompt=(5,),
        params=SamplingParams(temperature=0.0, max_tokens=1, seed=0),
        adapter="0" * 32,
    )
    with pytest.raises(InvalidRequest, match="adapter"):
        front.group.engine.submit(stranger)


def test_keys_with_a_list_of_models_name_adapters_too() -> None:
    served = ["tiny", "poet", "clerk"]

    async def run() -> None:
        model_scope.enter({"poet"})
        assert [name for name in served if model_scope.allows(name)] == ["poet"]
        assert model_scope.resolve("poet", served) == "poet"
        for name in ("clerk", "tiny"):
            with pytest.raises(NotFound, match="available models: poet"):
                model_scope.resolve(name, served)

    asyncio.run(run())


def test_a_group_with_the_adapter_on_its_device_comes_first() -> None:
    card = make_card(make_tokenizer(LLAMA_SPECIALS), LLAMA3)
    without = GroupView(
        group_id="a", model="tiny", card=card, load=GroupLoad(), adapter_in_slot=False
    )
    ready = replace(without, group_id="b", adapter_in_slot=True)
    first, _ = order([without, ready], num_prompt=100, num_tokens=101)
    assert first.group_id == "b"
    busy = replace(ready, load=GroupLoad(outstanding_tokens=5000, prefill_tokens=5000))
    first, _ = order([without, busy], num_prompt=100, num_tokens=101)
    assert first.group_id == "a", "an adapter is loaded sooner than much work is done"


def test_the_newest_content_of_a_name_counts() -> None:
    card = make_card(make_tokenizer(LLAMA_SPECIALS), LLAMA3)
    views = [
        GroupView(
            group_id=group_id,
            model="tiny",
            card=replace(
                card, adapters=(ServedAdapter(name="poet", digest=digest, version=version),)
            ),
            load=GroupLoad(),
        )
        for group_id, digest, version in (("a", "new", 2), ("b", "old", 1), ("c", "new", 2))
    ]
    assert [view.group_id for view in with_adapter(views, "poet")] == ["a", "c"]
    assert with_adapter(views, "clerk") == []
