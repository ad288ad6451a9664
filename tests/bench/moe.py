"""How near a mixture of experts on CPU comes to its own floor, in the engine.

    PYTHONPATH=src:tests python tests/bench/moe.py

A seeded model in the proportions of Llama 4 Scout: 12 layers of 16 experts, one a token, beside a
shared one; hidden size 512. The floor of a step is the larger of the bytes that it must read
(each weight that its tokens really use, once, and their keys and values) over the memory rate, and
of its operations over the matrix rate; both rates are measured in the same run. Which experts a
step uses is found by passing the same tokens through the same weights once more, in one chunk.
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """One cell: times are of a step."""

    cell: str
    ms: float
    floor_ms: float
    bound: str
    experts: float

    @property
    def share(self) -> float:
        """Of the floor."""
        return self.floor_ms / self.ms


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


class Floor:
    """What a step takes at least."""

    def __init__(self, replay: Replay, rates: Rates) -> None:
        assert replay.head is not None, "one slice holds all"
        self._rates = rates
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

    def ms(
        self, touched: int, tokens: int, contexts: Sequence[int], seen: int
    ) -> tuple[float, str]:
        """The least milliseconds, and what they are spent on.

        Args:
            touched: (layer, expert) pairs that some token goes to.
            tokens: of the step.
            contexts: tokens that each sequence reads from its cache.
            seen: (query, key) pairs.
        """
        rows = len(contexts)
        elements = self._always + touched * self._expert + self._head
        memory = 2 * (elements + sum(contexts) * self._kv_token) / self._rates.memory
        operations = 2.0 * tokens * (self._always + self._layers * self._expert)
        operations += 2.0 * rows * self._head + self._attention * seen
        matrix = operations / self._rates.matrix
        return max(memory, matrix) * 1e3, "memory" if memory > matrix else "matrix"


def _weights(linear: Linear) -> int:
    return linear.out_features * linear.in_features


def decode(bench: EngineBench, replay: Replay, floor: Floor, batch: int) -> Share:
    """A cell of `batch` sequences that are decoded together."""
    asked = prompts(batch, PROMPT)
    given = bench.greedy(asked, OUTPUT)
    routed_BLTA = torch.stack(
        [replay.experts_LTA([*a, *b]) for a, b in zip(asked, given, strict=True)]
    )
    floors, touched = [], []
    for at in range(PROMPT, PROMPT + OUTPUT - 1):
        step_LX = routed_BLTA[:, :, at].transpose(0, 1).flatten(1)
        touched.append(sum(len(one.unique()) for one in step_LX))
        floors.append(floor.ms(touched[-1], batch, [at + 1] * batch, batch * (at + 1)))
    times = [bench.run(asked, OUTPUT).itl_ms["p50"] for _ in range(3)]
    return Share(
        cell=f"decode, batch {batch}",
        ms=statistics.median(times),
        floor_ms=statistics.mean(ms for ms, _ in floors),
        bound=floors[0][1],
        experts=statistics.mean(touched) / len(routed_BLTA[0]),
    )


def prefill(bench: EngineBench, replay: Replay, floor: Floor) -> Share:
    """A cell of one prompt."""
    asked = prompts(1, PREFILL)
    experts_LTA = replay.experts_LTA(asked[0])
    touched = sum(len(one.unique()) for one in experts_LTA)
    floor_ms, bound = floor.ms(touched, PREFILL, [PREFILL], PREFILL * (PREFILL + 1) // 2)
    times = [bench.run(asked, 1).ttft_ms["p50"] for _ in range(7)]
    return Share(
        cell=f"prefill, {PREFILL} tokens",
        ms=statistics.median(times),
        floor_ms=floor_ms,
        bound=bound,
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
        with EngineBench(config) as bench:
            replay = Replay(folder, config)
            rates = measure_rates(replay.ops, torch.bfloat16, torch.device("cpu"))
            floor = Floor(replay, rates)
            print(
                f"{replay.ops.num_threads} threads: memory {rates.memory / 1e9:.1f} GB/s, "
                f"products {rates.matrix / 1e9:.0f} GFLOP/s"
            )
            shares = [decode(bench, replay, floor, batch) for batch in DECODES]
            shares.append(prefill(bench, replay, floor))
    for one in shares:
        print(
            f"{one.cell:22} {one.ms:8.2f} ms   floor {one.floor_ms:8.2f} ms ({one.bound})   "
            f"experts a layer {one.experts:4.1f}   share {one.share:.0%}"
        )
    if chosen.json:
        said = {"memory_gb_s": rates.memory / 1e9, "matrix_gflop_s": rates.matrix / 1e9}
        cells = [{**asdict(one), "share": one.share} for one in shares]
        print(json.dumps({"bench": "moe", **said, "cells": cells}))


if __name__ == "__main__":
    main()
