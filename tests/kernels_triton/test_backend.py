"""What the conformance suite does not reach: choice of backend, packing, other caches, fusing."""

from __future__ import annotations

import builtins
import math
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from support import triton_interpreter

triton_interpreter.install()
pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from arriero.kernels.input_transform import quantize_rows  # noqa: E402
from arriero.kernels.kv_cache import KVCacheSpec  # noqa: E402
from arriero.kernels.layers import AttentionStyle  # noqa: E402
from arriero.kernels.reference.backend import ReferenceOps  # noqa: E402
from arriero.kernels.select import ops_for  # noqa: E402
from arriero.kernels.triton import float8, launch, sampling, triton_ops, tuning  # noqa: E402
from arriero.kernels.triton.backend import TritonOps  # noqa: E402
from arriero.kernels.triton.norm import add_rms_norm, rms_norm  # noqa: E402
from arriero.kernels.triton.upload import Upload  # noqa: E402

CPU = torch.device("cpu")


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_without_triton_the_choice_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **named: Any) -> Any:  # noqa: ANN401
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError("No module named 'triton'")
        return real(name, *rest, **named)

    for name in [n for n in sys.modules if n.startswith("arriero.kernels.triton.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr("arriero.kernels.triton.launch")
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(RuntimeError, match=r"needs the package triton.*install triton"):
        ops_for(torch.device("cuda"))
    with pytest.raises(RuntimeError, match="needs the package triton"):
        ops_for(CPU, "triton")


def test_on_a_cpu_it_runs_only_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ops_for(CPU, "triton").name == "triton"
    assert ops_for(CPU).name != "triton"
    monkeypatch.setattr(launch, "INTERPRETED", False)
    with pytest.raises(RuntimeError, match="'cpu': it needs a CUDA device; TRITON_INTERPRET=1"):
        triton_ops(CPU)


def test_the_mode_is_chosen_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted it is on either way; on a GPU only where it is asked for."""
    assert triton_ops(CPU).batch_independent
    assert not triton_ops(CPU, batch_independent=False).batch_independent
    asked: list[bool | None] = []

    def noted(device: torch.device, *, batch_independent: bool | None = None) -> TritonOps:
        asked.append(batch_independent)
        return triton_ops(device)

    monkeypatch.setattr("arriero.kernels.triton.triton_ops", noted)
    ops_for(CPU, "triton")
    assert ops_for(CPU, "triton", batch_independent=True).name == "triton"
    assert asked == [None, True]
    assert ops_for(CPU, "cpu", 1, batch_independent=True).name == "cpu"
    with pytest.raises(
        ValueError, match=r"reference kernels are independent to rounding.*'cpu' or"
    ):
        ops_for(CPU, "reference", batch_independent=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_on_cuda_without_a_device() -> None:
    with pytest.raises(RuntimeError, match="no CUDA device"):
        ops_for(torch.device("cuda"))


def test_the_fused_norm_is_the_sum_and_then_the_norm() -> None:
    for dtype in (torch.float32, torch.float16):
        x, part, weight = randn(9, 70).to(dtype), randn(9, 70, seed=1).to(dtype), randn(70, seed=2)
        plain = x + part
        got = add_rms_norm(x, part, weight, 1e-5)
        assert torch.equal(x, plain)
        assert torch.equal(got, rms_norm(plain, weight, 1e-5))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn], ids=str)
def test_other_caches(dtype: torch.dtype) -> None:
    """float16 and fp8, as the reference has them.

    The interpreter rounds to fp8 wrongly where a fraction carries over, so there torch writes.
    """
    from kernels import paged
    from kernels.test_attention import layer_of

    case = paged.Case(6, 2, 32, [(9, 1), (0, 11), (37, 3)])
    ops, reference = triton_ops(CPU), ReferenceOps(CPU)
    spec = paged.spec(case, dtype)
    ours = ops.kv_cache(spec, CPU)
    theirs = reference.kv_cache(replace(spec, dtype=torch.float32), CPU)
    blocks = paged.tables(case, spec.num_blocks)
    whole = paged.batch([(0, sum(s)) for s in case.sequences], blocks, 32)
    qkv = randn(len(whole.positions_T), 10 * 32)
    ops.rope_write_kv(qkv, layer_of(ops, case), ours, 1, whole)
    reference.rope_write_kv(qkv, layer_of(reference, case), theirs, 1, whole)
    every = list(range(spec.num_blocks))
    if dtype == torch.float16:
        exact = theirs.read(1, every)
        assert ((ours.read(1, every) - exact).abs() <= 2.0**-10 * exact.abs() + 2.0**-20).all()
    else:
        ours.write(1, every, theirs.read(1, every))
    theirs.write(1, every, ours.read(1, every).float())
    batch = paged.batch(case.sequences, blocks, 32)
    q = randn(len(batch.positions_T), 6, 32, seed=3)
    torch.testing.assert_close(
        ops.paged_attention(q, 0.2, ours, 1, batch),
        reference.paged_attention(q, 0.2, theirs, 1, batch),
        rtol=3e-3,
        atol=3e-3,
    )


def test_fp8_caches_saturate() -> None:
    from kernels import paged
    from kernels.test_attention import layer_of

    case = paged.Case(1, 1, 16, [(0, 2)])
    ops = triton_ops(CPU)
    spec = KVCacheSpec(
        num_layers=1,
        num_blocks=2,
        num_kv_heads=1,
        head_dim=16,
        block_size=4,
        dtype=torch.float8_e4m3fn,
    )
    kv = ops.kv_cache(spec, CPU)
    layer = replace(layer_of(ops, case), style=AttentionStyle(rope="none"))
    ops.rope_write_kv(torch.full((2, 48), 1e4), layer, kv, 0, paged.batch([(0, 2)], [[1]], 16))
    assert (kv.read(0, [1])[:, :, :, :2].float() == 448).all()


@launch.kernel
def _store_noise(seeds: tl.tensor, positions: tl.tensor, to: tl.tensor, SIZE: tl.constexpr) -> None:
    row, token = tl.program_id(0), tl.arange(0, SIZE)
    k0, k1, k2, k3 = sampling.row_key(tl.load(seeds + row), tl.load(positions + row))
    u = sampling.token_uniform((token * 16381).to(tl.uint32), k0, k1, k2, k3)
    tl.store(to + row * SIZE + token, u)


def test_the_kernels_noise_has_the_bits_of_the_definition() -> None:
    from kernels.draws import noise

    seeds = [0, 1, -1, 2**63 - 1, -(2**63), 2**32, 123456789012345678]
    positions = [0, 2**40 + 3, 7, 1, 2**32, 131071, 99]
    got = torch.empty(len(seeds), 16, dtype=torch.float64)
    _store_noise[(len(seeds),)](torch.tensor(seeds), torch.tensor(positions), got, SIZE=16)
    tokens = 16381 * np.arange(16)
    assert got.tolist() == [
        noise(seed, position, tokens).tolist()
        for seed, position in zip(seeds, positions, strict=True)
    ]


@pytest.mark.parametrize("chunk", [64, 1000, 1 << 20])
def test_upload(chunk: int) -> None:
    upload = Upload(CPU, chunk)
    wide = randn(40, 90)
    for source in (wide, wide[3:30, 7:20], wide.t(), wide[5], wide[:0], wide.bfloat16()):
        target = torch.empty(source.shape, dtype=torch.float16)
        upload.copy(target, source)
        assert torch.equal(target, source.half())


@pytest.mark.parametrize("bound", [1200.0, math.inf])
def test_wide_rows_are_rounded_in_passes(bound: float) -> None:
    """Rows of several blocks, the greatest number in the last block: the bits of the reference."""
    x = randn(2, 53248) * 30
    x[0, -1], x[1, 5] = 5000.0, -2000.0
    q, scale = float8.quantize_rows(x, bound)
    expected, expected_scale = quantize_rows(x, bound)
    assert torch.equal(scale, expected_scale)
    assert torch.equal(q.view(torch.uint8), expected.view(torch.uint8))


def test_every_entry_of_the_tuning_file_is_whole() -> None:
    kinds = {"attention": tuning.AttentionBlocks, "product": tuning.MatmulBlocks}
    for name, kernels in tuning._table().items():
        for kernel, shapes in kernels.items():
            for shape, entry in shapes.items():
                if kernel in kinds:
                    assert set(entry) == set(tuning.field_names(kinds[kernel])), (
                        name,
                        kernel,
                        shape,
                    )
                    blocks = kinds[kernel](**entry)
                if kernel == "attention":
                    decode, prefill = blocks, blocks.prefill
                    assert blocks.fast.block_m == 16, "mma: 16 rows"
                    assert (
                        decode.block_m * prefill.num_warps == prefill.block_m * decode.num_warps
                    ), f"{name} {shape}: rows of a tile for each warp, which order a row's sums"
    whole = tuning.attention_blocks(CPU, 128, torch.bfloat16)
    for wrong, why in (
        ({"split": 100}, "split=100 is not a multiple of block_n=64"),
        ({"fast_block_n": 48}, "split=64 is not a multiple of fast_block_n=48"),
    ):
        with pytest.raises(ValueError, match=why):
            replace(whole, **wrong)


@pytest.mark.parametrize("rows", [1, 16, 17, 128, 129, 8192])
def test_a_gpu_without_entries_gets_the_default(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "INTERPRETED", False)
    monkeypatch.setattr(tuning, "_names", lambda device: ("a GPU nobody tuned for", "default"))
    one = tuning.matmul_blocks(CPU, "dense", 4096, 4096, rows)
    assert one.block_m == (16 if rows <= 16 else 64 if rows <= 128 else 128)
    any_rows = tuning.matmul_blocks(CPU, "dense", 4096, 4096, None)
    assert any_rows.block_m == 64
    int4 = tuning.matmul_blocks(CPU, "int4", 4096, 4096, rows)
    assert int4.block_n == 64, "a wider tile of int4 spills registers"
    attention = tuning.attention_blocks(CPU, 128, torch.bfloat16)
    assert attention.split == 256
    assert attention.prefill.block_m // attention.prefill.num_warps == 16
    assert attention.block_m // attention.num_warps == 16, "16 rows of a tile for each warp"
    assert attention.fast.block_m == 16, "the rows of the smallest matrix instruction"
