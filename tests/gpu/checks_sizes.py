"""Every kernel at the head sizes and groups of production models, at counts of 1, and what only
quantized models or several ranks use.

Each check gives the greatest error, as `checks` does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from gpu import checks, shapes
from gpu.checks import Where, error
from gpu.shapes import Shape
from torch import Tensor

from arriero.kernels.expert_rows import RowFormat
from arriero.kernels.flat_batch import FlatBatch
from arriero.kernels.input_levels import fp4_groups
from arriero.kernels.input_transform import InputTransform, float8_rows, quantize_rows
from arriero.kernels.kv_cache import KVCache
from arriero.kernels.layers import DenseLayer
from arriero.kernels.ops import Ops
from arriero.kernels.packed_weights import Vocab
from arriero.kernels.quantize import quantize_fp8, quantize_int4, quantize_int8
from arriero.kernels.quantized_weight import FP4_VALUES, QuantizedWeight
from arriero.kernels.rounded_rows import InputRows, RoundedRows, Rounding
from arriero.kernels.triton import activation, norm
from arriero.kernels.triton.float4 import fp4_rows, tiled_scales

HEADS = [(dim, group) for dim in (64, 128) for group in (4, 5, 16)]
FORMATS: dict[RowFormat, float] = {"float32": 2**-20, "bfloat16": 2**-8, "fp8": 2**-4}
"""Formats of rows, and their greatest rounding."""


def heads_of(dim: int, group: int) -> Shape:
    """A layer with two key/value heads."""
    name = f"d{dim} g{group}"
    return Shape(name=name, hidden=512, mlp=384, q_heads=2 * group, kv_heads=2, head_dim=dim)


def attention(dim: int, group: int) -> Callable[[Where], float]:
    """Rope and attention over each type of cache."""

    def check(at: Where) -> float:
        at = replace(at, shape=heads_of(dim, group))
        of_caches = [checks.attention(dtype)(at) for dtype in (None, torch.int8, checks.FP8)]
        return max(checks.rope(at), *of_caches)

    return check


def same_bits(dim: int, group: int) -> Callable[[Where], float]:
    """Decode and prefill give the same bits."""
    return lambda at: checks.bits_of_attention(replace(at, shape=heads_of(dim, group)))


def counts_of_one(at: Where) -> float:
    """A sequence, a token, a key, a row."""
    worst = 0.0
    for sequences in ([(0, 1)], [(0, 2)], [(1, 1)]):
        alone = replace(at, sequences=sequences)
        worst = max(worst, checks.rope(alone), checks.attention(None)(alone))
    x, weight = at.randn(1, 48), torch.rand(48, device=at.device)
    norms = at.ops().rms_norm(x, weight, 1e-5), at.reference.rms_norm(x, weight, 1e-5)
    experts = at.ops().moe_route(x, at.ops().pack_linear([at.randn(1, 48)], None, at.dtype), 1)
    assert experts.experts_TA.cpu().tolist() == [[0]], "the only expert"
    return max(worst, error(*norms))


def rows_to_float8(at: Where) -> float:
    """Rows in one pass and in several, against the definition: bit for bit."""
    worst = 0.0
    for width in (48, 3000) if at.tiny else (4096, 16384, 53248):
        for bound in (1200.0, math.inf):
            x = at.randn(5, width) * 100
            q, scale = at.ops().quantize_rows(x, bound)
            expected, expected_scale = quantize_rows(x.cpu(), bound)
            same = torch.equal(q.cpu().view(torch.uint8), expected.view(torch.uint8))
            worst = max(worst, 0.0 if same else 1.0, error(scale.cpu(), expected_scale))
    return worst


def norms_to_float8(at: Where) -> float:
    """Norm and SwiGLU that write float8 rows: the bits of separate launches."""
    same = True
    scale = torch.tensor([0.01], device=at.device)
    for width in (48, 3000) if at.tiny else (4096, 6656, 16384):
        weight = torch.rand(width, device=at.device)
        x, gate_up = at.randn(5, width) * 100, at.randn(5, 2 * width) * 10
        normed, gated = norm.rms_norm(x, weight, 1e-5), activation.silu_mul(gate_up)
        for rounding in (Rounding(), Rounding(bound=2.0), Rounding(scale=scale)):
            rows = norm.norm_rows(x, None, weight, 1e-5, rounding)
            same &= _same_float8(at, rows, normed, rounding)
            rows = activation.silu_mul_rounded(gate_up, rounding)
            same &= _same_float8(at, rows, gated, rounding)
    return 0.0 if same else 1.0


def _same_float8(at: Where, rows: InputRows, plain: Tensor, rounding: Rounding) -> bool:
    """Whether a launch of its own rounds the plain rows to the same bits."""
    assert isinstance(rows, RoundedRows), "the rows are rounded"
    inputs = InputTransform(num_inputs=1, bound=rounding.bound, scale=rounding.scale)
    q, scale = float8_rows(at.ops(), plain, inputs)
    levels = rows.levels_TI.view(torch.uint8), q.view(torch.uint8)
    return torch.equal(*levels) and torch.equal(rows.scale_T1, scale.expand(len(q), 1))


def rounded_products(at: Where) -> float:
    """Products with inputs rounded to float8, in the fast mode and in the exact one."""
    worst = 0.0
    rows, columns = (48, 96) if at.tiny else (6400, 4096)
    weight = quantize_fp8(torch.randn(rows, columns) * columns**-0.5)
    inputs = InputTransform(num_inputs=columns, bound=1200.0)
    theirs = at.reference.pack_transformed([weight], None, inputs)
    for independent in (False, True):
        ops = at.ops(independent=independent)
        ours = ops.pack_transformed([weight], None, inputs)
        for count in (1, 17, 300):
            x = at.randn(count, columns)
            expected = at.reference.linear(x, theirs)
            worst = max(worst, error(ops.linear(x, ours), expected))
    return worst


def random_fp4(rows: int, columns: int) -> QuantizedWeight:
    """A matrix of random e2m1 numbers and scales."""
    scales = (torch.rand(rows, columns // 16) * 400).to(torch.float8_e4m3fn).float()
    return QuantizedWeight(
        kind="fp4",
        in_features=columns,
        data=torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8),
        scales=scales,
        row_scales=torch.full((rows, 1), 1e-4),
        group_size=16,
    )


def fp4_products(at: Where) -> float:
    """Products with inputs rounded to NVFP4, of one matrix and stacked, in both modes."""
    worst = 0.0
    rows, columns = (48, 96) if at.tiny else (6400, 4096)
    first, second = random_fp4(rows, columns), random_fp4(rows, columns)
    assert second.row_scales is not None
    stacked = [first, replace(second, row_scales=2 * second.row_scales)]
    scale = torch.full((1,), 6 / 448 / 6)  # magnitudes up to 6
    inputs = InputTransform(num_inputs=columns, levels="fp4", scale=scale)
    for weights in ([first], stacked):
        theirs = at.reference.pack_transformed(weights, None, inputs)
        for independent in (False, True):
            ops = at.ops(independent=independent)
            ours = ops.pack_transformed(weights, None, inputs)
            for count in (1, 17, 300):
                x = at.randn(count, columns)
                expected = at.reference.linear(x, theirs)
                worst = max(worst, error(ops.linear(x, ours), expected))
    return worst


def rows_to_fp4(at: Where) -> float:
    """Rows of NVFP4 against the definition: bit for bit."""
    values, scale = torch.tensor(FP4_VALUES), torch.full((1,), 3e-3)
    worst = 0.0
    for count, width in ((5, 48), (130, 160)) if at.tiny else ((5, 16384), (300, 6656)):
        x = at.randn(count, width)
        got = fp4_rows(x, scale.to(at.device))
        number_TGC, scale_TG = fp4_groups(x.cpu().float() / scale)
        code_TI = torch.searchsorted(values, number_TGC.abs()) + 8 * number_TGC.signbit()
        code_TI = F.pad(code_TI.flatten(1), (0, -width % 32))
        code_TB = (code_TI[:, ::2] + 16 * code_TI[:, 1::2]).to(torch.uint8)
        tiled = tiled_scales(scale_TG.to(torch.float8_e4m3fn))
        pairs = ((got.codes_TB, code_TB), (got.scales, tiled))
        same = [torch.equal(a.view(torch.uint8).cpu(), b.view(torch.uint8)) for a, b in pairs]
        worst = max(worst, 0.0 if all(same) else 1.0)
    return worst


def rounded_experts(at: Where) -> float:
    """Experts with inputs rounded to float8: no row, one, many; in both modes."""
    worst = 0.0
    rows, columns = (48, 96) if at.tiny else (1024, 2048)
    weights = [quantize_fp8(torch.randn(rows, columns) * columns**-0.5) for _ in range(4)]
    inputs = InputTransform(num_inputs=columns, bound=1200.0)
    theirs = [at.reference.pack_transformed([weight], None, inputs) for weight in weights]
    for independent in (False, True):
        ops = at.ops(independent=independent)
        ours = [ops.pack_transformed([weight], None, inputs) for weight in weights]
        for counts in ([0, 1, 17, 2], [300, 0, 5, 64]):
            starts = torch.tensor([0, *counts], device=at.device).cumsum(0).int()
            x = at.randn(sum(counts), columns)
            expected = at.reference.grouped_linear(x, theirs, starts)
            worst = max(worst, error(ops.grouped_linear(x, ours, starts), expected))
    return worst


def rows_between_ranks(at: Where) -> float:
    """Rows packed and unpacked come back, to the rounding of their format."""
    worst, size = 0.0, 64 if at.tiny else 5120
    x = at.randn(9, size)
    order = torch.tensor([3, 1, 8], dtype=torch.int32, device=at.device)
    back = torch.arange(3, dtype=torch.int32, device=at.device)
    for format, rounding in FORMATS.items():
        sent = at.ops().pack_rows(x, order, None, format)
        got = at.ops().unpack_rows(sent, back, size, format, torch.float32)
        worst = max(worst, error(got, x[order.long()]) / rounding * at.limit)
    return worst


def quantized_tables(at: Where) -> float:
    """Embedding and logits of quantized vocabularies."""
    rows, columns = (90, 64) if at.tiny else (3000, 1024)
    weight = torch.randn(rows, columns) * columns**-0.5
    tokens = torch.tensor([0, 5, 89], dtype=torch.int32, device=at.device)
    weight_H = torch.ones(columns, device=at.device)
    x = at.randn(7, columns)
    worst = 0.0
    kinds = (quantize_int8(weight), quantize_fp8(weight), quantize_int4(weight, 32, search=False))
    for quantized in kinds:
        ours = at.ops().pack_quantized_vocab(quantized, 0)
        theirs = at.reference.pack_quantized_vocab(quantized, 0)
        embedded = [ops.embed(tokens, table) for ops, table in _pairs(at, ours, theirs)]
        embedded[1] = embedded[1].to(embedded[0].dtype)  # bfloat16 on a GPU
        logits = [ops.logits(x, weight_H, 1e-5, table) for ops, table in _pairs(at, ours, theirs)]
        rounding = 2**-7  # of bfloat16, which the interpreter truncates
        worst = max(worst, error(*embedded) / rounding * at.limit, error(*logits))
    return worst


def _pairs(at: Where, ours: object, theirs: object) -> list[tuple[Ops, Vocab]]:
    return [(at.ops(), ours), (at.reference, theirs)]  # type: ignore[list-item]


def plain_logits(at: Where) -> float:
    """Norm and product with the vocabulary, by torch and by our own product."""
    rows, columns = (90, 64) if at.tiny else (3000, 1024)
    weight, norm = at.randn(rows, columns) * columns**-0.5, torch.ones(columns, device=at.device)
    x = at.randn(7, columns)
    theirs = at.reference.logits(x, norm, 1e-5, at.reference.pack_vocab(weight, 0, at.dtype))
    worst = 0.0
    for independent in (True, False):
        ops = at.ops(independent=independent)
        ours = ops.logits(x, norm, 1e-5, ops.pack_vocab(weight, 0, at.dtype))
        worst = max(worst, error(ours, theirs))
    return worst


def rope_to_small_caches(at: Where) -> float:
    """Keys and values written as int8 and float8, against float32, to their rounding."""
    batch = shapes.batch(at.mixed, at.sizes.head_dim, at.device)
    heads = at.sizes.q_heads + 2 * at.sizes.kv_heads
    qkv = at.randn(len(batch.positions_T), heads * at.sizes.head_dim)
    layer = shapes.layer(at.ops(), at.sizes, at.dtype, at.device)
    exact = _written(at, layer, torch.float32, qkv, batch)
    worst = 0.0
    roundings = {torch.int8: 1 / 254, checks.FP8: 1 / 16}
    if at.tiny:  # the interpreter loses the carry when it rounds 1.97 to float8: it gives 1
        del roundings[checks.FP8]
    for dtype, rounding in roundings.items():
        got = _written(at, layer, dtype, qkv, batch)
        off = error(checks.dequantized(got, dtype), exact)
        worst = max(worst, off / rounding * at.limit / 2)  # twice the rounding is the limit
    return worst


def _written(
    at: Where, layer: DenseLayer, dtype: torch.dtype, qkv: torch.Tensor, batch: FlatBatch
) -> torch.Tensor:
    kv: KVCache = shapes.cache(at.ops(), at.sizes, at.mixed, dtype, at.device)
    blocks = range(kv.spec.num_blocks)
    if dtype.itemsize > 1:  # small caches begin as zeros
        kv.write(0, blocks, kv.read(0, blocks) * 0)
    at.ops().rope_write_kv(qkv, layer, kv, 0, batch)
    return kv.read(0, blocks)


NEAR = {
    **{f"rope, attention d{dim} g{group}": attention(dim, group) for dim, group in HEADS},
    "counts of 1": counts_of_one,
    "rows between ranks": rows_between_ranks,
    "quantized vocabularies": quantized_tables,
    "logits": plain_logits,
    "product, fp8 inputs": rounded_products,
    "product, fp4 inputs": fp4_products,
    "experts, fp8 inputs": rounded_experts,
    "rope to int8 and fp8 caches": rope_to_small_caches,
}
SAME = {
    **{f"bits, decode and prefill d{dim} g{group}": same_bits(dim, group) for dim, group in HEADS},
    "rows to float8": rows_to_float8,
    "rows to NVFP4": rows_to_fp4,
    "norms to float8": norms_to_float8,
}
