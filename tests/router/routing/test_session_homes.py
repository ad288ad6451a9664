"""Requests of a session meet in the group that has its blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from tokenizers import Tokenizer

from arriero.router.backend import GroupLoad, GroupView
from arriero.router.directory.directory import Reach
from arriero.router.routing.choose import order
from arriero.router.routing.session_homes import MAX_SESSIONS, SessionHomes
from arriero.shards.config.sampling_params import SamplingParams
from arriero.shards.engine.types import EngineRequest
from arriero.shards.kv.retention import CacheHint
from support.frontdoor import LLAMA3, make_card

PROMPT = 1000


def request_of(session: str, tenant: str = "t") -> EngineRequest:
    hint = CacheHint(session=session)
    params = SamplingParams(seed=1, max_tokens=1)
    return EngineRequest(
        request_id="r", prompt=(1,) * PROMPT, params=params, tenant=tenant, hint=hint
    )


def views(tokenizer: Tokenizer, reach: Mapping[str, int], **prefill: int) -> list[GroupView]:
    card = make_card(tokenizer, LLAMA3, max_model_len=4096)
    return [
        GroupView(
            group_id=name,
            model="tiny",
            card=card,
            load=GroupLoad(
                outstanding_tokens=prefill.get(name, 0), prefill_tokens=prefill.get(name, 0)
            ),
            reach=Reach(tokens, tokens),
        )
        for name, tokens in reach.items()
    ]


def choice(homes: SessionHomes, request: EngineRequest, groups: list[GroupView]) -> str:
    home = homes.of(request, groups)
    marked = [replace(group, home=group.group_id == home) for group in groups]
    return order(marked, num_prompt=PROMPT, num_tokens=PROMPT + 1)[0].group_id


def test_a_session_stays_where_its_blocks_are(llama_tokenizer: Tokenizer) -> None:
    homes, request = SessionHomes(), request_of("s")
    homes.note(request, "b")
    # before the directory knows of its blocks
    assert choice(homes, request, views(llama_tokenizer, {"a": 0, "b": 0}, b=900)) == "b"
    assert choice(homes, request_of("s", "u"), views(llama_tokenizer, {"a": 0, "b": 0}, b=9)) == "a"
    # and while others wait there, unless they wait for longer than leaving costs
    known = {"a": 0, "b": 960}
    assert choice(homes, request, views(llama_tokenizer, known, b=1900)) == "b"
    assert choice(homes, request, views(llama_tokenizer, known, b=2100)) == "a"
    # the group that has most of the prompt is the home, whatever this gateway remembers
    assert homes.of(request, views(llama_tokenizer, {"a": 960, "b": 320})) == "a"
    assert homes.of(request_of("new"), views(llama_tokenizer, {"a": 0, "b": 320})) == "b"
    assert homes.of(request_of("new"), views(llama_tokenizer, {"a": 0, "b": 0})) == ""
    assert homes.of(request, []) == ""
    homes.forget("t", "s")
    assert homes.of(request, views(llama_tokenizer, {"a": 0, "b": 0})) == ""


def test_a_lost_group_is_no_home(llama_tokenizer: Tokenizer) -> None:
    homes, request = SessionHomes(), request_of("s")
    homes.note(request, "gone")
    assert homes.of(request, views(llama_tokenizer, {"a": 0, "b": 0})) == ""


def test_requests_without_a_session_have_no_home(llama_tokenizer: Tokenizer) -> None:
    homes, request = SessionHomes(), request_of("")
    homes.note(request, "a")
    homes.note(replace(request, hint=None), "a")
    groups = views(llama_tokenizer, {"a": 960, "b": 0})
    assert homes.of(request, groups) == "" == homes.of(replace(request, hint=None), groups)


def test_the_memory_is_bounded() -> None:
    homes = SessionHomes()
    for number in range(MAX_SESSIONS + 10):
        homes.note(request_of(str(number)), "a")
    assert len(homes._groups) == MAX_SESSIONS
