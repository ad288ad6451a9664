"""Admin actions of a leader on the KV cache of the group.

Knows prompts, the engine and the cache report; knows nothing of callers or of other groups.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

from arriero.cluster.replica.canary import Canary
from arriero.cluster.replica.kv_actions import KvArguments, KvCopies, KvReport
from arriero.router.link.leader_rpc import SharedBlocks, tell_shared
from arriero.router.text.model_card import ModelCard
from arriero.router.text.text_model import TextModel
from arriero.shards.engine.dp_scheduler import DataParallelScheduler
from arriero.shards.engine.engine import Engine
from arriero.shards.errors import InvalidRequest
from arriero.shards.protocol import wire

WARM_AT_ONCE = 4
MAX_TEXTS = 10_000
R = TypeVar("R")


class KvAdminHandler:
    """Runs admin actions on the KV cache of a group.

    Args:
        engine: of the group.
        canary: generates a token after a prompt; the prompt's blocks then stay in the cache.
        card: has the tokenizer and the chat template.
    """

    def __init__(self, engine: Engine, canary: Canary, card: ModelCard) -> None:
        self._engine, self._canary, self._card = engine, canary, card
        self._text: TextModel | None = None

    async def answer(self, action: str, arguments: memoryview) -> KvReport | SharedBlocks:
        """Run an action; returns the cache report after the action.

        Args:
            action: "stats", "flush", "warm", "pin" or "unpin"; or "shared", from another leader:
                the blocks of `keys` that the leader may copy.
            arguments: bytes of `KvArguments`; of "shared", bytes of a `SharedQuestion`.

        Raises:
            InvalidRequest: the action is unknown, or a text is refused.
            WireError: the arguments are of another type.
        """
        changed = 0
        if action == "shared":
            return await tell_shared(self._engine, arguments)
        wanted = wire.decode(arguments, KvArguments)
        if action == "flush":
            changed = await self._ask(lambda scheduler: scheduler.flush())
        elif action == "warm":
            changed = await self._warm(wanted.texts, raw=wanted.raw)
        elif action == "pin":
            changed = await self._pin(wanted.name, wanted.texts, raw=wanted.raw)
        elif action == "unpin":
            name = wanted.name
            if not await self._ask(lambda scheduler: scheduler.unpin(name)):
                raise InvalidRequest(
                    "name", f"nothing is pinned as {name[:128]!r}; `arriero kv stats` lists pins"
                )
        elif action != "stats":
            raise InvalidRequest("action", f"no action {action[:32]!r}")
        report = await self._ask(lambda scheduler: scheduler.cache())
        tiers = self._engine.stats().tiers
        return KvReport(
            tiers=report.tiers,
            tenants=report.tenants,
            tenant_blocks=report.tenant_blocks,
            pins=report.pins,
            changed=changed,
            copies=KvCopies(
                loaded=tiers.get("loaded", 0),
                saved=tiers.get("saved", 0),
                failed=tiers.get("failed", 0),
            ),
        )

    async def _ask(self, function: Callable[[DataParallelScheduler], R]) -> R:
        """Call a function of the scheduler in the engine's thread; returns the result."""
        return await asyncio.wrap_future(self._engine.ask(function))

    async def _warm(self, texts: Sequence[str], *, raw: bool) -> int:
        if len(texts) > MAX_TEXTS:
            raise InvalidRequest("texts", f"{len(texts)} texts exceed {MAX_TEXTS}; send fewer")
        prompts = [await self._tokens(text, raw=raw) for text in texts]
        limit = asyncio.Semaphore(WARM_AT_ONCE)

        async def warm(prompt: tuple[int, ...]) -> int:
            async with limit:
                await self._canary.draw(prompt)
            return len(prompt)

        return sum(await asyncio.gather(*map(warm, prompts)))

    async def _pin(self, name: str, texts: Sequence[str], *, raw: bool) -> int:
        if len(texts) != 1 or not name:
            raise InvalidRequest(
                "pin", f"{len(texts)} texts; give one text, and a name for the pin"
            )
        prompt = await self._tokens(texts[0], raw=raw)
        # a token more: the last token of a prompt is always computed, never taken from the cache
        await self._canary.draw((*prompt, prompt[-1]))
        num_pinned = await self._ask(lambda scheduler: scheduler.pin(name, prompt))
        if not num_pinned:
            await self._ask(lambda scheduler: scheduler.unpin(name))
            raise InvalidRequest(
                "pin",
                f"the {len(prompt)} tokens of the text fill no block of `kv.block_size` tokens, so"
                " that nothing is pinned; give a longer text",
            )
        return num_pinned

    async def _tokens(self, text: str, *, raw: bool) -> tuple[int, ...]:
        """Tokens of a text at the start of requests: as a system prompt, or as raw text."""
        if self._text is None:
            self._text = await asyncio.to_thread(partial(TextModel, self._card, warm=False))
        model = self._text
        if raw:
            tokens = await model.encode(text, add_special_tokens=True, trusted=False)
        else:
            # two chats with this system prompt share the tokens up to the question
            first, second = [
                await model.encode_chat(
                    [{"role": "system", "content": text}, {"role": "user", "content": question}],
                    add_generation_prompt=True,
                    continue_final_message=False,
                )
                for question in ("a", "b")
            ]
            same = [a == b for a, b in zip(first, second, strict=False)]
            tokens = first[: same.index(False) if False in same else len(same)]
        if not tokens:
            raise InvalidRequest("texts", "a text has no tokens; give a longer text")
        return tuple(tokens)
