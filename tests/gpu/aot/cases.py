"""What is compiled: the launchers of the backend over tensors without memory, in production shapes.

Attention has groups of 4, 5 and 16 query heads and heads of 64 and 128; products have every kind of
weights; sampling has both vocabularies. To be imported once the driver is in place. Knows shapes;
knows nothing of compilers. Shape legend: kernels/ops.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from gpu.aot.absent_gpu import META
from gpu.aot.limits import FAST
from torch import Tensor

from arriero.kernels.attention_mask import AttentionMaskSpec
from arriero.kernels.flat_batch import FlatBatch
from arriero.kernels.kv_cache import KVCacheSpec
from arriero.kernels.layers import AttentionStyle, DenseLayer
from arriero.kernels.lora import AdapterRows, LoraBank
from arriero.kernels.packed_weights import Vocab
from arriero.kernels.rounded_rows import Rounding
from arriero.kernels.sampling_rows import SamplingRows
from arriero.kernels.sizes import num_mask_words
from arriero.kernels.symmetric_memory import PROGRAMS, SymmetricMemory
from arriero.kernels.triton import (
    embedding,
    experts,
    float4,
    float8,
    lora,
    matmul,
    norm,
    sampling,
    symmetric_sums,
)
from arriero.kernels.triton.activation import silu_mul_rounded
from arriero.kernels.triton.backend import TritonOps
from arriero.kernels.triton.expert_weights import ExpertWeights
from arriero.kernels.triton.four_bit_sizes import four_bit_form
from arriero.kernels.triton.weights import Packed

BF16, F32, I32, I64 = torch.bfloat16, torch.float32, torch.int32, torch.int64
INT8, FP8 = torch.int8, torch.float8_e4m3fn
MAX_CONTEXT = 8192
ROWS = (1, 37, 64, 2048)
"""Rows of products: a decode of one sequence, odd and even batches, a prefill."""
PLAIN_STYLE = AttentionStyle()
OPS = TritonOps(META, batch_independent=False)
ARRIVALS = matmul.make_arrivals(META)
EXACT_OPS = TritonOps(META, batch_independent=True)


def empty(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    """A tensor without memory."""
    return torch.empty(*shape, dtype=dtype, device=META)


def packed(kind: str, out: int, inputs: int, group: int = 128, zeros: bool = False) -> Packed:
    """Weights [out, inputs] of any kind."""
    if kind in ("int4", "fp4"):
        form = four_bit_form(inputs, group)
        # scales in 16 bits, as checkpoints with groups of 128 and weights quantized on load have
        scales = empty(inputs // group, out, dtype=torch.float16 if kind == "int4" else F32)
        return Packed(
            kind="int4" if kind == "int4" else "fp4",
            data=empty(*form.data_shape(out), dtype=torch.int16),
            in_features=inputs,
            scales=scales,
            zeros=scales if zeros else None,
            group_size=group,
            form=form,
        )
    if kind == "dense":
        return Packed(kind="dense", data=empty(out, inputs), in_features=inputs)
    assert kind in ("int8", "fp8"), kind
    return Packed(
        kind="int8" if kind == "int8" else "fp8",
        data=empty(out, inputs, dtype=INT8 if kind == "int8" else FP8),
        in_features=inputs,
        scales=empty(out, 1, dtype=F32),
        group_size=inputs,
    )


def attention(
    heads: int,
    kv_heads: int,
    dim: int,
    kv_dtype: torch.dtype,
    style: AttentionStyle = PLAIN_STYLE,
    head_norms: bool = False,
    sizes: tuple[tuple[int, int], ...] = ((64, 1), (5, 7), (1, 2048)),
    ops: TritonOps = EXACT_OPS,
) -> None:
    """Rope with the write to the cache, prefill, decode splits and their folds.

    With `head_norms` each head of q and k has a norm with weights. `sizes` are batches: sequences,
    and new tokens of each; programs share the tiles of few tokens.
    """
    spec = KVCacheSpec(
        num_layers=1,
        num_blocks=1024,
        num_kv_heads=kv_heads,
        head_dim=dim,
        block_size=16,
        dtype=kv_dtype,
    )
    kv = ops.kv_cache(spec, META)
    names = ("attn_norm_H", "qkv", "o", "mlp_norm_H", "gate_up", "down")
    layer = DenseLayer(
        **dict.fromkeys(names),
        num_q_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=dim,
        softmax_scale=0.1,
        eps=1e-5,
        style=style,
        q_norm_D=empty(dim, dtype=F32) if head_norms else None,
        k_norm_D=empty(dim, dtype=F32) if head_norms else None,
    )
    for sequences, each in sizes:
        tokens, ints = sequences * each, partial(empty, dtype=I32)
        angles = empty(tokens, dim // 2, dtype=F32)
        batch = FlatBatch(
            positions_T=ints(tokens),
            query_start_S1=ints(sequences + 1),
            context_S=ints(sequences),
            block_table_SB=ints(sequences, MAX_CONTEXT // 16),
            slots_T=ints(tokens),
            cos_TD=angles,
            sin_TD=angles,
            max_query=each,
            max_context=MAX_CONTEXT,
        )
        q = ops.rope_write_kv(empty(tokens, (heads + 2 * kv_heads) * dim), layer, kv, 0, batch)
        ops.paged_attention(q, 0.1, kv, 0, batch, style.mask)


def products(w: Packed, dtype: torch.dtype = BF16, independent: bool = False) -> None:
    """A product with few and with many rows."""
    for rows in ROWS:
        x = empty(rows, w.in_features, dtype=dtype)
        matmul.matmul(x, w, arrivals=ARRIVALS, batch_independent=independent)


def grouped(kind: str, dtype: torch.dtype = BF16, **more: Any) -> None:  # noqa: ANN401
    """The products of 16 experts, with the gather of rows and without."""
    for gathers, out, inputs in ((True, 16384, 5120), (False, 5120, 8192)):
        table = ExpertWeights([packed(kind, out, inputs, **more)] * 16)
        for name in ("data", "scales", "zeros"):  # tensors without memory lie at address 0
            has = getattr(table.first, name) is not None
            setattr(table, name, empty(16, dtype=I64) if has else None)
        for rows in (1, 256, 8192):
            order = {}
            if gathers and dtype == BF16:
                order = {"tokens_X": empty(rows, dtype=I32), "scores_X": empty(rows, dtype=F32)}
            matmul.grouped_matmul(
                empty(rows, inputs, dtype=dtype),
                table,
                empty(17, dtype=I32),
                rows,
                batch_independent=False,
                **order,
            )


def by_row(hidden: int, mlp: int) -> None:
    """Norms, embedding, activation, and rows rounded to float8."""
    for kind in ("dense", "int8", "int4"):
        table = Vocab(
            first_row=0,
            num_rows=16032,
            hidden_size=hidden,
            packed=packed(kind, 16032, hidden),
            nbytes=0,
        )
        embedding.embed(empty(37, dtype=I32), table)
    for rows in (1, 37, 256):
        x, weight = empty(rows, hidden), empty(hidden, dtype=F32)
        norm.rms_norm(x, weight, 1e-5)
        norm.add_rms_norm(x, empty(rows, hidden), weight, 1e-5)
        OPS.silu_mul(empty(rows, 2 * mlp))
        OPS.add_parts(empty(8, rows, hidden))
        for width, bound in ((hidden, 1200.0), (mlp, 1200.0), (hidden, math.inf)):
            float8.quantize_rows(empty(rows, width), bound)


def to_fp4(*widths: int) -> None:
    """Rows rounded to NVFP4, with scales in tiles."""
    for width in widths:
        for rows in (1, 37, 256):
            float4.fp4_rows(empty(rows, width), empty(1, dtype=F32))


def ranks_memory(ranks: int) -> SymmetricMemory:
    """Memory that ranks share."""
    return SymmetricMemory(
        address_N=empty(ranks, dtype=I64),
        epoch_P=empty(PROGRAMS, dtype=I64),
        rank=0,
        size=ranks,
        buffer_nbytes=16 << 20,
    )


def sums_of_ranks(hidden: int, ranks: int) -> None:
    """Sums over memory that ranks share, and the norm alone, whose bits the fused norm has."""
    memory = ranks_memory(ranks)
    rows, weight = 37, empty(hidden, dtype=F32)
    norm.add_rms_norm(empty(rows, hidden), empty(rows, hidden), weight, 1e-5)
    for divides in (False, True):
        part, x = empty(rows, hidden), empty(rows, hidden)
        symmetric_sums.add_rms_norm(memory, part, x, weight, 1e-5, divides=divides)
        symmetric_sums.reduce(memory, part, divides=divides)


FLOAT8_CAPABILITY = (8, 9)


def roundings(*, keeps_rows: bool = False) -> list[Rounding]:
    """All ways to round rows to float8; none for a GPU that has no float8 products."""
    if torch.cuda.get_device_capability(META) < FLOAT8_CAPABILITY:
        return []
    scale = empty(1, dtype=F32)
    return [
        Rounding(keeps_rows=keeps_rows),
        Rounding(bound=1200.0, keeps_rows=keeps_rows),
        Rounding(scale=scale, keeps_rows=keeps_rows),
    ]


def rounded_rows(hidden: int, mlp: int, ranks: int, dtype: torch.dtype = BF16) -> None:
    """Norms, sums of ranks and SwiGLU that write float8 rows; and a norm that does not.

    The sum of a row must have the same order in all of them.
    """
    weight, memory = empty(hidden, dtype=F32), ranks_memory(ranks)
    rows = partial(empty, 37, dtype=dtype)
    norm.rms_norm(rows(hidden), weight, 1e-5)
    for rounding in roundings():
        silu_mul_rounded(rows(2 * mlp), rounding)
        silu_mul_rounded(rows(2 * mlp), rounding, empty(17, dtype=I32))
    for rounding in roundings()[:1]:
        norm.norm_rows(rows(hidden), None, weight, 1e-5, rounding)
    for rounding in (*roundings(), *roundings(keeps_rows=True)[:1]):
        norm.norm_rows(rows(hidden), rows(hidden), weight, 1e-5, rounding)
        for divides in (False, True):
            operands = rows(hidden), rows(hidden), weight, 1e-5
            symmetric_sums.add_rms_norm(memory, *operands, divides=divides, rounding=rounding)


def routed(num_experts: int, local: int) -> None:
    """Routing, the order of rows, their sum, and rows as they travel between ranks."""
    for tokens in (1, 64, 2048):
        routing = experts.route(empty(tokens, num_experts, dtype=F32), 1)
        order = experts.permute(routing, 0, local)
        experts.combine(empty(tokens, 5120), order.row_TA, empty(tokens, 5120))
        order_X = {"tokens_X": order.token_X, "scores_X": order.score_X}
        for bound in (1200.0, math.inf):
            x, down = empty(tokens, 5120), empty(tokens, 8192)
            float8.quantize_expert_rows(x, bound, order.starts_E1, tokens, **order_X)
            float8.quantize_expert_rows(down, bound, order.starts_E1, tokens)
        for format in ("bfloat16", "fp8"):
            sent = OPS.pack_rows(empty(tokens, 5120), order.token_X, order.score_X, format)
            OPS.unpack_rows(sent, order.token_X, 5120, format, BF16)


def adapted(hidden: int, outs: int, max_rank: int) -> None:
    """Adapters of a product."""
    slots = 8
    bank = LoraBank(
        a_GRI=empty(slots, max_rank, hidden),
        b_GRO=empty(slots, max_rank, outs),
        rank_G=empty(slots, dtype=I32),
        in_features=hidden,
        out_features=outs,
    )
    host = np.zeros(0, np.int32)
    for count in (1, 37, 2048):
        rows = AdapterRows(slot_T=empty(count, dtype=I32), order_X=host, runs_N3=host)
        lora.add(empty(count, outs), empty(count, hidden), [bank], rows)


def drafted(vocab: int, rows: int) -> None:
    """A draw of an EAGLE-3 head with `vocab` of the target's tokens, by their ids."""
    floats, longs = empty(rows, dtype=F32), empty(rows, dtype=I64)
    parameters = SamplingRows(
        temperature_R=floats,
        top_k_R=empty(rows, dtype=I32),
        top_p_R=floats,
        min_p_R=floats,
        seed_R=longs,
        position_R=longs,
        token_ids_V=empty(vocab, dtype=I32),
        all_greedy=False,
    )
    sampling.sample(empty(rows, vocab, dtype=F32), parameters)


def sampled(vocab: int, rows: int, greedy: bool) -> None:
    """A draw with penalties, filters and bans, or the greatest logit."""
    floats, longs = empty(rows, dtype=F32), empty(rows, dtype=I64)
    more: dict[str, Tensor] = {}
    if not greedy:
        names = ("repetition_R", "presence_R", "frequency_R")
        more = dict.fromkeys(names, floats)
        more |= {"counts_RV": empty(rows, vocab, dtype=I32)}
        more |= {"seen_RV": empty(rows, vocab, dtype=torch.bool)}
        more |= {"allowed_RW": empty(rows, num_mask_words(vocab), dtype=I32)}
    parameters = SamplingRows(
        temperature_R=floats,
        top_k_R=empty(rows, dtype=I32),
        top_p_R=floats,
        min_p_R=floats,
        seed_R=longs,
        position_R=longs,
        all_greedy=greedy,
        **more,
    )
    sampling.sample(empty(rows, vocab, dtype=F32), parameters)


SUBSET = "subset for every test run"


def subset() -> None:
    """Kernels that compile in seconds: a product of a prefill, rows to float8, sums and norms."""
    w, x = packed("int8", 4096, 4096), empty(2048, 4096)
    matmul.matmul(x, w, arrivals=ARRIVALS, batch_independent=False)
    float8.quantize_rows(empty(37, 53248), 1200.0)
    symmetric_sums.reduce(ranks_memory(2), empty(1, 4096), divides=False)
    norm.rms_norm(empty(1, 4096), empty(4096, dtype=F32), 1e-5)
    for rounding in roundings()[:1]:
        norm.norm_rows(empty(1, 4096), None, empty(4096, dtype=F32), 1e-5, rounding)
        silu_mul_rounded(empty(1, 28672), rounding)
    ints = {name: empty(size, dtype=I32) for name, size in (("starts_E1", 17), ("tokens_X", 37))}
    float8.quantize_expert_rows(
        empty(9, 5120), math.inf, num_rows=37, scores_X=empty(37, dtype=F32), **ints
    )


def cases() -> dict[str, Callable[[], object]]:
    """What to launch, by name."""
    groups: tuple[Iterator[tuple[str, Callable[[], object]]], ...] = (
        _attention_cases(),
        _matmul_cases(),
        _other_cases(),
    )
    return {SUBSET: subset} | {name: work for group in groups for name, work in group}


def _attention_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    shapes = {
        "8B": (32, 8, 128),
        "1B": (32, 8, 64),
        "405B/TP8": (16, 1, 128),
        "Maverick/TP8": (5, 1, 128),
    }
    for label, kv_dtype in (("bf16", BF16), ("int8", INT8), ("fp8", FP8)):
        for name, (heads, kv_heads, dim) in shapes.items():
            group = heads // kv_heads
            case = f"attention {name} g{group} d{dim} kv {label}"
            work = partial(attention, heads, kv_heads, dim, kv_dtype)
            yield case, work
            yield f"{FAST} {case}", partial(work, sizes=((64, 1),), ops=OPS)
    styles = {
        "chunks": AttentionStyle(
            rope="pairs", qk_norm=True, mask=AttentionMaskSpec(chunk_size=8192)
        ),
        "no rope": AttentionStyle(rope="none", query_scale=(0.1, 8192)),
        "window, sinks": AttentionStyle(mask=AttentionMaskSpec(window=4096, sinks=4)),
    }
    for name, style in styles.items():
        yield f"attention Maverick g5 {name}", partial(attention, 40, 8, 128, BF16, style)
    yield "attention Qwen3 g4 head norms", partial(attention, 32, 8, 128, BF16, head_norms=True)


def _matmul_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    kinds: dict[str, tuple[str, dict[str, Any]]] = {
        "int8": ("int8", {}),
        "fp8": ("fp8", {}),
        "int4 g128": ("int4", {}),
        "int4 g128 zeros": ("int4", {"zeros": True}),
        "int4 g32": ("int4", {"group": 32}),
        "int4 g32 zeros": ("int4", {"group": 32, "zeros": True}),
        "fp4 g16": ("fp4", {"group": 16}),
    }
    for name, (kind, more) in kinds.items():
        yield f"matmul 8B gate_up {name}", partial(products, packed(kind, 28672, 4096, **more))
    for name, kind in {"int8": "int8", "int4 g128": "int4"}.items():  # their columns are split
        w = packed(kind, 2304, 16384)
        yield f"matmul 405B/TP8 qkv {name}", partial(products, w)
        yield f"matmul 405B/TP8 qkv {name} independent", partial(products, w, independent=True)
    yield "matmul 405B/TP8 down fp8, x f32", partial(products, packed("fp8", 16384, 6656), F32)
    for kind in ("dense", "int8"):
        w = packed(kind, 28672, 4096)
        yield f"matmul 8B {kind} independent", partial(products, w, independent=True)
    for kind, dtype in (("dense", BF16), ("int8", BF16), ("int4", BF16), ("fp8", BF16)):
        yield f"experts Maverick/EP8 {kind}", partial(grouped, kind, dtype)
    yield "experts Maverick/EP8 fp8, x f32", partial(grouped, "fp8", F32)


def _other_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    for name, sizes in {"8B": (4096, 14336), "405B": (16384, 53248)}.items():
        yield f"rows {name}", partial(by_row, *sizes)
        yield f"fp4 rows {name}", partial(to_fp4, *sizes)
    yield "fp4 rows 405B/TP8", partial(to_fp4, 2048, 6656)
    for name, hidden, ranks in (("8B", 4096, 2), ("Maverick", 5120, 8), ("405B", 16384, 8)):
        yield f"sums of {ranks} ranks {name}", partial(sums_of_ranks, hidden, ranks)
    for name, (hidden, mlp, ranks) in {
        "8B": (4096, 14336, 2),
        "Maverick/TP8": (5120, 2048, 8),
        "405B/TP8": (16384, 6656, 8),
    }.items():
        yield f"float8 rows {name}", partial(rounded_rows, hidden, mlp, ranks)
    yield "float8 rows 8B, x f32", partial(rounded_rows, 4096, 14336, 2, F32)
    for num_experts, local in ((128, 16), (128, 128), (128, 1)):
        name = f"routing of {num_experts} experts, {local} here"
        yield name, partial(routed, num_experts, local)
    for max_rank in (8, 16, 64):
        yield f"adapters 8B, rank {max_rank}", partial(adapted, 4096, 14336, max_rank)
    for vocab in (128256, 202048):
        for greedy in (True, False):
            name = f"sample {vocab}{' greedy' if greedy else ''}"
            yield name, partial(sampled, vocab, 64, greedy)
    yield "sample 32000 of a draft vocabulary", partial(drafted, 32000, 64)
