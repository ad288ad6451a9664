"""The console in a headless browser, over a model that says what a test wants.

Knows Chromium, pages and made-up states of a cluster; knows nothing of what the tests check.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from google.protobuf.json_format import MessageToDict
from tokenizers import Tokenizer

from arriero.router.proto.arriero.v1 import admin_pb2 as pb
from arriero.shards.engine.types import EngineRequest
from arriero.shards.errors import Unauthenticated
from support.frontdoor import Policy

if TYPE_CHECKING:
    from playwright.async_api import Browser, Page, ViewportSize

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or ""
TOKEN = "view-token"
"""Admin token that `MadeCluster` takes."""
WIDE: ViewportSize = {"width": 1280, "height": 800}
NARROW: ViewportSize = {"width": 390, "height": 844}
_FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
_EXPERTS, _LAYERS = 16, 6


@asynccontextmanager
async def browser(profile: Path) -> AsyncIterator[Browser]:
    """A headless Chromium with a new profile."""
    from playwright.async_api import async_playwright

    async with async_playwright() as driver:
        running = await driver.chromium.launch(
            executable_path=CHROMIUM, args=list(_FLAGS), env={"HOME": str(profile)}
        )
        try:
            yield running
        finally:
            await running.close()


@dataclass
class Watched:
    """A page, and what went wrong or elsewhere.

    Attributes:
        page: the page.
        origin: address of the gateway.
        errors: errors of scripts and messages of the console above "info".
        elsewhere: requests to other origins.
        dialogs: texts of dialogs that scripts opened.
    """

    page: Page
    origin: str
    errors: list[str] = field(default_factory=list)
    elsewhere: list[str] = field(default_factory=list)
    dialogs: list[str] = field(default_factory=list)

    def check(self) -> None:
        """Fail where anything went wrong or elsewhere."""
        assert (self.errors, self.elsewhere, self.dialogs) == ([], [], [])


@asynccontextmanager
async def open_page(
    running: Browser,
    origin: str,
    fragment: str = "",
    **options: Any,  # noqa: ANN401
) -> AsyncIterator[Watched]:
    """The console in a context of its own.

    Args:
        running: the browser.
        origin: address of the gateway.
        fragment: page of the console: "#chat" or "#cluster".
        options: of the browser's context, such as `viewport` and `color_scheme`.
    """
    context = await running.new_context(**{"viewport": WIDE, "reduced_motion": "reduce"} | options)
    page = await context.new_page()
    watched = Watched(page, origin)

    def on_request(url: str) -> None:
        if not url.startswith((f"{origin}/", "data:", "blob:")):
            watched.elsewhere.append(url)

    async def on_dialog(dialog: Any) -> None:  # noqa: ANN401
        watched.dialogs.append(dialog.message)
        await dialog.dismiss()

    page.on("request", lambda request: on_request(request.url))
    page.on("pageerror", lambda error: watched.errors.append(str(error)))
    page.on("dialog", on_dialog)
    page.on(
        "console",
        lambda message: (
            watched.errors.append(message.text) if message.type in ("error", "warning") else None
        ),
    )
    try:
        await page.goto(f"{origin}/console{fragment}")
        await page.wait_for_selector("header.top")
        yield watched
    finally:
        await context.close()


def says(tokenizer: Tokenizer, answers: Mapping[str, str], *, eos: int = 1) -> Policy:
    """A policy that answers with the text whose key stands last in the prompt; "" is any prompt."""
    encoded = {
        key: tokenizer.encode(text, add_special_tokens=False).ids for key, text in answers.items()
    }
    chosen: dict[str, list[int]] = {}

    def policy(request: EngineRequest, index: int, position: int) -> int:
        if request.request_id not in chosen:
            prompt = tokenizer.decode(list(request.prompt))
            key = max(encoded, key=lambda key: (prompt.rfind(key), -len(key)) if key else (-1, 1))
            chosen[request.request_id] = encoded[key]
        tokens = chosen[request.request_id]
        return tokens[position] if position < len(tokens) else eos

    return policy


class MadeCluster:
    """A state of a cluster whose counters grow with each read."""

    def __init__(self) -> None:
        self.num_reads = 0
        self._started = time.time()

    async def read(self, authorization: str) -> str:
        """See `ReadCluster`."""
        if authorization != f"Bearer {TOKEN}":
            raise Unauthenticated("the cluster's state needs an admin token")
        self.num_reads += 1
        return json.dumps(self._state(time.time() - self._started))

    def _state(self, passed_s: float) -> dict[str, Any]:
        groups = [self._group(number, passed_s) for number in range(2)]
        failure = pb.Failure(
            who="scout-1.1", seat="scout-1", at=self._started - 300,
            cause="slice 1 of scout-1.1 on 10.0.0.7 ended with signal 9 (out of memory)",
            recovered_s=8.4,
        )  # fmt: skip
        events = [
            pb.Event(at=self._started - 300 + step, kind=kind, who=who, text=text, by=by)
            for step, kind, who, text, by in (
                (0, "lost", "scout-1.1", "slice 1 ended with signal 9", ""),
                (0.4, "starting", "scout-1", "revision 2", ""),
                (8.4, "serving", "scout-1.2", "after 8.0 s", ""),
                (120, "scale", "scout", "1 to 2 groups", "up"),
            )
        ]
        models = [pb.ModelStatus(model="scout", revision=2, groups=2, serving=2, settled=True)]
        nodes = [
            pb.NodeStatus(
                id=f"n{number}", address=f"10.0.0.{number}", hostname=f"node-{number}", alive=True,
                head=number == 6, cpus=64, cpus_free=12, gpus=8, gpus_free=0, memory=2**40,
                groups=[f"scout-{number - 6}"],
            )
            for number in (6, 7)
        ]  # fmt: skip
        kv = [
            pb.KvGroup(
                group=group.id,
                tiers=[
                    pb.KvTier(tier="device", used=group.blocks_used, total=group.blocks_total),
                    pb.KvTier(tier="host", used=9_800, total=16_384),
                    pb.KvTier(tier="disk", used=52_000, total=131_072),
                    pb.KvTier(tier="shared", used=410_000, total=0),
                ],
            )
            for group in groups
        ]
        status = pb.Status(models=models, groups=groups, failures=[failure], nodes=nodes)
        why = pb.WhyResponse(
            failure=failure, lines=["slice 1 ended with signal 9", "  memory of the node: 99 %"]
        )
        return {
            "at": self._started + passed_s,
            "status": plain(status),
            "events": [plain(event) for event in events],
            "why": plain(why),
            "kv": [plain(group) for group in kv],
        }

    def _group(self, number: int, passed_s: float) -> pb.GroupStatus:
        def counted(rate: float) -> int:
            """The sum of a rate that swings by a quarter."""
            swing = 5 * math.sin(passed_s / 5 + number)
            return int(rate * (100 + passed_s + swing / 4))

        group = pb.GroupStatus(
            seat=f"scout-{number}", id=f"scout-{number}.{number + 1}", model="scout", revision=2,
            phase="serving", layout="tp4 ep4", node=f"10.0.0.{number + 6}", pid=4100,
            slice_pids=range(4101, 4105), slice_nodes=[f"10.0.0.{number + 6}"] * 4,
            running=38 + number, waiting=2 * number, blocks_used=4_210 - 300 * number,
            blocks_cached=900, blocks_total=8_192, output_tokens=counted(1_812),
            prompt_tokens=counted(6_040), cached_tokens=counted(3_900),
            steps=int(41 * passed_s), preemptions=3, expert_imbalance=1.3, expert_moves=2,
            drafts=100, drafted_tokens=300, accepted_tokens=204,
        )  # fmt: skip
        for layer in range(1, 2 * _LAYERS, 2):
            tokens = [
                int(900 + 700 * ((expert * 5 + layer * 3 + number) % 7 == 0) * (1 + expert % 3)
                    + 40 * ((expert * layer) % 9))
                for expert in range(_EXPERTS)
            ]  # fmt: skip
            group.expert_loads.add(layer=layer, tokens=tokens)
        return group


def plain(message: Any) -> dict[str, Any]:  # noqa: ANN401
    """A message as `ConsoleCalls` gives it."""
    return MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
