"""The cache of e4m3: the bytes of the reference, and attention over what they mean."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from arriero.kernels.kv_cache import KVCache, KVCacheSpec
from arriero.kernels.layers import DenseLayer
from arriero.kernels.ops import Ops
from arriero.kernels.select import ops_for

from .small import BLOCK, CPU, HEAD_DIM, KV_HEADS, MAX_CONTEXT, Q_HEADS, VARIANTS, Small, batch, cpu

pytestmark = pytest.mark.skipif(not VARIANTS, reason="the CPU kernels are not built")

TOKENS = 70


def cache(ops: Ops) -> KVCache:
    spec = KVCacheSpec(
        num_layers=1,
        num_blocks=MAX_CONTEXT // BLOCK,
        num_kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        block_size=BLOCK,
        dtype=torch.float8_e4m3fn,
    )
    return ops.kv_cache(spec, CPU)


def qkv_rows() -> Tensor:
    """Numbers from below the least of e4m3 to beyond its greatest."""
    width = (Q_HEADS + 2 * KV_HEADS) * HEAD_DIM
    rows_TE = torch.randn(TOKENS, width, generator=torch.Generator().manual_seed(5))
    return rows_TE * torch.logspace(-4, 2.5, TOKENS)[:, None]


def layer_of(variant: str) -> DenseLayer:
    return Small(cpu(1, variant), torch.bfloat16).layers[0]


@pytest.mark.parametrize("variant", VARIANTS)
def test_bytes_and_attention(variant: str) -> None:
    ours, reference = cpu(2, variant), ops_for(CPU, "reference", None)
    layer, of = layer_of(variant), batch([(0, 0, torch.zeros(TOKENS))])
    qkv_TE = qkv_rows()
    caches = [cache(ops) for ops in (ours, reference)]
    for ops, kv in zip((ours, reference), caches, strict=True):
        ops.rope_write_kv(qkv_TE.clone(), layer, kv, 0, of)
    blocks = of.block_table_SB[0, : -(-TOKENS // BLOCK)].tolist()
    got, expected = (kv.read(0, blocks) for kv in caches)
    # RoPE rounds in float32, so a number between two levels may fall to either side.
    levels = got.view(torch.uint8).int() - expected.view(torch.uint8).int()
    assert levels.abs().max() <= 1
    assert (levels != 0).float().mean() < 1e-3
    caches[1].write(0, blocks, got.float())
    assert torch.equal(caches[1].read(0, blocks).view(torch.uint8), got.view(torch.uint8))

    q_TND = torch.randn(TOKENS, Q_HEADS, HEAD_DIM, generator=torch.Generator().manual_seed(6))
    decode = batch([(0, TOKENS - 1, torch.zeros(1))])
    for rows, context in ((TOKENS, of), (1, decode)):
        results = [
            ops.paged_attention(q_TND[-rows:], 0.01, kv, 0, context).view(rows, -1)
            for ops, kv in zip((ours, reference), caches, strict=True)
        ]
        torch.testing.assert_close(results[0], results[1].float(), rtol=1e-4, atol=1e-3)
