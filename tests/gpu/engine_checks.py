"""The whole engine on the device: loader, runner, graphs and tiers, against the CPU's tokens; and
NCCL within a captured graph.

A random model of two layers in float32, since a rounding of bfloat16 may change a token.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from gpu.checks import Where

from arriero.shards.collectives.all_to_all import DirectExchange
from arriero.shards.collectives.mesh import all_gather
from arriero.shards.config.group import GroupConfig
from arriero.shards.config.kv_tiers import TierConfig
from arriero.shards.config.sampling_params import SamplingParams

PROMPTS = [[7, 1, 9, 4, 4, 2, 8], [1, 2, 3], [5] * 30, [11, 12], [99, 3, 3, 1, 100]]


def params(num_tokens: int) -> list[SamplingParams]:
    """Greedy and drawn, filters and penalties."""
    return [
        SamplingParams(max_tokens=num_tokens, temperature=0, seed=0),
        SamplingParams(max_tokens=num_tokens, temperature=1.0, seed=4, top_p=0.9),
        SamplingParams(max_tokens=num_tokens, temperature=0.8, seed=5, top_k=20, min_p=0.01),
        SamplingParams(max_tokens=num_tokens, temperature=1.0, seed=1, repetition_penalty=1.4),
        SamplingParams(max_tokens=num_tokens, temperature=0, seed=0, logprobs=3),
    ]


def config_of(path: Path, tiny: bool) -> GroupConfig:
    """A small group on the CPU."""
    return GroupConfig(
        model_path=str(path),
        dtype="float32",
        kernels="reference",
        block_size=4,
        num_blocks=100,
        num_local_blocks=60,
        max_model_len=128,
        max_sequences=2 if tiny else 5,
        max_batch_tokens=24,
    )


def engine(family: str) -> Callable[[Where], float]:
    """The share of requests whose tokens differ from the CPU's."""

    def check(at: Where) -> float:
        from support.models import tiny_llama, tiny_llama4

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder)
            if family == "llama":
                tiny_llama(path, seed=3)
            else:
                tiny_llama4(path, seed=3, layers=2, experts=4, chunk=8)
            config = config_of(path, at.tiny)
            count, num_tokens = (2, 3) if at.tiny else (len(PROMPTS), 24)
            expected = tokens(config, count, num_tokens)
            on_device = replace(config, device="cuda", kernels="triton")
            got = tokens(on_device, count, num_tokens)
        return sum(a != b for a, b in zip(got, expected, strict=True)) / count

    return check


def tokens(config: GroupConfig, count: int, num_tokens: int) -> list[list[int]]:
    """Tokens of the first `count` prompts."""
    from support.groups import running

    with running(config) as group:
        answers = group.generate(PROMPTS[:count], params(num_tokens)[:count])
    assert [answer.error for answer in answers] == [None] * count
    return [answer.tokens for answer in answers]


def tiers(at: Where) -> float:
    """1 if a prompt does not come back from host memory, or gives other tokens then."""
    from support.groups import running
    from support.models import tiny_llama

    prompt = [(7 * i + 3) % 90 + 5 for i in range(24 if at.tiny else 80)]
    greedy = SamplingParams(max_tokens=3, temperature=0, seed=0)
    others = [[(i * (j + 3)) % 90 + 5 for i in range(len(prompt))] for j in range(4)]
    with tempfile.TemporaryDirectory() as folder:
        tiny_llama(Path(folder), seed=3)
        config = replace(
            config_of(Path(folder), at.tiny),
            device="cuda",
            kernels="triton",
            num_blocks=len(prompt) // 4 + 12,
            max_sequences=1,
            tiers=TierConfig(host_bytes=8 << 20),
        )
        with running(config) as group:
            first = group.generate([prompt], [greedy])[0]
            for other in others[: 2 if at.tiny else 4]:  # fills the pool: the prompt moves to host
                group.generate([other], [greedy])
            again = group.generate([prompt], [greedy])[0]
    assert first.error is None and again.error is None, (first.error, again.error)
    return float(first.tokens != again.tokens or again.num_cached == 0)


def nccl_in_a_graph(at: Where) -> float:
    """The greatest difference after replays of captured collectives of one rank."""
    store = dist.HashStore()
    dist.init_process_group("nccl", store=store, rank=0, world_size=1)
    try:
        exchange = DirectExchange(0, dist.distributed_c10d._get_default_group())
        x = torch.arange(8.0, device=at.device)
        parts, total = (torch.zeros(8, device=at.device) for _ in range(2))

        def work() -> None:
            y = x * 2
            dist.all_reduce(y)
            all_gather(parts, y, None)
            dist.broadcast(y, 0)
            rows = exchange.swap(y.view(torch.uint8).view(8, 4))  # as rows to experts in blocks
            total.copy_(parts + rows.view(torch.float32).view(8))

        work()  # makes the communicator
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            work()
        worst = 0.0
        for factor in (1.0, 3.0):
            x.fill_(factor)
            graph.replay()
            worst = max(worst, float((total - 4 * factor).abs().max()))
        return worst
    finally:
        dist.destroy_process_group()


SAME: dict[str, Callable[[Where], float]] = {
    "engine: Llama, graphs": engine("llama"),
    "engine: Llama 4, graphs": engine("llama4"),
    "engine: tiers": tiers,
    "NCCL in a graph": nccl_in_a_graph,
}
