"""What a gateway costs: its CPU time for each streamed token, and what it adds to the first one.

A leader's link with a paced policy in the engine's place, a gateway, and the clients are a process
each. CPU is the gateway process's own, user and system, over streams of one token a message. The
time to the first token is a lone request's, less that of the same request over the link directly.

Usage: gateway.py [--streams 64] [--tokens 200] [--step-ms 40] [--profile FILE] [--json]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import statistics
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path

import psutil
import uvloop

sys.path.insert(0, str(Path(__file__).parents[1]))
from arriero.router.client.client import AsyncClient
from arriero.router.gateway import Gateway, GatewayConfig, GroupAddress
from arriero.router.link.client import LinkClient
from arriero.router.link.server import LinkServer
from arriero.shards.config.sampling_params import SamplingParams
from arriero.shards.engine.types import EngineRequest
from support.frontdoor import LLAMA3, LLAMA_SPECIALS, FakeEngine, make_card, make_tokenizer

PROMPT = list(range(60, 188))


def letters(request: EngineRequest, index: int, position: int) -> int:
    """Tokens of one ASCII letter each, so that every token is a message of its own."""
    return 40 + position * 7 % 60


def leader(pipe: Connection, step_s: float) -> None:
    async def run() -> None:
        engine = FakeEngine(letters, step_s=step_s)
        tokenizer = make_tokenizer(LLAMA_SPECIALS, bos="<|begin_of_text|>")
        link = LinkServer(engine, make_card(tokenizer, LLAMA3, max_model_len=100_000))
        engine.on_outputs = link.on_outputs
        pipe.send(await link.start())
        while not pipe.poll():
            await asyncio.sleep(0.05)

    asyncio.run(run())


def gateway(pipe: Connection, link: str, profile: str | None) -> None:
    async def run() -> None:
        one = Gateway(GatewayConfig(http_address="127.0.0.1:0"))
        port = await one.start()
        await one.set_groups([GroupAddress("g0", "tiny", link)])
        while not one.ready:
            await asyncio.sleep(0.01)
        pipe.send((port, one.http_port))
        while not pipe.poll():
            await asyncio.sleep(0.05)
        await one.stop(1)

    if profile is None:
        uvloop.run(run())  # as in a worker of Ray
        return
    import cProfile

    with cProfile.Profile() as profiler:
        uvloop.run(run())
    profiler.dump_stats(profile)


async def grpc_stream(client: AsyncClient, tokens: int) -> float:
    """Seconds to the first token."""
    begun, first_s, count = time.perf_counter(), 0.0, 0
    async for message in client.generate(PROMPT, max_tokens=tokens, ignore_eos=True, seed=1):
        first_s = first_s or time.perf_counter() - begun
        count += sum(len(output.token_ids) for output in message.outputs)
    assert count == tokens, count
    return first_s


async def http_stream(port: int, tokens: int) -> float:
    """Seconds to the first token; a client so plain that it costs next to nothing."""
    body = {"prompt": PROMPT, "max_tokens": tokens, "ignore_eos": True, "seed": 1, "stream": True}
    content = json.dumps(body).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    begun, first_s, text = time.perf_counter(), 0.0, b""
    writer.write(
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        b"content-length: %d\r\n\r\n%s" % (len(content), content)
    )
    while b"data: [DONE]" not in text:
        piece = await reader.read(1 << 16)
        assert piece, text[-500:]
        text = text[-32:] + piece
        if not first_s and b"data: " in text:
            first_s = time.perf_counter() - begun
    writer.close()
    await writer.wait_closed()
    return first_s


async def link_stream(link: LinkClient, tokens: int, name: str) -> float:
    params = SamplingParams(max_tokens=tokens, ignore_eos=True, seed=1)
    begun, first_s = time.perf_counter(), 0.0
    async for _ in link.generate(
        EngineRequest(request_id=name, prompt=tuple(PROMPT), params=params)
    ):
        first_s = first_s or time.perf_counter() - begun
    return first_s


async def measure(args: argparse.Namespace, link: str, ports: tuple[int, int], pid: int) -> dict:
    process = psutil.Process(pid)

    def cpu_s() -> float:
        times = process.cpu_times()
        return times.user + times.system

    figures: dict[str, float] = {}
    direct = LinkClient(link)
    await direct.connect(5)
    async with AsyncClient(f"127.0.0.1:{ports[0]}") as client:

        async def through_grpc(tokens: int) -> float:
            return await grpc_stream(client, tokens)

        async def through_http(tokens: int) -> float:
            return await http_stream(ports[1], tokens)

        kinds = {"grpc": through_grpc, "http": through_http}
        for run in kinds.values():
            await run(20)
        if not args.profile:
            firsts: dict[str, list[float]] = {"grpc": [], "http": [], "link": []}
            for number in range(args.lone):  # in turn, so that noise falls on all of them
                firsts["link"].append(await link_stream(direct, 2, f"direct-{number}"))
                for kind, run in kinds.items():
                    firsts[kind].append(await run(2))
            for kind in kinds:
                added_s = statistics.median(firsts[kind]) - statistics.median(firsts["link"])
                figures[f"{kind}_ttft_added_ms_p50"] = round(added_s * 1e3, 3)
        for kind, run in kinds.items():
            if args.only not in (None, kind):
                continue
            before = cpu_s()
            await asyncio.gather(*(run(args.tokens) for _ in range(args.streams)))
            used_s = cpu_s() - before
            figures[f"{kind}_cpu_us_per_token"] = round(
                used_s / (args.streams * args.tokens) * 1e6, 1
            )
    await direct.close()
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--step-ms", type=float, default=40.0)
    parser.add_argument("--lone", type=int, default=100, help="lone requests of each kind")
    parser.add_argument("--only", choices=("grpc", "http"))
    parser.add_argument("--profile", help="write a cProfile of the gateway; figures are then off")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    leader_pipe, leader_end = spawn.Pipe()
    gateway_pipe, gateway_end = spawn.Pipe()
    processes = [spawn.Process(target=leader, args=(leader_end, args.step_ms / 1e3), daemon=True)]
    processes[0].start()
    link = leader_pipe.recv()
    processes.append(
        spawn.Process(target=gateway, args=(gateway_end, link, args.profile), daemon=True)
    )
    processes[1].start()
    ports = gateway_pipe.recv()
    try:
        pid = processes[1].pid
        assert pid is not None
        figures = asyncio.run(measure(args, link, ports, pid))
    finally:
        gateway_pipe.send("stop")
        leader_pipe.send("stop")
        for process in processes:
            process.join(10)
    if args.json:
        print(json.dumps(figures))
        return
    for name, value in figures.items():
        print(f"{name:28} {value:10.3f}")


if __name__ == "__main__":
    main()
