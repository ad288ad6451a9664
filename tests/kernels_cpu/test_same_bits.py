"""Same tokens: not a bit of a row depends on its neighbours, on chunking or on threads."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from arriero.kernels.attention_mask import FULL_ATTENTION, AttentionMaskSpec
from arriero.kernels.layers import AttentionStyle
from arriero.kernels.quantize import quantize_fp8, quantize_int4, quantize_int8

from .small import VARIANTS, Small, cpu, tokens

pytestmark = pytest.mark.skipif(not VARIANTS, reason="the CPU kernels are not built")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "mask", [FULL_ATTENTION, AttentionMaskSpec(window=10, sinks=3)], ids=["all", "10+3"]
)
def test_chunks_batches_and_threads(
    variant: str, dtype: torch.dtype, mask: AttentionMaskSpec
) -> None:
    """A prompt whole, in chunks, beside others, and token by token, past a split of 512 keys."""
    style = AttentionStyle(mask=mask)
    prompt, other = tokens(560, 0), tokens(40, 1)
    whole = Small(cpu(1, variant), dtype, style).step([(0, 0, prompt)])[0]

    model = Small(cpu(3, variant), dtype, style)
    cuts, parts = (0, 1, 8, 21, 22, 150, 500, 505), []
    for i, (start, stop) in enumerate(itertools.pairwise(cuts)):
        beside = (1, 5 * i, other[5 * i : 5 * i + 5])
        pieces = [(0, start, prompt[start:stop]), beside]
        parts.append(model.step(pieces[:: -1 if i % 2 else 1])[i % 2])
    # One at a time over the edge of the split, alone and so with its splits apart.
    parts += [model.step([(0, i, prompt[i : i + 1])])[0] for i in range(505, 530)]
    # And in a batch large enough that no split is computed apart.
    for i in range(530, 560):
        crowd = [(0, i, prompt[i : i + 1])] + [(1, 36 + j, other[36 + j :][:1]) for j in range(4)]
        parts.append(model.step(crowd)[0])
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16", "int8", "fp8", "int4"])
def test_products(variant: str, kind: str) -> None:
    """The rows of every batch size and thread count equal those computed one by one."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(131, 77, generator=generator)
    x = torch.randn(230, 77, generator=generator)
    quantizers = {"int8": quantize_int8, "fp8": quantize_fp8, "int4": quantize_int4}
    results = []
    for threads in (1, 2):
        ops = cpu(threads, variant)
        if kind in quantizers:
            linear = ops.pack_quantized([quantizers[kind](weight)], None)
        else:
            linear = ops.pack_linear([weight[:100], weight[100:]], None, getattr(torch, kind))
        results.append(torch.cat([ops.linear(row[None], linear) for row in x]))
        for rows in (2, 3, 4, 5, 7, 11, 12, 13, 24, 25, 40, 96, 97, 230):
            assert torch.equal(ops.linear(x[:rows], linear), results[0][:rows]), rows
    assert torch.equal(*results)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize(
    "kind",
    [
        "float32",
        "bfloat16",
        "float16",
        "int8",
        "fp8",
        "int4",
        "int4-20",
        "int4-half",
        "int4-zero-8",
    ],
)
def test_products_over_blocks_of_inputs(variant: str, kind: str, exact: bool) -> None:
    """Inputs that need several blocks: each row as alone, and near float64."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(97, 1050, generator=generator)
    x = torch.randn(70, 1050, generator=generator)
    if not exact:
        x = x.bfloat16().float()  # so that rounding changes nothing
    quantized = {
        "int8": lambda: quantize_int8(weight),
        "fp8": lambda: quantize_fp8(weight),
        "int4": lambda: quantize_int4(weight, 32, search=False),
        "int4-20": lambda: quantize_int4(weight, 20, search=False),
        "int4-half": lambda: quantize_int4(weight, 32, search=False, half=True),
        "int4-zero-8": lambda: replace(quantize_int4(weight, 128, search=False), zeros=None),
    }
    ops = cpu(1, variant, exact)
    if kind in quantized:
        stored = quantized[kind]()
        assert stored.half_scales == (kind == "int4-half")
        linear, meant = ops.pack_quantized([stored], None), stored.dequantize()
    else:
        dtype = getattr(torch, kind)
        linear, meant = ops.pack_linear([weight], None, dtype), weight.to(dtype)
    alone = torch.cat([ops.linear(row[None], linear) for row in x])
    for rows in (*range(2, 10), 13, 26, 33, 49, 70):
        assert torch.equal(ops.linear(x[:rows], linear), alone[:rows]), rows
    torch.testing.assert_close(alone.double(), x.double() @ meant.double().t(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("exact", [False, True])
def test_variants_agree_to_rounding(variant: str, exact: bool) -> None:
    prompt = tokens(70, 2)
    dtype = torch.bfloat16 if not exact else torch.float32
    ours = Small(cpu(2, variant, exact), dtype).step([(0, 0, prompt)])[0]
    other = Small(cpu(1, "portable"), torch.float32).step([(0, 0, prompt)])[0]
    torch.testing.assert_close(ours, other, rtol=0, atol=2e-4 if exact else 0.2)
