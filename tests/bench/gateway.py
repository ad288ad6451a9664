"""What a gateway costs: its CPU time for each streamed token, and what it adds to the first one.

A leader's link with a paced policy in the engine's place, a gateway, and the clients are a process
each. CPU is the gateway process's own, user and system, over streams of one token a message. The
time to the first token is a lone request's, less that of the same request over the link directly.
Beside them "bare" is a server that does nothing but write: the least that `grpc.aio` takes for as
many streams. The kinds take turns, so that noise falls on all of them.

"many" are the same gRPC requests on one shared stream, whose messages hold a token of each request.

Usage: gateway.py [--streams 64] [--tokens 200] [--step-ms 40] [--rounds 1] [--json]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import psutil
import uvloop

sys.path.insert(0, str(Path(__file__).parents[1]))
from arriero.router.client.client import AsyncClient
from arriero.router.gateway import Gateway, GatewayConfig, GroupAddress
from arriero.router.grpc_options import SERVER_OPTIONS
from arriero.router.link.client import LinkClient
from arriero.router.link.server import LinkServer
from arriero.router.proto.arriero.v1 import inference_pb2 as pb
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
        await asyncio.to_thread(pipe.recv)  # looks at the pipe would count as the gateway's work
        await one.stop(1)

    if profile is None:
        uvloop.run(run())  # as in a worker of Ray
        return
    import cProfile

    with cProfile.Profile() as profiler:
        uvloop.run(run())
    profiler.dump_stats(profile)


def bare(pipe: Connection, step_s: float, tokens: int) -> None:
    """A server whose streams all write a message of one token in each step."""

    async def run() -> None:
        loop, waiting = asyncio.get_running_loop(), set[asyncio.Future[None]]()

        async def write(request: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
            for position in range(tokens):
                step = loop.create_future()
                waiting.add(step)
                await step
                message = pb.GenerateResponse()
                message.outputs.add(index=0, token_ids=(40 + position % 60,), text="a")
                await context.write(message.SerializeToString())

        server = grpc.aio.server(options=SERVER_OPTIONS)
        methods = {"Write": grpc.unary_stream_rpc_method_handler(write)}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bare", methods),))
        pipe.send(server.add_insecure_port("127.0.0.1:0"))
        await server.start()
        stop = asyncio.create_task(asyncio.to_thread(pipe.recv))
        while not stop.done():
            await asyncio.sleep(step_s)
            steps = list(waiting)
            waiting.clear()
            for step in steps:
                step.set_result(None)
        await server.stop(1)

    uvloop.run(run())


async def bare_stream(port: int, streams: int) -> None:
    """All streams of the bare server."""
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        method = channel.unary_stream("/bare/Write")

        async def read() -> None:
            async for _ in method(b""):
                pass

        await asyncio.gather(*(read() for _ in range(streams)))


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


def cpu_s(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return times.user + times.system


async def measure(
    args: argparse.Namespace, link: str, ports: tuple[int, int, int], pids: tuple[int, int]
) -> dict:
    """The figures; ports of the gateway's gRPC and HTTP and of the bare server, pids of both."""

    figures: dict[str, float] = {}
    direct = LinkClient(link)
    await direct.connect(5)
    address = f"127.0.0.1:{ports[0]}"
    async with AsyncClient(address) as client, AsyncClient(address, multiplexed=True) as shared:

        async def through_grpc(tokens: int) -> float:
            return await grpc_stream(client, tokens)

        async def through_many(tokens: int) -> float:
            return await grpc_stream(shared, tokens)

        async def through_http(tokens: int) -> float:
            return await http_stream(ports[1], tokens)

        kinds = {"grpc": through_grpc, "many": through_many, "http": through_http}
        for run in kinds.values():
            await run(20)
        if not args.profile:
            firsts: dict[str, list[float]] = {kind: [] for kind in (*kinds, "link")}
            for number in range(args.lone):  # in turn, so that noise falls on all of them
                firsts["link"].append(await link_stream(direct, 2, f"direct-{number}"))
                for kind, run in kinds.items():
                    firsts[kind].append(await run(2))
            for kind in kinds:
                added_s = statistics.median(firsts[kind]) - statistics.median(firsts["link"])
                figures[f"{kind}_ttft_added_ms_p50"] = round(added_s * 1e3, 3)
        used_us: dict[str, list[float]] = {}
        for kind in [*kinds, "bare"] * args.rounds:
            if args.only not in (None, kind) and kind != "bare":
                continue
            pid = pids[kind == "bare"]
            before_s = cpu_s(pid)
            if kind == "bare":
                await bare_stream(ports[2], args.streams)
            else:
                await asyncio.gather(*(kinds[kind](args.tokens) for _ in range(args.streams)))
            used_s = cpu_s(pid) - before_s
            used_us.setdefault(kind, []).append(used_s / (args.streams * args.tokens) * 1e6)
        for kind, values in used_us.items():
            figures[f"{kind}_cpu_us_per_token"] = round(statistics.median(values), 1)
    await direct.close()
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--step-ms", type=float, default=40.0)
    parser.add_argument("--lone", type=int, default=100, help="lone requests of each kind")
    parser.add_argument("--rounds", type=int, default=1, help="rounds of all kinds of streams")
    parser.add_argument("--only", choices=("grpc", "many", "http"))
    parser.add_argument("--profile", help="write a cProfile of the gateway; figures are then off")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    pipes: list[Connection] = []
    processes: list[multiprocessing.process.BaseProcess] = []

    def start(target: Callable[..., None], *arguments: object) -> Any:  # noqa: ANN401
        """Start a process; gives the first object that it sends."""
        ours, theirs = spawn.Pipe()
        pipes.append(ours)
        processes.append(spawn.Process(target=target, args=(theirs, *arguments), daemon=True))
        processes[-1].start()
        return ours.recv()

    step_s = args.step_ms / 1e3
    link = start(leader, step_s)
    ports = (*start(gateway, link, args.profile), start(bare, step_s, args.tokens))
    try:
        pids = processes[1].pid, processes[2].pid
        assert pids[0] is not None and pids[1] is not None
        figures = asyncio.run(measure(args, link, ports, pids))
    finally:
        for pipe in reversed(pipes):
            pipe.send("stop")
        for process in processes:
            process.join(10)
    if args.json:
        print(json.dumps(figures))
        return
    for name, value in figures.items():
        print(f"{name:28} {value:10.3f}")


if __name__ == "__main__":
    main()
