"""How near a mixture of experts on CPU comes to its own floor, in the engine.

    PYTHONPATH=src:tests python tests/bench/moe.py

A seeded model in the proportions of Llama 4 Scout: 12 layers of 16 experts, one a token, beside a
shared one; hidden size 512. The floor of a step is the larger of the bytes that it must read
(each weight that its tokens really use, once, and their keys and values) over the memory rate, and
of its operations over the matrix rate; both rates are the best measured before, between and after
the cells. Which experts a step uses is found by passing the same tokens through the same weights
once more, in one chunk.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from arriero.cluster.bench import EngineBench
from arriero.kernels.bench import Rates, measure_rates
from arriero.kernels.cpu import CpuOps
from arriero.kernels.cpu.backend import available_threads
from arriero.kernels.ops import FlatBatch, Linear, MoELayer
from arriero.shards.checkpoint.reader import Checkpoint
from arriero.shards.group import GroupConfig
from arriero.shards.layout import parts_of
from arriero.shards.mesh import Mesh
from arriero.shards.models.llama4 import Llama4Slice
from arriero.shards.models.llama4_config import Llama4Config
from arriero.shards.partition_moe import MoEPart
from arriero.shards.sequences import Rope
from support.models import tiny_llama4

BLOCK = 16
DECODES, PROMPT, OUTPUT = (1, 8, 32), 64, 64
PREFILL = 1000
TURNS = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """What was measured.

    Attributes:
        name: of the cell.
        ms: of a step.
        num_bytes: that a step must read, on average.
        operations: of a step.
        experts: that a layer uses in a step, on average.
    """

    name: str
    ms: float
    num_bytes: float
    operations: float
    experts: float

    def floor_ms(self, rates: Rates) -> float:
        """The least time of a step."""
        return 1e3 * max(self.num_bytes / rates.memory, self.operations / rates.matrix)


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
        self.blocks = -(-(PREFILL + OUTPUT) // BLOCK)
        self._slice = Llama4Slice(
            checkpoint,
            part,
            Mesh(part, tp=1, pp=1, dp=1, device=device),
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
        self._decoder = self.ops.decoder(
            self.layers,
            self._slice.kv,
            None,
            local_kv=self._slice.local_kv,
            experts=self._route,
        )

    def _route(self, x_TH: Tensor, layer: MoELayer) -> Tensor:
        h_TH = self.ops.rms_norm(x_TH, layer.mlp_norm_H, layer.eps)
        self._routed.append(self.ops.moe_route(h_TH, layer.router, layer.top_k).experts_TA)
        return self.ops.moe_block(x_TH, layer)

    def experts_LTA(self, tokens: Sequence[int]) -> Tensor:
        """The experts of each layer, token and choice."""
        count = len(tokens)
        positions_T = torch.arange(count, dtype=torch.int32)
        cos_TD, sin_TD = self._rope.at(positions_T)
        view = FlatBatch(
            positions_T=positions_T,
            query_start_S1=torch.tensor([0, count], dtype=torch.int32),
            context_S=torch.tensor([count], dtype=torch.int32),
            block_table_SB=torch.arange(self.blocks, dtype=torch.int32)[None],
            slots_T=positions_T,
            cos_TD=cos_TD,
            sin_TD=sin_TD,
            max_query=count,
            max_context=count,
        )
        whole = replace(view, local=view)
        self._routed = []
        self._decoder(self._slice.embed(torch.tensor(tokens, dtype=torch.int32)), whole)
        return torch.stack(self._routed)


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
    times = [bench.run(asked, OUTPUT).itl_ms["p50"] for _ in range(TURNS)]
    return Cell(
        name=f"decode, batch {batch}",
        ms=statistics.median(times),
        num_bytes=statistics.mean(map(costs.num_bytes, touched, keys)),
        operations=statistics.mean(costs.operations(batch, batch, seen) for seen in keys),
        experts=statistics.mean(touched) / len(replay.layers),
    )


def prefill(bench: EngineBench, replay: Replay, costs: Costs) -> Cell:
    """A cell of one prompt."""
    asked = prompts(1, PREFILL)
    experts_LTA = replay.experts_LTA(asked[0])
    touched = sum(len(one.unique()) for one in experts_LTA)
    times = [bench.run(asked, 1).ttft_ms["p50"] for _ in range(2 * TURNS)]
    return Cell(
        name=f"prefill, {PREFILL} tokens",
        ms=statistics.median(times),
        num_bytes=costs.num_bytes(touched, PREFILL),
        operations=costs.operations(PREFILL, 1, PREFILL * (PREFILL + 1) // 2),
        experts=touched / len(experts_LTA),
    )


def measured(config: GroupConfig) -> tuple[list[Cell], Rates]:
    """All cells, and the best rates seen before, between and after them."""
    with EngineBench(config) as bench:
        replay = Replay(Path(config.model_path), config)
        costs = Costs(replay)
        cells, rates = [], []
        for batch in (*DECODES, None):
            rates.append(measure_rates(replay.ops, torch.bfloat16, torch.device("cpu")))
            if batch is None:
                cells.append(prefill(bench, replay, costs))
            else:
                cells.append(decode(bench, replay, costs, batch))
        rates.append(measure_rates(replay.ops, torch.bfloat16, torch.device("cpu")))
    return cells, Rates(
        memory=max(one.memory for one in rates), matrix=max(one.matrix for one in rates)
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
        cells, rates = measured(config)
    print(
        f"{available_threads()} threads: memory {rates.memory / 1e9:.1f} GB/s, "
        f"products {rates.matrix / 1e9:.0f} GFLOP/s"
    )
    for one in cells:
        floor_ms = one.floor_ms(rates)
        print(
            f"{one.name:22} {one.ms:8.2f} ms   floor {floor_ms:8.2f} ms   "
            f"experts a layer {one.experts:4.1f}   share {floor_ms / one.ms:.0%}"
        )
    if chosen.json:
        said = {"memory_gb_s": rates.memory / 1e9, "matrix_gflop_s": rates.matrix / 1e9}
        shares = [{**asdict(one), "share": one.floor_ms(rates) / one.ms} for one in cells]
        print(json.dumps({"bench": "moe", **said, "cells": shares}))


if __name__ == "__main__":
    main()
