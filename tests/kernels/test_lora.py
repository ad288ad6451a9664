"""Adapters of products, against float64 and against weights with the adapters merged."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from arriero.kernels import adapted
from arriero.kernels.lora import (
    NO_ADAPTER,
    AdapterRows,
    LayerLora,
    LoraBank,
    make_bank,
    make_embedding_lora,
)
from arriero.kernels.ops import Ops
from arriero.kernels.sizes import embedding_lora_nbytes, lora_bank_nbytes

from . import paged, test_blocks
from .conftest import backend

CPU = torch.device("cpu")
RANKS = (5, 0, 8, 1)
"""Rank of the adapter in each slot; slot 1 leaves the product as it is."""


def bank(
    ins: int, outs: int, *, first: int = 0, seed: int = 0, dtype: torch.dtype = torch.float32
) -> LoraBank:
    """A bank with random adapters of `RANKS`; what lies beyond a rank is not a number."""
    made = make_bank(len(RANKS), max(RANKS), ins, outs, first=first, dtype=dtype, device=CPU)
    generator = torch.Generator().manual_seed(seed)
    for slot, rank in enumerate(RANKS):
        made.a_GRI[slot, rank:] = torch.nan
        made.b_GRO[slot, rank:] = torch.nan
        if rank:
            a_RI = torch.randn(rank, ins, generator=generator) / ins**0.5
            made.write(slot, a_RI, torch.randn(rank, outs, generator=generator))
    return made


def delta(of: LoraBank, slot: int) -> torch.Tensor:
    """The change of the weight [O, I] that a slot's adapter makes, in float64."""
    rank = int(of.rank_G[slot])
    a_RI = of.a_GRI[slot, :rank, : of.in_features].double()
    return of.b_GRO[slot, :rank, : of.out_features].double().T @ a_RI


def rows_of(*slots: int) -> AdapterRows:
    rows = AdapterRows.of(np.array(slots, dtype=np.int32))
    assert rows is not None
    return rows


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("ins", "outs"), [(72, 100), (16, 16), (7, 300), (129, 5)])
def test_products_are_added_to_the_rows_of_each_slot(
    ops: Ops, ins: int, outs: int, weights: torch.dtype
) -> None:
    slots = (2, NO_ADAPTER, 0, 2, 3, 1, 0, NO_ADAPTER, 2)
    x = torch.randn(len(slots), ins, generator=torch.Generator().manual_seed(1))
    banks = [
        bank(ins, outs, first=3, seed=1, dtype=weights),
        bank(ins, 9, first=outs + 3, seed=2, dtype=weights),
    ]
    y = torch.randn(len(slots), outs + 20, generator=torch.Generator().manual_seed(2))
    wanted = y.double()
    for row, slot in enumerate(slots):
        if slot != NO_ADAPTER:
            for of in banks:
                columns = slice(of.first, of.first + of.out_features)
                wanted[row, columns] += delta(of, slot) @ x[row].double()
    before = y.clone()
    ops.add_lora(y, x, banks, rows_of(*slots))
    torch.testing.assert_close(y.double(), wanted, rtol=1e-5, atol=2e-5)
    for row, slot in enumerate(slots):
        if slot in (NO_ADAPTER, 1):
            assert torch.equal(y[row], before[row]), "a row without an adapter has changed"


def test_a_rows_bits_do_not_depend_on_the_other_rows(ops_by_threads: tuple[Ops, Ops]) -> None:
    slots = (0, 2, 0, 3, 0, 0, 2, NO_ADAPTER, 0)
    x = torch.randn(len(slots), 72, generator=torch.Generator().manual_seed(1))
    of = bank(72, 700)
    alone = torch.zeros(len(slots), 700)
    for ops in ops_by_threads:
        together = torch.zeros(len(slots), 700)
        ops.add_lora(together, x, [of], rows_of(*slots))
        for row, slot in enumerate(slots):
            if slot == NO_ADAPTER:
                continue
            y = torch.zeros(1, 700)
            ops.add_lora(y, x[row : row + 1], [of], rows_of(slot))
            alone[row] = y[0]
        assert torch.equal(together, alone)


def test_a_layers_rows_do_not_depend_on_their_company(ops_by_threads: tuple[Ops, Ops]) -> None:
    """Rows of several blocks of a product, of tiles of 1 to 4 rows of an adapter, and alone."""
    slots = np.array([0] * 97 + [2, 3, NO_ADAPTER, 2, 1, 3, 0, 2, 3, NO_ADAPTER, 0], np.int32)
    x = torch.randn(len(slots), test_blocks.HIDDEN, generator=torch.Generator().manual_seed(1))
    w, banks = test_blocks.weights(torch.float32, 1), lora(0)
    results = []
    for ops in ops_by_threads:
        layer = replace(test_blocks.pack(ops, w, torch.float32), lora=banks)
        together = ops.mlp_block(x, layer, AdapterRows.of(slots))
        for row in (0, 50, 96, *range(97, len(slots))):
            alone = ops.mlp_block(x[row : row + 1], layer, AdapterRows.of(slots[row : row + 1]))
            assert torch.equal(alone[0], together[row]), row
        results.append(together)
    assert torch.equal(*results)


def rows_out_of_order() -> AdapterRows:
    """Rows of one slot, the later row first."""
    return replace(rows_of(0, 0), order_X=np.array([1, 0], np.int32))


def test_wrong_rows_are_refused() -> None:
    ops = backend("cpu")
    x, y, of = torch.zeros(2, 72), torch.zeros(2, 100), bank(72, 100)
    good = rows_of(0, 2)
    for wrong, field in (
        (replace(good, order_X=np.array([0, 2], np.int32)), "order"),
        (replace(good, runs_N3=np.array([[4, 0, 1]], np.int32)), "slot"),
        (replace(good, runs_N3=np.array([[0, 0, 3]], np.int32)), "stop"),
        (rows_out_of_order(), "order"),
    ):
        with pytest.raises(ValueError, match=field):
            ops.add_lora(y, x, [of], wrong)
    with pytest.raises(ValueError, match="first"):
        ops.add_lora(y, x, [bank(72, 100, first=1)], good)


def lora(seed: int) -> LayerLora:
    """Adapters of all products of a layer of `test_blocks`."""
    q = paged_width("q")
    kv = paged_width("kv")
    hidden, mlp = test_blocks.HIDDEN, test_blocks.MLP
    banks = {
        "qkv": [
            bank(hidden, q, seed=seed),
            bank(hidden, kv, first=q, seed=seed + 1),
            bank(hidden, kv, first=q + kv, seed=seed + 2),
        ],
        "o": [bank(q, hidden, seed=seed + 3)],
        "gate_up": [
            bank(hidden, mlp, seed=seed + 4),
            bank(hidden, mlp, first=mlp, seed=seed + 5),
        ],
        "down": [bank(mlp, hidden, seed=seed + 6)],
    }
    return LayerLora(banks=banks)


def paged_width(of: str) -> int:
    heads = test_blocks.CASE.q_heads if of == "q" else test_blocks.CASE.kv_heads
    return heads * test_blocks.CASE.head_dim


def merged(w: test_blocks.Weights, of: LayerLora, slot: int) -> test_blocks.Weights:
    """The weights with an adapter merged."""
    names = {"q": 0, "k": 1, "v": 2}
    changes = {
        **{name: delta(of.of("qkv")[at], slot) for name, at in names.items()},
        "o": delta(of.of("o")[0], slot),
        "gate": delta(of.of("gate_up")[0], slot),
        "up": delta(of.of("gate_up")[1], slot),
        "down": delta(of.of("down")[0], slot),
    }
    return replace(w, **{name: getattr(w, name) + d.numpy() for name, d in changes.items()})


def test_a_decoder_with_adapters_computes_what_merged_weights_do(ops: Ops) -> None:
    """Three sequences: two adapters and the base model, in one batch; and each by itself."""
    dtype = torch.float32
    slots = (2, NO_ADAPTER, 0)
    w = [test_blocks.weights(dtype, seed) for seed in (1, 2)]
    layers = [
        replace(test_blocks.pack(ops, one, dtype), lora=lora(10 * i)) for i, one in enumerate(w)
    ]
    x, batch, _ = test_blocks.start(ops, dtype)
    counts = batch.query_start_S1.diff().tolist()
    kv = paged.poisoned_cache(ops, paged.spec(test_blocks.CASE, dtype))
    decoder = ops.decoder(layers, kv, None)
    base = decoder(x.clone(), batch)
    token_slots = np.repeat(np.array(slots, np.int32), counts)
    mixed = decoder(x.clone(), replace(batch, adapters=AdapterRows.of(token_slots)))
    starts = batch.query_start_S1.tolist()
    for s, slot in enumerate(slots):
        own = slice(starts[s], starts[s + 1])
        if slot == NO_ADAPTER:
            torch.testing.assert_close(mixed[own], base[own], rtol=1e-5, atol=1e-5)
            if ops.name == "cpu":
                assert torch.equal(mixed[own], base[own]), "the company changed a base row's bits"
            continue
        layers_of_slot = [
            test_blocks.pack(ops, merged(one, lora(10 * i), slot), dtype) for i, one in enumerate(w)
        ]
        cache = paged.poisoned_cache(ops, paged.spec(test_blocks.CASE, dtype))
        wanted = ops.decoder(layers_of_slot, cache, None)(x.clone(), batch)
        torch.testing.assert_close(mixed[own], wanted[own], rtol=2e-4, atol=2e-4)
        assert (mixed[own] - base[own]).abs().max() > 0.01


def test_bytes_of_a_bank_are_as_planned() -> None:
    for ins, outs, dtype in ((72, 100, torch.float32), (7, 300, torch.bfloat16)):
        made = make_bank(3, 8, ins, outs, dtype=dtype, device=CPU)
        assert made.nbytes == lora_bank_nbytes(3, 8, ins, outs, dtype.itemsize)
    made.write(1, torch.ones(2, 7), torch.ones(2, 300))
    made.clear(1)
    assert not made.rank_G.any()


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_embedding_and_head_are_those_of_changed_tables(ops: Ops, weights: torch.dtype) -> None:
    """In two parts of the vocabulary, whose sums are the embeddings; each row as if alone."""
    vocab, hidden, cuts = 50, 24, (range(32), range(32, 50))
    generator = torch.Generator().manual_seed(1)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    table_VH = numbers(vocab, hidden)
    changes = {
        slot: (numbers(rank, vocab), numbers(rank, hidden)) for slot, rank in ((0, 5), (2, 8))
    }
    tokens = torch.tensor([0, 31, 32, 49, 7, 40, 31], dtype=torch.int32)
    slots = (0, 2, 0, 2, NO_ADAPTER, 1, NO_ADAPTER)
    rows, total = rows_of(*slots), torch.zeros(len(slots), hidden)
    for cut in cuts:
        lora = make_embedding_lora(3, 8, cut, hidden, dtype=weights, device=CPU)
        assert lora.nbytes == embedding_lora_nbytes(3, 8, len(cut), hidden, weights.itemsize)
        lora.write(0, torch.full((len(cut), 8), 1e38), torch.ones(8, hidden))  # replaced below
        for slot, (a_RV, b_RH) in changes.items():
            lora.write(slot, a_RV[:, cut.start : cut.stop].T, b_RH)
        lora.write(1, a_RV[:, cut.start : cut.stop].T, b_RH)
        lora.clear(1)
        packed = ops.pack_vocab(table_VH[cut.start : cut.stop], cut.start, torch.float32)
        part = adapted.embed(ops, tokens, packed, lora, rows)
        plain = adapted.embed(ops, tokens, packed, lora, None)
        for row, slot in enumerate(slots):
            alone = adapted.embed(
                ops, tokens[row : row + 1], packed, lora, AdapterRows.of(np.array([slot], np.int32))
            )
            assert torch.equal(alone[0], part[row])
            if slot in (NO_ADAPTER, 1):
                assert torch.equal(part[row], plain[row])
        total += part
    for row, slot in enumerate(slots):
        wanted = table_VH[tokens[row]].double()
        if slot in changes:
            a_RV, b_RH = (matrix.to(weights).double() for matrix in changes[slot])
            wanted = wanted + a_RV[:, tokens[row]] @ b_RH
        torch.testing.assert_close(total[row].double(), wanted, rtol=1e-5, atol=1e-4)

    x, norm = numbers(3, hidden), 1 + numbers(hidden) / 10
    head = ops.pack_vocab(table_VH, 0, torch.float32)
    of = bank(hidden, vocab, seed=3, dtype=weights)
    got = adapted.logits(ops, x, norm, 1e-6, head, (of,), rows_of(2, NO_ADAPTER, 0))
    plain = ops.logits(x, norm, 1e-6, head)
    normed = ops.rms_norm(x, norm, 1e-6).double()
    for row, slot in ((0, 2), (2, 0)):
        wanted = plain[row].double() + delta(of, slot) @ normed[row]
        torch.testing.assert_close(got[row].double(), wanted, rtol=1e-4, atol=1e-4)
    assert torch.equal(got[1], plain[1])
