"""Routing, ordering and the routed experts, one token at a time in float64."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from arriero.kernels.attention_mask import AttentionMaskSpec
from arriero.kernels.layers import AttentionStyle, DenseLayer, MoELayer
from arriero.kernels.moe import Routing
from arriero.kernels.ops import Ops
from arriero.kernels.packed_weights import Linear
from arriero.kernels.quantize import quantize_int4

from . import paged, tolerance
from .paged import Case
from .tolerance import Array

HIDDEN, MLP, EXPERTS = 72, 40, 6


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rounded(weight: torch.Tensor, dtype: torch.dtype) -> Array:
    exact: Array = weight.to(dtype).double().numpy()
    return exact


@pytest.mark.parametrize("top_k", [1, 2, EXPERTS])
def test_route(ops: Ops, top_k: int) -> None:
    # Small whole numbers over 8: sums are exact in any order, so equal logits are equal bits.
    x, router = randn(23, HIDDEN).round(), randn(EXPERTS, HIDDEN, seed=1).round() / 8
    router[4] = router[2]
    got = ops.moe_route(x, ops.pack_linear([router], None, torch.float32), top_k)
    x64, w64 = x.double().numpy(), router.double().numpy()
    logits = x64 @ w64.T
    order = np.argsort(-logits, axis=-1, kind="stable")[:, :top_k]
    assert got.experts_TA.dtype == torch.int32
    assert got.experts_TA.tolist() == order.tolist()
    chosen = np.take_along_axis(logits, order, -1)
    expected = 1 / (1 + np.exp(-chosen))
    tolerance.check(got.scores_TA, expected, 8 * tolerance.U32 * expected)


@pytest.mark.parametrize(("first", "count"), [(0, 6), (2, 3), (5, 1), (0, 1)])
def test_permute_and_combine(ops: Ops, first: int, count: int) -> None:
    generator = torch.Generator().manual_seed(2)
    experts = torch.stack([torch.randperm(EXPERTS, generator=generator)[:2] for _ in range(17)])
    scores = torch.rand(17, 2, generator=generator)
    routing = Routing(experts_TA=experts.int(), scores_TA=scores)
    order = ops.moe_permute(routing, first, count)
    rows = [
        (expert, token, float(scores[token, a]), a)
        for token, choices in enumerate(experts.tolist())
        for a, expert in enumerate(choices)
        if first <= expert < first + count
    ]
    rows.sort(key=lambda row: row[:2])
    assert order.token_X.tolist() == [row[1] for row in rows]
    assert order.score_X.tolist() == [row[2] for row in rows]
    starts = [sum(row[0] < first + e for row in rows) for e in range(count + 1)]
    assert order.starts_E1.tolist() == starts
    expected_rows = torch.full((17, 2), -1, dtype=torch.int32)
    for i, (_, token, _, a) in enumerate(rows):
        expected_rows[token, a] = i
    assert torch.equal(order.row_TA, expected_rows)

    y = randn(len(rows), 5, seed=3)
    expected = np.zeros((17, 5))
    for i, (_, token, _, _) in enumerate(rows):
        expected[token] += y[i].double().numpy()
    tolerance.check(ops.moe_combine(y, order), expected, 4 * tolerance.U32 * 8)


def test_grouped_linear(ops: Ops, dtype: torch.dtype) -> None:
    """Experts with no row, with one, with many."""
    weights = [randn(33, 48, seed=e) for e in range(5)]
    experts = [ops.pack_linear([w], None, dtype) for w in weights]
    starts = [0, 0, 1, 20, 20, 27]
    x = randn(27, 48, seed=9)
    got = ops.grouped_linear(x, experts, torch.tensor(starts, dtype=torch.int32))
    x64 = x.double().numpy()
    for e, w in enumerate(weights):
        own = slice(starts[e], starts[e + 1])
        w64 = rounded(w, dtype)
        tolerance.check(got[own], x64[own] @ w64.T, tolerance.product(x64[own], w64, dtype))
    none = ops.grouped_linear(x[:0], experts, torch.zeros(6, dtype=torch.int32))
    assert none.shape == (0, 33)


class Experts:
    """Random weights of one layer: in float64 as rounded to a dtype, and packed."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.norm = 1 + 0.1 * randn(HIDDEN, seed=1)
        self.router = randn(EXPERTS, HIDDEN, seed=2) / HIDDEN**0.5
        self.gate_up = [randn(2 * MLP, HIDDEN, seed=10 + e) / HIDDEN**0.5 for e in range(7)]
        self.down = [randn(HIDDEN, MLP, seed=20 + e) / MLP**0.5 for e in range(7)]

    def layer(self, ops: Ops, first: int = 0, count: int = EXPERTS, top_k: int = 1) -> MoELayer:
        """The shared expert is the seventh."""
        empty = ops.pack_linear([torch.zeros(1, 1)], None, torch.float32)

        def pack(weight: torch.Tensor) -> Linear:
            return ops.pack_linear([weight], None, self.dtype)

        held = range(first, first + count)
        return MoELayer(
            attn_norm_H=torch.ones(1),
            qkv=empty,
            o=empty,
            mlp_norm_H=self.norm,
            gate_up=pack(self.gate_up[6]),
            down=pack(self.down[6]),
            num_q_heads=1,
            num_kv_heads=1,
            head_dim=1,
            softmax_scale=1.0,
            eps=1e-5,
            router=ops.pack_linear([self.router], None, torch.float32),
            experts_gate_up=[pack(self.gate_up[e]) for e in held],
            experts_down=[pack(self.down[e]) for e in held],
            first_expert=first,
            top_k=top_k,
        )

    def mlp(self, h: Array, e: int) -> Array:
        gate, up = np.split(h @ rounded(self.gate_up[e], self.dtype).T, 2, axis=-1)
        out: Array = (gate / (1 + np.exp(-gate)) * up) @ rounded(self.down[e], self.dtype).T
        return out

    def expected(self, x: torch.Tensor, held: range, top_k: int) -> Array:
        x64 = x.double().numpy()
        h = x64 / np.sqrt((x64**2).mean(-1, keepdims=True) + 1e-5) * self.norm.double().numpy()
        logits = h @ self.router.double().numpy().T
        out = self.mlp(h, 6)
        for t in range(len(h)):
            for e in np.argsort(-logits[t])[:top_k]:
                if e in held:
                    score = 1 / (1 + np.exp(-logits[t, e]))
                    out[t] += self.mlp(score * h[t : t + 1], int(e))[0]
        return out


def budget(dtype: torch.dtype, expected: Array) -> float:
    """Three products in a row, as in test_blocks."""
    unit = tolerance.UNIT[dtype] + 8 * tolerance.U32
    return float(tolerance.SIGMAS * 3 * unit * np.abs(expected).max())


@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize(("first", "count"), [(0, EXPERTS), (2, 2)])
def test_moe_block(ops: Ops, dtype: torch.dtype, first: int, count: int, top_k: int) -> None:
    experts = Experts(dtype)
    x = randn(29, HIDDEN, seed=4) * 3
    before = x.clone()
    got = ops.moe_block(x, experts.layer(ops, first, count, top_k))
    expected = experts.expected(x, range(first, first + count), top_k)
    assert torch.equal(x, before)
    tolerance.check(got, expected, budget(dtype, expected))


def test_rows_do_not_depend_on_their_neighbours(ops: Ops, dtype: torch.dtype) -> None:
    layer = Experts(dtype).layer(ops, top_k=2)
    x = randn(31, HIDDEN, seed=4)
    whole = ops.moe_block(x, layer)
    alone = [1] * 5 + [26] if ops.name == "triton" else [1] * 31  # interpreted, a call is slow
    for cuts in (alone, [4, 20, 7]):
        again = torch.cat([ops.moe_block(part, layer) for part in x.split(cuts)])
        if ops.name == "reference":
            limit = 1e-4 if dtype == torch.float32 else 0.05
            torch.testing.assert_close(again, whole, rtol=limit, atol=limit)
        else:
            assert torch.equal(again, whole)


def test_decoder_takes_expert_layers(ops: Ops) -> None:
    case = Case(6, 2, 12, [(0, 7), (0, 2)])
    experts = Experts(torch.float32)
    base = experts.layer(ops)
    blocks = paged.tables(case, paged.spec(case, torch.float32).num_blocks)
    batch = paged.batch(case.sequences, blocks, case.head_dim)
    layer = MoELayer(
        **{name: getattr(base, name) for name in base.__dataclass_fields__}
        | {
            "attn_norm_H": torch.ones(HIDDEN),
            "qkv": ops.pack_linear([randn(120, HIDDEN) / 8], None, torch.float32),
            "o": ops.pack_linear([randn(HIDDEN, 72, seed=1) / 8], None, torch.float32),
            "num_q_heads": 6,
            "num_kv_heads": 2,
            "head_dim": 12,
        }
    )
    x = randn(9, HIDDEN, seed=5)
    expected = x.clone()
    for i in range(2):
        kv = paged.poisoned_cache(ops, paged.spec(case, torch.float32))
        expected += ops.attention_block(expected, layer, kv, i, batch)
        expected += ops.moe_block(expected, layer)
    kv = paged.poisoned_cache(ops, paged.spec(case, torch.float32))
    got = ops.decoder([layer, layer], kv, None)(x.clone(), batch)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def wide_layer(
    ops: Ops, dtype: torch.dtype, *, style: AttentionStyle, mlp: int = 64, seed: int = 0
) -> MoELayer:
    """Hidden 96, 5 experts, 3 heads of 32; of an expert's columns whole panels, or not."""

    def pack(rows: int, columns: int, *, own: int, of: torch.dtype = dtype) -> Linear:
        return ops.pack_linear([randn(rows, columns, seed=seed + own) / columns**0.5], None, of)

    return MoELayer(
        attn_norm_H=torch.ones(96),
        qkv=pack(160, 96, own=1),
        o=pack(96, 96, own=2),
        mlp_norm_H=1 + 0.1 * randn(96, seed=seed + 3),
        gate_up=pack(2 * mlp, 96, own=4),
        down=pack(96, mlp, own=5),
        num_q_heads=3,
        num_kv_heads=1,
        head_dim=32,
        softmax_scale=0.2,
        eps=1e-5,
        style=style,
        router=pack(5, 96, own=6, of=torch.float32),
        experts_gate_up=[pack(2 * mlp, 96, own=10 + e) for e in range(5)],
        experts_down=[pack(96, mlp, own=20 + e) for e in range(5)],
        first_expert=0,
        top_k=2,
    )


@pytest.mark.parametrize("mlp", [64, 40])
def test_blocks_do_not_depend_on_threads(
    ops_by_threads: tuple[Ops, Ops], dtype: torch.dtype, mlp: int
) -> None:
    """From one row, where a thread norms its own, to more than a block of rows an expert."""
    x = randn(400, 96, seed=7)
    results = []
    for ops in ops_by_threads:
        layer = wide_layer(ops, dtype, style=AttentionStyle(), mlp=mlp)
        results.append([ops.moe_block(x[:n], layer) for n in (1, 8, 9, 33, 400)])
        for part in results[-1]:
            assert torch.equal(part, results[-1][-1][: len(part)])
    for one, several in zip(*results, strict=True):
        assert torch.equal(one, several)


def test_one_call_for_all_layers_is_block_by_block(
    ops_by_threads: tuple[Ops, Ops], dtype: torch.dtype
) -> None:
    """Layers with and without a cache of their own, with and without experts."""
    case = Case(3, 1, 32, [(0, 30), (9, 1), (0, 2), (40, 1)])
    whole = paged.spec(case, dtype)
    local = AttentionStyle(rope="pairs", mask=AttentionMaskSpec(chunk_size=8))
    styles = [local, AttentionStyle(rope="none")] * 2
    for ops in ops_by_threads:
        layers: list[DenseLayer] = [
            wide_layer(ops, dtype, style=style, seed=40 * i) for i, style in enumerate(styles)
        ]
        dense = {name: getattr(layers[1], name) for name in DenseLayer.__dataclass_fields__}
        layers[1] = DenseLayer(**dense)
        batch = paged.batch(case.sequences, paged.tables(case, whole.num_blocks), case.head_dim)
        local = paged.batch(case.sequences, paged.tables(case, whole.num_blocks, 5), case.head_dim)
        batch = replace(batch, local=local)
        outcomes = []
        for experts in (None, ops.moe_block):
            caches = [ops.kv_cache(whole, torch.device("cpu")) for _ in range(2)]
            run = ops.decoder(layers, caches[0], None, local_kv=caches[1], experts=experts)
            outcomes.append(run(randn(34, 96, seed=3), batch))
        assert torch.equal(*outcomes)


def test_quantized_experts(ops: Ops) -> None:
    weights = [quantize_int4(randn(24, 64, seed=e), 32) for e in range(3)]
    try:
        experts = [ops.pack_quantized([w], None) for w in weights]
    except NotImplementedError as error:
        pytest.skip(str(error))
    x = randn(8, 64, seed=7)
    got = ops.grouped_linear(x, experts, torch.tensor([0, 3, 3, 8], dtype=torch.int32))
    assert torch.equal(got[:3], ops.linear(x[:3], experts[0]))
    assert torch.equal(got[3:], ops.linear(x[3:], experts[2]))
