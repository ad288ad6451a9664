"""How near a mixture of experts on CPU comes to its own floor: the model alone, and in the engine.

    PYTHONPATH=src:tests python tests/bench/moe.py

A seeded model in the proportions of Llama 4 Scout: 12 layers of 16 experts, one a token, beside a
shared one; hidden size 512. The floor of a step is the larger of the bytes that it must read
(each weight that its tokens really use, once, and their keys and values) over the memory rate, and
of its operations over the matrix rate, both measured just before each turn. Which experts a step
uses is found by passing the same tokens through the same weights once more, in one chunk.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from arriero.cluster.engine_bench import EngineBench
from arriero.kernels.bench import Rates, measure_rates
from arriero.kernels.cpu import CpuOps
from arriero.kernels.cpu.backend import available_threads
from arriero.kernels.flat_batch import FlatBatch
from arriero.kernels.layers import MoELayer
from arriero.kernels.packed_weights import Linear
from arriero.shards.checkpoint.reader import Checkpoint
from arriero.shards.collectives.mesh import Mesh
from arriero.shards.config.group import GroupConfig
from arriero.shards.config.parallel import ParallelConfig
from arriero.shards.layout.families import parts_of
from arriero.shards.layout.moe import MoEPart
from arriero.shards.model_config.llama4 import Llama4Config
from arriero.shards.models.llama4 import Llama4Slice
from arriero.shards.worker.rope_table import Rope
from support.models import tiny_llama4

BLOCK = 16
DECODES, PROMPT, OUTPUT = (1, 8, 32), 64, 64
PREFILL = 1000
TURNS = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """What was measured, turn by turn; other figures are a step's, on average.

    Attributes:
        name: of the cell.
        ms: of a step.
        rates: of the machine just before.
        num_bytes: that a step must read.
        operations: of a step.
        experts: that a layer uses.
    """

    name: str
    ms: list[float]
    rates: list[Rates]
    num_bytes: float
    operations: float
    experts: float

    def floors_ms(self) -> list[float]:
        """The least time of a step, turn by turn."""
        return [
            1e3 * max(self.num_bytes / one.memory, self.operations / one.matrix)
            for one in self.rates
        ]

    def share(self) -> float:
        """Of the floor; the median of the turns."""
        return statistics.median(
            floor / ms for floor, ms in zip(self.floors_ms(), self.ms, strict=True)
        )


def make_model(folder: Path) -> None:
    """Write the seeded checkpoint."""
    tiny_llama4(
        folder,
        seed=1,
        layers=12,
        hidden=512,
        intermediate=832,
        intermediate_mlp=1664,
        heads=8,
        kv_heads=2,
        head_dim=64,
        experts=16,
        chunk=8192,
        floor_scale=8192,
        vocab=32000,
        max_positions=16384,
        dtype="bfloat16",
    )


def prompts(count: int, length: int) -> list[list[int]]:
    """Token ids without a common prefix."""
    return [[(7919 * i + 104729 * j) % 31000 + 100 for j in range(length)] for i in range(count)]


class Replay:
    """The model once more, telling which experts each token of a sequence goes to."""

    def __init__(self, folder: Path, config: GroupConfig) -> None:
        checkpoint = Checkpoint.open(folder)
        model = checkpoint.config
        assert isinstance(model, Llama4Config), "what `make_model` writes"
        part = parts_of(model, config)[0]
        assert isinstance(part, MoEPart), "a part of a mixture of experts"
        device = torch.device("cpu")
        self.ops = CpuOps(device)
        self.blocks = max(DECODES) * -(-(PROMPT + OUTPUT) // BLOCK)
        self._slice = Llama4Slice(
            checkpoint,
            part,
            Mesh(part, ParallelConfig(), device=device),
            self.ops,
            dtype=torch.bfloat16,
            num_blocks=self.blocks,
            num_local_blocks=self.blocks,
            block_size=BLOCK,
        )
        self._rope = Rope(model.inv_freq(), self.blocks * BLOCK, device)
        self._routed: list[Tensor] = []
        self.layers = self._slice._layers
        self.head = self._slice.head
        kv, local_kv = self._slice.kv, self._slice.local_kv
        self._whole = self._slice.decoder
        self._decoder = self.ops.decoder(
            self.layers, kv, None, local_kv=local_kv, experts=self._route
        )

    def _route(self, x_TH: Tensor, layer: MoELayer) -> Tensor:
        h_TH = self.ops.rms_norm(x_TH, layer.mlp_norm_H, layer.eps)
        self._routed.append(self.ops.moe_route(h_TH, layer.router, layer.top_k).experts_TA)
        return self.ops.moe_block(x_TH, layer)

    def experts_LTA(self, tokens: Sequence[int], batch: FlatBatch | None = None) -> Tensor:
        """The experts of each layer, token and choice; without `batch` of one sequence, whole."""
        if batch is None:
            batch = self.batch(1, 0, len(tokens))
        self._routed = []
        self._decoder(self._slice.embed(torch.tensor(tokens, dtype=torch.int32)), batch)
        return torch.stack(self._routed)

    def batch(self, sequences: int, cached: int, new: int) -> FlatBatch:
        """Sequences of as many tokens cached, and new ones."""
        context = cached + new
        blocks = -(-context // BLOCK)
        assert sequences * blocks <= self.blocks, "the cache holds them all"
        table_SB = torch.arange(sequences * blocks, dtype=torch.int32).view(sequences, blocks)
        at = torch.arange(cached, context, dtype=torch.int32)
        slots_ST = table_SB[:, at.long() // BLOCK] * BLOCK + at % BLOCK
        positions_T = at.repeat(sequences)
        cos_TD, sin_TD = self._rope.at(positions_T)
        view = FlatBatch(
            positions_T=positions_T,
            query_start_S1=torch.arange(sequences + 1, dtype=torch.int32) * new,
            context_S=torch.full((sequences,), context, dtype=torch.int32),
            block_table_SB=table_SB,
            slots_T=slots_ST.flatten(),
            cos_TD=cos_TD,
            sin_TD=sin_TD,
            max_query=new,
            max_context=context,
        )
        return replace(view, local=view)

    def step(self, tokens: Sequence[int], batch: FlatBatch) -> None:
        """One step, up to its greedy tokens."""
        x_TH = self._slice.embed(torch.tensor(tokens, dtype=torch.int32))
        x_TH = self._whole(x_TH, batch)
        last_S = (batch.query_start_S1[1:] - 1).long()
        self._slice.logits(x_TH[last_S]).argmax(1)


class Costs:
    """What a step costs at least, from the model's sizes."""

    def __init__(self, replay: Replay) -> None:
        assert replay.head is not None, "one slice holds all"
        layers = [one for one in replay.layers if isinstance(one, MoELayer)]
        assert len(layers) == len(replay.layers), "every layer routes"
        each = layers[0]
        self._always = len(layers) * sum(
            _weights(one) for one in (each.qkv, each.o, each.router, each.gate_up, each.down)
        )
        self._expert = _weights(each.experts_gate_up[0]) + _weights(each.experts_down[0])
        self._head = replay.head.num_rows * replay.head.hidden_size
        self._kv_token = 2 * len(layers) * each.num_kv_heads * each.head_dim
        self._attention = 4.0 * len(layers) * each.num_q_heads * each.head_dim
        self._layers = len(layers)

    def num_bytes(self, touched: int, keys: int) -> float:
        """Bytes read, of (layer, expert) pairs that some token goes to and keys of all caches."""
        elements = self._always + touched * self._expert + self._head + keys * self._kv_token
        return 2.0 * elements

    def operations(self, tokens: int, sequences: int, seen: int) -> float:
        """Products and sums, of (query, key) pairs seen too."""
        weights = self._always + self._layers * self._expert
        return 2.0 * (tokens * weights + sequences * self._head) + self._attention * seen


def _weights(linear: Linear) -> int:
    return linear.out_features * linear.in_features


def turns(replay: Replay, run: Callable[[], float]) -> tuple[list[float], list[Rates]]:
    """What each run gave, and the machine's rates before it: it has faster and slower moments."""
    ms, rates = [], []
    for _ in range(TURNS):
        rates.append(measure_rates(replay.ops, torch.bfloat16, torch.device("cpu")))
        ms.append(run())
    return ms, rates


def alone(replay: Replay, costs: Costs, sequences: int, cached: int, new: int) -> Cell:
    """Steps of the model alone: no scheduler, no threads of the engine beside the kernels'."""
    generator = torch.Generator().manual_seed(sequences)
    batch = replay.batch(sequences, cached, new)
    touched: list[int] = []

    def steps() -> float:
        times = []
        for _ in range(4 if new > 1 else 32):
            shape = (sequences * new,)
            tokens = torch.randint(100, 31000, shape, generator=generator).tolist()
            for one in replay.experts_LTA(tokens, batch):
                touched.append(len(one.unique()))
            begun = time.perf_counter()
            replay.step(tokens, batch)
            times.append(time.perf_counter() - begun)
        return 1e3 * statistics.median(times)

    ms, rates = turns(replay, steps)
    context = cached + new
    seen = sequences * sum(range(cached + 1, context + 1))
    experts = statistics.mean(touched)
    kind = f"prefill, {new} tokens" if new > 1 else f"decode, batch {sequences}"
    return Cell(
        name=f"{kind}, alone",
        ms=ms,
        rates=rates,
        num_bytes=costs.num_bytes(round(experts * len(replay.layers)), sequences * context),
        operations=costs.operations(sequences * new, sequences, seen),
        experts=experts,
    )


def decode(bench: EngineBench, replay: Replay, costs: Costs, batch: int) -> Cell:
    """A cell of `batch` sequences that are decoded together."""
    asked = prompts(batch, PROMPT)
    given = bench.greedy(asked, OUTPUT)
    routed_BLTA = torch.stack(
        [replay.experts_LTA([*a, *b]) for a, b in zip(asked, given, strict=True)]
    )
    touched = []
    for at in range(PROMPT, PROMPT + OUTPUT - 1):
        step_LX = routed_BLTA[:, :, at].transpose(0, 1).flatten(1)
        touched.append(sum(len(one.unique()) for one in step_LX))
    keys = [batch * (at + 1) for at in range(PROMPT, PROMPT + OUTPUT - 1)]
    ms, rates = turns(replay, lambda: bench.run(asked, OUTPUT).itl_ms["p50"])
    return Cell(
        name=f"decode, batch {batch}",
        ms=ms,
        rates=rates,
        num_bytes=statistics.mean(map(costs.num_bytes, touched, keys)),
        operations=statistics.mean(costs.operations(batch, batch, seen) for seen in keys),
        experts=statistics.mean(touched) / len(replay.layers),
    )


def prefill(bench: EngineBench, replay: Replay, costs: Costs) -> Cell:
    """A cell of one prompt."""
    asked = prompts(1, PREFILL)
    experts_LTA = replay.experts_LTA(asked[0])
    touched = sum(len(one.unique()) for one in experts_LTA)
    ms, rates = turns(replay, lambda: bench.run(asked, 1).ttft_ms["p50"])
    return Cell(
        name=f"prefill, {PREFILL} tokens",
        ms=ms,
        rates=rates,
        num_bytes=costs.num_bytes(touched, PREFILL),
        operations=costs.operations(PREFILL, 1, PREFILL * (PREFILL + 1) // 2),
        experts=touched / len(experts_LTA),
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, help="keep the checkpoint in this folder")
    parser.add_argument("--json", action="store_true", help="the last line is one JSON object")
    chosen = parser.parse_args()
    torch.set_grad_enabled(False)
    with tempfile.TemporaryDirectory() as temporary:
        folder = chosen.model or Path(temporary) / "moe"
        if not (folder / "config.json").exists():
            make_model(folder)
        config = GroupConfig(
            model_path=str(folder),
            kernels="cpu",
            prefix_cache=False,
            kv_bytes=256 << 20,
            max_model_len=2048,
            max_sequences=max(DECODES),
        )
        replay = Replay(folder, config)
        costs = Costs(replay)
        cells = [alone(replay, costs, batch, PROMPT, 1) for batch in DECODES]
        cells.append(alone(replay, costs, 1, 0, PREFILL))
        with EngineBench(config) as bench:
            cells += [decode(bench, replay, costs, batch) for batch in DECODES]
            cells.append(prefill(bench, replay, costs))
    print(f"{available_threads()} threads; medians of {TURNS} turns")
    for one in cells:
        memory = statistics.median(each.memory for each in one.rates)
        matrix = statistics.median(each.matrix for each in one.rates)
        print(
            f"{one.name:27} {statistics.median(one.ms):7.2f} ms, floor "
            f"{statistics.median(one.floors_ms()):7.2f} ms at {memory / 1e9:.1f} GB/s and "
            f"{matrix / 1e9:4.0f} GFLOP/s; experts a layer {one.experts:4.1f}; "
            f"share {one.share():.0%}"
        )
    if chosen.json:
        said = [{**asdict(one), "share": round(one.share(), 4)} for one in cells]
        print(json.dumps({"bench": "moe", "cells": said}))


if __name__ == "__main__":
    main()
