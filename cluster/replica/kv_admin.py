"""What a leader does when an operator asks about its KV cache, or has it changed.

Knows prompts, the engine and its report; knows nothing of who asks or of other groups.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from arriero.cluster.replica.canary import Canary
from arriero.router.link.leader_rpc import tell_shared
from arriero.router.text.model_card import ModelCard
from arriero.router.text.text_model import TextModel
from arriero.shards.engine.engine import Engine
from arriero.shards.errors import InvalidRequest

WARM_AT_ONCE = 4
MAX_TEXTS = 10_000


class KvAdminHandler:
    """Answers about one group.

    Args:
        engine: of the group.
        canary: draws a token after a prompt, which leaves its blocks in the cache.
        card: gives tokenizer and template.
    """

    def __init__(self, engine: Engine, canary: Canary, card: ModelCard) -> None:
        self._engine, self._canary, self._card = engine, canary, card
        self._text: TextModel | None = None

    async def answer(self, action: str, asked: Mapping[str, Any]) -> dict[str, Any]:
        """Do it, and report; `changed` counts blocks flushed, or tokens warmed or pinned.

        Args:
            action: "stats", "flush", "warm", "pin" or "unpin"; or of another leader "shared": which
                of the blocks `keys` it may copy.
            asked: of warm and pin `texts` and `raw` (not as system prompts, but as they are); of
                pin and unpin `name`.

        Raises:
            InvalidRequest: there is no such action, or a text cannot be taken.
        """
        changed = 0
        if action == "shared":
            return await tell_shared(self._engine, asked)
        if action == "flush":
            changed = await asyncio.wrap_future(self._engine.ask(lambda lanes: lanes.flush()))
        elif action == "warm":
            changed = await self._warm(asked["texts"], raw=asked["raw"])
        elif action == "pin":
            changed = await self._pin(asked["name"], asked["texts"], raw=asked["raw"])
        elif action == "unpin":
            name = asked["name"]
            if not await asyncio.wrap_future(self._engine.ask(lambda lanes: lanes.unpin(name))):
                raise InvalidRequest("name", f"nothing is pinned as {name[:128]!r}")
        elif action != "stats":
            raise InvalidRequest("action", f"no action {action[:32]!r}")
        report = await asyncio.wrap_future(self._engine.ask(lambda lanes: lanes.cache()))
        stats = self._engine.stats()
        return {
            **asdict(report),
            "changed": changed,
            "copies": {name: stats.tiers.get(name, 0) for name in ("loaded", "saved", "failed")},
        }

    async def _warm(self, texts: Sequence[str], *, raw: bool) -> int:
        if len(texts) > MAX_TEXTS:
            raise InvalidRequest("texts", f"{len(texts)} texts exceed {MAX_TEXTS}; send fewer")
        prompts = [await self._tokens(text, raw=raw) for text in texts]
        turns = asyncio.Semaphore(WARM_AT_ONCE)

        async def one(prompt: tuple[int, ...]) -> int:
            async with turns:
                await self._canary.draw(prompt)
            return len(prompt)

        return sum(await asyncio.gather(*map(one, prompts)))

    async def _pin(self, name: str, texts: Sequence[str], *, raw: bool) -> int:
        if len(texts) != 1 or not name:
            raise InvalidRequest("pin", "give one text, and a name to unpin it by")
        prompt = await self._tokens(texts[0], raw=raw)
        # one token more, since the last of a prompt is never found in the cache but computed
        await self._canary.draw((*prompt, prompt[-1]))
        return await asyncio.wrap_future(self._engine.ask(lambda lanes: lanes.pin(name, prompt)))

    async def _tokens(self, text: str, *, raw: bool) -> tuple[int, ...]:
        """A text as requests have it in front: as a system prompt, or as it is."""
        if self._text is None:
            self._text = await asyncio.to_thread(partial(TextModel, self._card, warm=False))
        model = self._text
        if raw:
            found = await model.encode(text, add_special_tokens=True, trusted=False)
        else:
            one, other = [
                await model.encode_chat(
                    [{"role": "system", "content": text}, {"role": "user", "content": question}],
                    add_generation_prompt=True,
                    continue_final_message=False,
                )
                for question in ("a", "b")
            ]
            same = [a == b for a, b in zip(one, other, strict=False)]
            found = one[: same.index(False) if False in same else len(same)]
        if not found:
            raise InvalidRequest("texts", "a text has no tokens; give longer ones")
        return tuple(found)
