"""A small decoder with odd sizes, and batches over it, for tests of the CPU backend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from arriero.kernels.cpu import CpuOps
from arriero.kernels.cpu.library import find, runnable
from arriero.kernels.flat_batch import FlatBatch
from arriero.kernels.kv_cache import KVCacheSpec
from arriero.kernels.layers import AttentionStyle, DenseLayer
from arriero.kernels.ops import Ops

HIDDEN, FFN, Q_HEADS, KV_HEADS, HEAD_DIM, VOCAB, LAYERS, BLOCK = 80, 96, 6, 2, 20, 101, 3, 16
MAX_CONTEXT = 1200
CPU = torch.device("cpu")
PLAIN = AttentionStyle()
VARIANTS = [name for name in runnable() if find(name) is not None]


@dataclass
class Small:
    """A model on some backend."""

    ops: Ops
    dtype: torch.dtype
    style: AttentionStyle = PLAIN

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(1)

        def weight(rows: int, columns: int) -> Tensor:
            w = torch.randn(rows, columns, generator=generator) * columns**-0.5
            return w.bfloat16().float()

        pack, dtype = self.ops.pack_linear, self.dtype
        width = (Q_HEADS + 2 * KV_HEADS) * HEAD_DIM
        self.layers = [
            DenseLayer(
                attn_norm_H=1 + 0.1 * torch.randn(HIDDEN, generator=generator),
                qkv=pack([weight(width, HIDDEN)], torch.randn(width, generator=generator), dtype),
                o=pack([weight(HIDDEN, Q_HEADS * HEAD_DIM)], None, dtype),
                mlp_norm_H=1 + 0.1 * torch.randn(HIDDEN, generator=generator),
                gate_up=pack([weight(FFN, HIDDEN), weight(FFN, HIDDEN)], None, dtype),
                down=pack([weight(HIDDEN, FFN)], None, dtype),
                num_q_heads=Q_HEADS,
                num_kv_heads=KV_HEADS,
                head_dim=HEAD_DIM,
                softmax_scale=HEAD_DIM**-0.5,
                eps=1e-5,
                style=self.style,
            )
            for _ in range(LAYERS)
        ]
        self.vocab = self.ops.pack_vocab(weight(VOCAB, HIDDEN), 0, dtype)
        self.kv = self.ops.kv_cache(
            KVCacheSpec(
                num_layers=LAYERS,
                num_blocks=4 * MAX_CONTEXT // BLOCK,
                num_kv_heads=KV_HEADS,
                head_dim=HEAD_DIM,
                block_size=BLOCK,
                dtype=dtype,
            ),
            CPU,
        )
        self.decoder = self.ops.decoder(self.layers, self.kv, None)

    def step(self, pieces: Sequence[tuple[int, int, Tensor]]) -> list[Tensor]:
        """Run (sequence, start, tokens) pieces in one batch; logits of every row, by piece."""
        tokens = torch.cat([t for _, _, t in pieces])
        x = self.decoder(self.ops.embed(tokens, self.vocab), batch(pieces))
        logits = self.ops.logits(x, torch.ones(HIDDEN), 1e-5, self.vocab)
        return list(logits.split([len(t) for _, _, t in pieces]))


def batch(pieces: Sequence[tuple[int, int, Tensor]]) -> FlatBatch:
    """Each sequence has its own stretch of blocks, last block first."""
    per_sequence = MAX_CONTEXT // BLOCK
    table = torch.stack(
        [torch.arange((s + 1) * per_sequence - 1, s * per_sequence - 1, -1) for s, _, _ in pieces]
    )
    positions = [torch.arange(start, start + len(t)) for _, start, t in pieces]
    slots = torch.cat(
        [row[p // BLOCK] * BLOCK + p % BLOCK for row, p in zip(table, positions, strict=True)]
    )
    counts = torch.tensor([0] + [len(t) for _, _, t in pieces])
    angle = torch.cat(positions)[:, None] / 1e4 ** (torch.arange(HEAD_DIM // 2) * 2 / HEAD_DIM)
    contexts = [start + len(t) for _, start, t in pieces]
    return FlatBatch(
        positions_T=torch.cat(positions).int(),
        query_start_S1=counts.cumsum(0).int(),
        context_S=torch.tensor(contexts).int(),
        block_table_SB=table.int(),
        slots_T=slots.int(),
        cos_TD=angle.cos(),
        sin_TD=angle.sin(),
        max_query=int(counts.max()),
        max_context=max(contexts),
    )


def tokens(count: int, seed: int) -> Tensor:
    """Random token ids."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCAB, (count,), generator=generator).int()


def cpu(threads: int = 2, variant: str | None = None, exact: bool = False) -> CpuOps:
    """The backend under test."""
    return CpuOps(CPU, threads, exact_inputs=exact, variant=variant)
