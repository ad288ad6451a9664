"""Every kernel against the reference on the same device, and the same bits in any company."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from gpu import shapes
from gpu.shapes import Shape
from torch import Tensor

from arriero.kernels.attention_mask import FULL_ATTENTION, AttentionMaskSpec
from arriero.kernels.layers import AttentionStyle
from arriero.kernels.ops import Ops
from arriero.kernels.packed_weights import Linear
from arriero.kernels.quantize import quantize_fp8, quantize_int4, quantize_int8
from arriero.kernels.reference.backend import ReferenceOps
from arriero.kernels.sampling_rows import SamplingRows
from arriero.kernels.triton.backend import TritonOps

FP8 = torch.float8_e4m3fn
DENSE = Shape(name="dense", hidden=512, mlp=384, q_heads=8, kv_heads=2, head_dim=128)
EXPERTS = replace(DENSE, name="experts", experts=8, expert_mlp=256)
MIXED = [(0, 70), (511, 1), (1, 1), (300, 33), (0, 1), (1300, 1)]


@dataclass(frozen=True)
class Where:
    """Device, dtype, and the two backends.

    Attributes:
        shape: sizes of the layers; None for `DENSE`.
        sequences: (cached, new) tokens of each sequence; None for `MIXED`.
    """

    device: torch.device
    dtype: torch.dtype
    tiny: bool
    shape: Shape | None = None
    sequences: list[tuple[int, int]] | None = None

    @property
    def sizes(self) -> Shape:
        shape = self.shape or DENSE
        return shape.tiny() if self.tiny else shape

    @property
    def mixed(self) -> list[tuple[int, int]]:
        if self.sequences is not None:
            return self.sequences
        return [(0, 7), (21, 1), (3, 4)] if self.tiny else MIXED

    def ops(self, *, independent: bool = True) -> TritonOps:
        return TritonOps(self.device, batch_independent=independent)

    @property
    def reference(self) -> ReferenceOps:
        return ReferenceOps(self.device)

    def randn(self, *shape: int) -> Tensor:
        return shapes.randn(*shape, dtype=self.dtype, device=self.device)

    @property
    def limit(self) -> float:
        """Of the error, as a share of the greatest magnitude: a few roundings."""
        return 1e-4 if self.dtype == torch.float32 else 2e-2


def error(got: Tensor, expected: Tensor) -> float:
    """The greatest difference over the greatest magnitude expected; infinite if not finite."""
    if not got.isfinite().all():
        return float("inf")
    expected = expected.float()
    return float((got.float() - expected).abs().max() / expected.abs().max().clamp(min=1e-9))


def norm(at: Where) -> float:
    x, weight = at.randn(37, 4096 if not at.tiny else 48), torch.rand(4096, device=at.device)
    weight = weight[: x.shape[1]]
    return error(at.ops().rms_norm(x, weight, 1e-5), at.reference.rms_norm(x, weight, 1e-5))


def silu(at: Where) -> float:
    x = at.randn(33, 3000 if not at.tiny else 60)
    return error(at.ops().silu_mul(x), at.reference.silu_mul(x))


def rope(at: Where) -> float:
    worst = 0.0
    for style, weighted in (
        (AttentionStyle(), False),
        (AttentionStyle(), True),
        (AttentionStyle(rope="pairs", qk_norm=True), False),
        (AttentionStyle(rope="none", query_scale=(0.1, 8192)), False),
    ):
        outcomes = []
        batch = shapes.batch(at.mixed, at.sizes.head_dim, at.device)
        heads = at.sizes.q_heads + 2 * at.sizes.kv_heads
        torch.manual_seed(0)
        qkv = at.randn(len(batch.positions_T), heads * at.sizes.head_dim)
        norms = torch.rand(2, at.sizes.head_dim, device=at.device) if weighted else (None, None)
        for ops in (at.ops(), at.reference):
            layer = shapes.layer(ops, at.sizes, at.dtype, at.device)
            layer = replace(layer, style=style, q_norm_D=norms[0], k_norm_D=norms[1])
            kv = shapes.cache(ops, at.sizes, at.mixed, at.dtype, at.device)
            kv.write(0, range(kv.spec.num_blocks), kv.read(0, range(kv.spec.num_blocks)) * 0)
            q = ops.rope_write_kv(qkv, layer, kv, 0, batch)
            outcomes.append((q, kv.read(0, range(kv.spec.num_blocks))))
        (q, stored), (q_ref, stored_ref) = outcomes
        worst = max(worst, error(q, q_ref), error(stored, stored_ref))
    return worst


def attention(
    kv_dtype: torch.dtype | None,
    visible: AttentionMaskSpec = FULL_ATTENTION,
    *,
    independent: bool = True,
) -> Callable[[Where], float]:
    def check(at: Where) -> float:
        dtype = kv_dtype or at.dtype
        batch = shapes.batch(at.mixed, at.sizes.head_dim, at.device)
        q = at.randn(len(batch.positions_T), at.sizes.q_heads, at.sizes.head_dim)
        ours = at.ops(independent=independent)
        kv = shapes.cache(ours, at.sizes, at.mixed, dtype, at.device)
        blocks = range(kv.spec.num_blocks)
        data = kv.read(0, blocks)
        if dtype == torch.int8:
            data = torch.randint(-127, 128, data.shape, dtype=torch.int8, device=at.device)
            scale = torch.full((*data.shape[:-1], 1), 0.01, device=at.device)
            data[..., -4:] = scale.view(torch.int8)
            kv.write(0, blocks, data)
        elif dtype.itemsize == 1:
            data = torch.randn(data.shape, device=at.device).to(dtype)
            kv.write(0, blocks, data)
        whole = replace(kv.spec, dtype=torch.float32)
        reference = at.reference.kv_cache(whole, at.device)
        reference.write(0, blocks, dequantized(data, dtype))
        got = ours.paged_attention(q, 0.1, kv, 0, batch, visible)
        return error(got, at.reference.paged_attention(q, 0.1, reference, 0, batch, visible))

    return check


def dequantized(data: Tensor, dtype: torch.dtype) -> Tensor:
    """Canonical blocks as float32."""
    if dtype != torch.int8:
        return data.float()
    return data[..., :-4].float() * data[..., -4:].contiguous().view(torch.float32)


def product(kind: str) -> Callable[[Where], float]:
    def check(at: Where) -> float:
        rows, columns = (96, 64) if at.tiny else (1536, 1024)
        weight = torch.randn(rows, columns, device=at.device) * columns**-0.5
        worst = 0.0
        for ops in (at.ops(), at.ops(independent=False)):
            ours, theirs = (pack(one, kind, weight, at.dtype) for one in (ops, at.reference))
            for tokens in (1, 17) if at.tiny else (1, 5, 64, 130, 2048):
                x = at.randn(tokens, columns)
                worst = max(worst, error(ops.linear(x, ours), at.reference.linear(x, theirs)))
        return worst

    return check


def split_product(at: Where) -> float:
    """The q, k, v product of the 405B at TP8, whose columns several programs share.

    A row alone must have the bits that it has among others, whose parts one program adds in turn.
    """
    rows, columns = (96, 2048) if at.tiny else (2304, 16384)
    weight = torch.randn(rows, columns, device=at.device) * columns**-0.5
    exact, worst = at.ops(), 0.0
    for kind in ("int8", "int4", "int4_symmetric"):
        theirs = pack(at.reference, kind, weight, at.dtype)
        for ops in (exact, at.ops(independent=False)):
            ours = pack(ops, kind, weight, at.dtype)
            for tokens in (1, 17) if at.tiny else (1, 5, 64, 300):
                x = at.randn(tokens, columns)
                got = ops.linear(x, ours)
                worst = max(worst, error(got, at.reference.linear(x, theirs)))
                if ops is exact and not torch.equal(got[:1], ops.linear(x[:1], ours)):
                    return float("inf")
    return worst


def pack(ops: Ops, kind: str, weight: Tensor, dtype: torch.dtype) -> Linear:
    """The same matrix in any kind."""
    if kind == "dense":
        return ops.pack_linear([weight], None, dtype)
    if kind == "int8":
        return ops.pack_quantized([quantize_int8(weight)], None)
    if kind == "fp8":
        return ops.pack_quantized([quantize_fp8(weight)], None)
    int4 = quantize_int4(weight.cpu(), 32, search=False)
    if kind == "int4_symmetric":
        int4 = replace(int4, zeros=None)
    return ops.pack_quantized([int4], None)


def experts(at: Where) -> float:
    """The routed layer against the same, expert by expert."""
    sizes = EXPERTS.tiny() if at.tiny else EXPERTS
    ours = at.ops()
    layer = shapes.layer(ours, sizes, at.dtype, at.device)
    x = at.randn(50, sizes.hidden)
    got = ours.moe_block(x, layer)
    return error(got, Ops.moe_block(ours, x, layer))


def embedding(at: Where) -> float:
    table = at.randn(90, 64)
    tokens = torch.tensor([0, 5, 89, 40, 39], dtype=torch.int32, device=at.device)
    ours = at.ops().embed(tokens, at.ops().pack_vocab(table[:60], 10, at.dtype))
    theirs = at.reference.embed(tokens, at.reference.pack_vocab(table[:60], 10, at.dtype))
    return error(ours, theirs)


def sampling(at: Where) -> float:
    """The share of tokens that differ: none should."""
    rows, vocab = (6, 500) if at.tiny else (64, 128256)
    logits = torch.randn(rows, vocab, device=at.device) * 4

    def column(low: float, high: float) -> Tensor:
        return torch.linspace(low, high, rows, device=at.device)

    params = SamplingRows(
        temperature_R=column(0, 2),
        top_k_R=(torch.arange(rows, device=at.device) % 3 * 40).int(),
        top_p_R=column(0.2, 1),
        min_p_R=column(0.05, 0),
        seed_R=torch.arange(rows, device=at.device) * 7919,
        position_R=torch.arange(rows, device=at.device),
    )
    ours = at.ops().sample(logits.clone(), params).tokens_R
    theirs = at.reference.sample(logits.clone(), params).tokens_R
    return float((ours != theirs).float().mean())


def bits_of_attention(at: Where) -> float:
    """Share of elements whose bits depend on whether a row is decoded or prefilled.

    Also in a short piece of a prompt, where several programs share the keys of a tile.
    """
    ours = at.ops()
    sequences = [(0, 40)] if at.tiny else [(0, 1500)]
    kv = shapes.cache(ours, at.sizes, sequences, at.dtype, at.device)
    whole = shapes.batch(sequences, at.sizes.head_dim, at.device)
    count = sequences[0][1]
    q = at.randn(count, at.sizes.q_heads, at.sizes.head_dim)
    together = ours.paged_attention(q, 0.1, kv, 0, whole)
    wrong = 0.0
    pieces = [(row, row + 1) for row in (0, 17, count - 1)] + [(count - 3, count)]
    for start, stop in pieces:
        alone = replace(
            whole,
            positions_T=whole.positions_T[start:stop],
            query_start_S1=torch.tensor([0, stop - start], dtype=torch.int32, device=at.device),
            context_S=torch.tensor([stop], dtype=torch.int32, device=at.device),
            slots_T=whole.slots_T[start:stop],
            max_query=stop - start,
            max_context=stop,
        )
        got = ours.paged_attention(q[start:stop], 0.1, kv, 0, alone)
        wrong += float((got != together[start:stop]).float().mean())
    return wrong / len(pieces)


def bits_of_layer(at: Where) -> float:
    """Share of a decode's elements that change when other sequences join the batch."""
    ours = at.ops()
    layer = shapes.layer(ours, at.sizes, at.dtype, at.device)
    sequences = [(12 + i, 1) for i in range(5 if at.tiny else 96)]
    kv = shapes.cache(ours, at.sizes, sequences, at.dtype, at.device)
    run = ours.decoder([layer], kv, None)
    whole = shapes.batch(sequences, at.sizes.head_dim, at.device)
    x = at.randn(len(sequences), at.sizes.hidden)
    together = run(x.clone(), whole)
    wrong = 0.0
    for s in (0, len(sequences) - 1):
        alone = replace(
            whole,
            positions_T=whole.positions_T[s : s + 1],
            query_start_S1=whole.query_start_S1[:2],
            context_S=whole.context_S[s : s + 1],
            block_table_SB=whole.block_table_SB[s : s + 1],
            slots_T=whole.slots_T[s : s + 1],
            cos_TD=whole.cos_TD[s : s + 1],
            sin_TD=whole.sin_TD[s : s + 1],
        )
        wrong += float((run(x[s : s + 1].clone(), alone) != together[s : s + 1]).float().mean())
    return wrong / 2


Check = Callable[[Where], float]

NEAR: dict[str, Check] = {
    "rms_norm": norm,
    "silu_mul": silu,
    "rope_write_kv": rope,
    "attention": attention(None),
    "attention, chunk-local": attention(None, AttentionMaskSpec(chunk_size=8)),
    "attention, window": attention(None, AttentionMaskSpec(window=37)),
    "attention, window and sinks": attention(None, AttentionMaskSpec(window=37, sinks=5)),
    "attention, int8 cache": attention(torch.int8),
    "attention, fp8 cache": attention(torch.float8_e4m3fn),
    "attention, fast": attention(None, independent=False),
    "attention, fast, int8 cache": attention(torch.int8, independent=False),
    "attention, fast, fp8 cache": attention(torch.float8_e4m3fn, independent=False),
    **{
        f"product, {kind}": product(kind)
        for kind in ("dense", "int8", "fp8", "int4", "int4_symmetric")
    },
    "product, split": split_product,
    "experts": experts,
    "embedding": embedding,
}
"""Checks of an error against a limit of a few roundings."""
SAME: dict[str, Check] = {
    "sampled tokens": sampling,
    "bits, decode and prefill": bits_of_attention,
    "bits, alone and in a batch": bits_of_layer,
}
"""Checks of a share that must be 0."""
