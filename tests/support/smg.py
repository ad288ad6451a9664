"""The smg gateway in front of our gateways: two groups, two gateways linked to both, smg.

Knows the processes and ports; knows nothing of what is asked.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import httpx

from arriero.router.directory.journal import Journal
from arriero.router.gateway import Gateway, GatewayConfig, GroupAddress
from arriero.router.link.server import LinkServer
from arriero.router.text.model_card import ModelCard
from arriero.shards.config.group import GroupConfig
from arriero.shards.engine.engine import Engine
from arriero.shards.kv.blocks import model_root
from support.eventually import eventually_async
from support.frontdoor import FakeEngine, Policy
from support.groups import running

MODEL_NAME = "small"
START_S = 300.0


def missing() -> str:
    """Why smg cannot be started; "" where it can."""
    for module in ("smg", "smg_grpc_proto"):
        if importlib.util.find_spec(module) is None:
            return f"{module} is not installed: arriero[clients]"
    return ""


@dataclass
class ServedGroup:
    """A group with its link; `die` ends the link as the loss of the leader would."""

    engine: Engine | FakeEngine
    card: ModelCard
    link: LinkServer
    address: GroupAddress

    async def die(self) -> None:
        assert self.link._server is not None
        self.link._server.close()
        for link in list(self.link._links):
            link.connection.abort("")

    def idle(self) -> bool:
        """Whether the engine holds no request and no block in use."""
        stats = self.engine.stats()
        return not (stats.num_running or stats.num_waiting or stats.blocks_used)


@dataclass
class SmgStack:
    """What a test talks to.

    Attributes:
        groups: the groups.
        gateways: our gateways; each is a worker of smg.
        workers: gRPC address of each gateway.
        urls: HTTP address of each gateway.
        smg: HTTP address of smg.
        client: for calls over HTTP.
    """

    groups: list[ServedGroup]
    gateways: list[Gateway]
    workers: list[str]
    urls: list[str]
    smg: str
    client: httpx.AsyncClient


@asynccontextmanager
async def smg_stack(model: str, log: Path, policy: Policy | None = None) -> AsyncIterator[SmgStack]:
    """Two groups, two gateways linked to both groups, and smg in front of the gateways.

    Args:
        model: folder of the checkpoint.
        log: file that smg writes to.
        policy: tokens of groups that compute nothing; None for groups that run the model.
    """
    async with AsyncExitStack() as stack:
        groups = []
        for name in ("g0", "g1"):
            if policy is None:
                group = await _real(stack, model, name)
            else:
                group = await _scripted(stack, model, name, policy)
            groups.append(group)
            stack.push_async_callback(group.link.stop, 0.2)
        gateways, workers = [], []
        for _ in range(2):
            gateway = Gateway(GatewayConfig(http_address="127.0.0.1:0", vllm_engine=""))
            workers.append(f"127.0.0.1:{await gateway.start()}")
            stack.push_async_callback(gateway.stop, 0.2)
            await gateway.set_groups([group.address for group in groups])
            gateways.append(gateway)
        await eventually_async(lambda: all(len(g.linked()) == 2 for g in gateways), START_S)
        port = stack.enter_context(_smg(workers, log))
        client = await stack.enter_async_context(httpx.AsyncClient(timeout=START_S))
        url = f"http://127.0.0.1:{port}"
        await _wait_routable(client, url)
        urls = [f"http://127.0.0.1:{gateway.http_port}" for gateway in gateways]
        yield SmgStack(groups, gateways, workers, urls, url, client)


async def _real(stack: AsyncExitStack, model: str, name: str) -> ServedGroup:
    """A group that runs the model."""
    config = GroupConfig(model_path=model, max_model_len=1024, dtype="float32")
    journal = Journal(100_000)
    group = stack.enter_context(running(config, on_event=journal.note))
    limits = group.engine.config
    card = replace(
        _card(model, name),
        eos_token_ids=limits.eos_token_ids,
        cache_root=model_root(limits.cache_salt),
        block_size=limits.block_size,
    )
    link = LinkServer(group.engine, card, journal=journal)
    group.take = link.on_outputs  # type: ignore[method-assign]
    address = GroupAddress(name, MODEL_NAME, await link.start())
    return ServedGroup(group.engine, card, link, address)


async def _scripted(stack: AsyncExitStack, model: str, name: str, policy: Policy) -> ServedGroup:
    """A group whose tokens are the policy's."""
    card = _card(model, name)
    engine = FakeEngine(policy, eos=card.eos_token_ids[0])
    stack.callback(engine.close)
    link = LinkServer(engine, card)
    engine.on_outputs = link.on_outputs
    address = GroupAddress(name, MODEL_NAME, await link.start())
    return ServedGroup(engine, card, link, address)


def _card(model: str, name: str) -> ModelCard:
    return ModelCard.from_folder(
        model,
        model=MODEL_NAME,
        group=name,
        layout="tp1",
        digest="d",
        max_model_len=1024,
        vocab_size=49152,
        bos_token_id=1,
        eos_token_ids=(2,),
        max_sequences=64,
        numerics="float32",
    )


@contextmanager
def _smg(workers: Sequence[str], log: Path) -> Iterator[int]:
    """A running smg; gives its port."""
    port, metrics_port = _free_ports()
    command = [
        *(sys.executable, "-m", "smg.launch_router"),
        *("--host", "127.0.0.1", "--port", str(port)),
        *("--prometheus-host", "127.0.0.1", "--prometheus-port", str(metrics_port)),
        *("--worker-urls", *(f"grpc://{worker}" for worker in workers)),
        *("--tool-call-parser", "llama", "--shutdown-grace-period-secs", "1"),
    ]
    environment = {**os.environ, "NO_COLOR": "1"}
    with (
        log.open("wb") as output,
        subprocess.Popen(command, stdout=output, stderr=output, env=environment) as process,
    ):
        try:
            yield port
        finally:
            process.terminate()
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()


def _free_ports() -> tuple[int, int]:
    with socket.socket() as one, socket.socket() as two:
        for each in (one, two):
            each.bind(("127.0.0.1", 0))
        return one.getsockname()[1], two.getsockname()[1]


async def _wait_routable(client: httpx.AsyncClient, url: str) -> None:
    """Wait until smg answers with the model."""
    body = {"model": MODEL_NAME, "prompt": "a", "max_tokens": 1}
    async with asyncio.timeout(START_S):  # smg looks at its workers before it takes requests
        while True:
            try:
                response = await client.post(f"{url}/v1/completions", json=body)
                if response.status_code == 200:
                    return
            except httpx.TransportError:
                pass
            await asyncio.sleep(0.2)
