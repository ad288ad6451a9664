"""Routed experts in each form, at EP1 and EP2: the partial sums of the ranks are the layer's."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from arriero.kernels.layers import MoELayer
from arriero.kernels.moe import route
from arriero.kernels.ops import Ops
from arriero.shards.checkpoint.formats.scheme import QuantScheme
from arriero.shards.checkpoint.tensor_folder import TensorFolder
from arriero.shards.errors import CheckpointError
from arriero.shards.layout.dense import Span
from arriero.shards.models.loader import Loader
from support import triton_interpreter
from support.by_the_book import ByTheBook
from support.modelopt_files import float8, float8_inputs, fused, nvfp4, nvfp4_inputs
from support.models import write_safetensors
from support.quantized_files import awq, fp8, gptq, packed
from support.scaled_fp4 import block_scaled_product, scaled_mm_v2
from support.slices import CPU, exact_ops

triton_interpreter.install()  # before anything imports the kernels

EXPERTS, HIDDEN, INNER, TOKENS = 4, 32, 64, 9
PREFIX = "model.layers.1.feed_forward."
FORMS = {
    "fused": None,
    "compressed-fp8": QuantScheme(method="compressed-tensors", activation_bound=float("inf")),
    "fp8-weights": QuantScheme(method="compressed-tensors"),
    "packed-4": QuantScheme(method="pack-quantized", bits=4, group_size=32),
    "packed-4-zeros": QuantScheme(method="pack-quantized", bits=4, group_size=32, symmetric=False),
    "packed-8": QuantScheme(method="pack-quantized", bits=8),
    "awq": QuantScheme(method="awq", group_size=32),
    "gptq": QuantScheme(method="gptq", group_size=32, zero_offset=1),
    "gptq-v2": QuantScheme(method="gptq", group_size=32),
    "gptq-act-order": QuantScheme(method="gptq", group_size=16, zero_offset=1, act_order=True),
    "gptq-v2-act-order": QuantScheme(method="gptq", group_size=16, act_order=True),
    "modelopt-fp8": QuantScheme(method="modelopt-fp8", per_tensor=True, input_scale=True),
    "modelopt-fp8-fused": QuantScheme(
        method="modelopt-fp8", per_tensor=True, input_scale=True, fused=True
    ),
    "modelopt-nvfp4": QuantScheme(method="modelopt-nvfp4", group_size=16, input_scale=True),
    "modelopt-nvfp4-fused": QuantScheme(
        method="modelopt-nvfp4", group_size=16, input_scale=True, fused=True
    ),
    "nvfp4-weights-fused": QuantScheme(method="modelopt-nvfp4", group_size=16, fused=True),
}
ROUNDED = ("modelopt-fp8", "modelopt-fp8-fused", "modelopt-nvfp4", "modelopt-nvfp4-fused")


def written(path: Path, form: str) -> dict[str, Tensor]:
    """A layer's files; returns what its matrices mean, float64 [out, in]."""
    generator = torch.Generator().manual_seed(0)
    means: dict[str, Tensor] = {}
    tensors: dict[str, Tensor] = {}
    names = {"gate_proj": (INNER, HIDDEN), "up_proj": (INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}
    for e in range(EXPERTS):
        for at, (name, (rows, columns)) in enumerate(names.items()):
            module = f"{PREFIX}experts.{e}.{name}"
            if form == "fused":
                means[module] = torch.randn(rows, columns, generator=generator).double() * 0.2
                continue
            seed = 10 * e + at
            if "modelopt" in form or "nvfp4" in form:
                made, whole = modelopt(module, rows, columns, seed, form)
                means[module] = whole
                means |= {k: v.double() for k, v in made.items() if k.endswith("input_scale")}
                tensors |= made
                continue
            if form.startswith("packed"):
                bits = 8 if "8" in form else 4
                group = 32 if bits == 4 else columns
                zeros = form.endswith("zeros")
                made, full = packed(module, rows, columns, group, seed, bits, zeros)
            elif form == "awq":
                made, full = awq(module, rows, columns, 32, seed)
            elif form.startswith("gptq"):
                ordered = "act-order" in form
                made, full = gptq(
                    module,
                    rows,
                    columns,
                    16 if ordered else 32,
                    seed,
                    act_order=ordered,
                    version=2 if "v2" in form else 1,
                    order_seed=2 * e + (name == "down_proj"),  # gate and up have one order
                )
            else:
                made, full = fp8(module, rows, columns, seed, torch.bfloat16)
                made[f"{module}.weight_scale"] *= 2.0**-8
                full = full * 2.0**-8
            tensors |= made
            means[module] = torch.from_numpy(full)
    if form == "fused":
        means = {name: one.float().double() for name, one in means.items()}

        def of(name: str) -> Tensor:
            parts = [means[f"{PREFIX}experts.{e}.{name}"] for e in range(EXPERTS)]
            return torch.stack(parts).mT.float()

        gate_up = torch.cat([of("gate_proj"), of("up_proj")], -1).contiguous()
        tensors[f"{PREFIX}experts.gate_up_proj"] = gate_up
        tensors[f"{PREFIX}experts.down_proj"] = of("down_proj").contiguous()
    if form.endswith("-fused"):
        parts = {
            name: [of_module(tensors, f"{PREFIX}experts.{e}.{name}.") for e in range(EXPERTS)]
            for name in names
        }
        tensors = fused(parts, f"{PREFIX}experts")
    for name, shape in {"router": (EXPERTS, HIDDEN)}.items():
        tensors[f"{PREFIX}{name}.weight"] = torch.randn(shape, generator=generator)
    for name, shape in names.items():
        noise = torch.randn(shape, generator=generator) * 0.2
        tensors[f"{PREFIX}shared_expert.{name}.weight"] = noise
    means |= {k.removesuffix(".weight"): v.double() for k, v in tensors.items() if "expert." in k}
    write_safetensors(path / "model.safetensors", tensors)
    return means


def of_module(tensors: dict[str, Tensor], module: str) -> dict[str, Tensor]:
    """The tensors of a module by suffix."""
    return {k.removeprefix(module): v for k, v in tensors.items() if k.startswith(module)}


def modelopt(
    module: str, rows: int, columns: int, seed: int, form: str
) -> tuple[dict[str, Tensor], Tensor]:
    """A matrix of an expert; the numbers of fused tensors are the same for all experts."""
    part = "down" if module.endswith("down_proj") else "gate_up"
    shared = form.endswith("-fused")
    write = nvfp4 if "nvfp4" in form else float8
    tensors, whole = write(module, rows, columns, seed)
    name = f"{module}.weight_scale" + ("_2" if "nvfp4" in form else "")
    wanted = torch.tensor((2.0**-11 if "nvfp4" in form else 2.0**-9) * (1 if shared else 1.3))
    whole = whole / tensors[name].double() * wanted.double()
    tensors[name] = wanted
    if form in ROUNDED:
        reach = 3.0 if part == "gate_up" else 1.5
        steps = 6 * 448 if "nvfp4" in form else 448
        scale = torch.tensor(reach / steps * (1.0 if shared else 1 + 0.05 * (seed // 10)))
        tensors[f"{module}.input_scale"] = scale
    return tensors, whole


def block(path: Path, form: str, ops: Ops, x: Tensor, experts: Span, inner: Span) -> Tensor:
    """A rank's partial: its experts, and (its first expert being 0) the shared one."""
    loader = Loader(
        TensorFolder.of(path),
        FORMS[form],
        [],
        cast(Any, SimpleNamespace()),
        ops,
        dtype=torch.float32,
    )
    whole = Span(start=0, stop=INNER)
    shared = PREFIX + "shared_expert."
    gate_up = loader.rows([(f"{shared}gate_proj", whole), (f"{shared}up_proj", whole)])
    down = loader.columns(f"{shared}down_proj", whole)
    pairs = [
        loader.expert(f"{PREFIX}experts", e, inner) for e in range(experts.start, experts.stop)
    ]
    layer = MoELayer(
        attn_norm_H=torch.ones(HIDDEN),
        qkv=down,
        o=down,
        mlp_norm_H=torch.ones(HIDDEN),
        gate_up=gate_up,
        down=down,
        num_q_heads=1,
        num_kv_heads=1,
        head_dim=HIDDEN,
        softmax_scale=1.0,
        eps=1e-5,
        router=loader.rows([(f"{PREFIX}router", Span(start=0, stop=EXPERTS))], keep=True),
        experts_gate_up=tuple(one for one, _ in pairs),
        experts_down=tuple(two for _, two in pairs),
        first_expert=experts.start,
        top_k=1,
    )
    out = ops.moe_block(x, layer)
    if experts.start == 0 and inner.start == 0:
        return out
    h = ops.rms_norm(x, layer.mlp_norm_H, 1e-5)
    return out - ops.linear(ops.silu_mul(ops.linear(h, gate_up)), down)


def by_the_book(path: Path, means: dict[str, Tensor], x: Tensor, form: str) -> Tensor:
    """shared(h) + expert(score * h), float64; inputs rounded where they have a static scale."""
    h = x.double() * torch.rsqrt(x.double().pow(2).mean(-1, keepdim=True) + 1e-5)
    router = TensorFolder.of(path).tensor(f"{PREFIX}router.weight").double()
    chosen = route((h @ router.T).float(), 1)

    def rounded(given: Tensor, module: str) -> Tensor:
        scale = means.get(f"{module}.input_scale")
        if scale is None:
            return given
        rounds = nvfp4_inputs if "nvfp4" in form else float8_inputs
        return rounds(given, scale)

    def gated(given: Tensor, module: str) -> Tensor:
        given = rounded(given, f"{module}gate_proj")
        gate, up = given @ means[f"{module}gate_proj"].T, given @ means[f"{module}up_proj"].T
        product = rounded(gate * gate.sigmoid() * up, f"{module}down_proj")
        return product @ means[f"{module}down_proj"].T

    rows = []
    for t in range(TOKENS):
        e, score = int(chosen.experts_TA[t, 0]), float(chosen.scores_TA[t, 0])
        rows.append(
            gated(h[t], f"{PREFIX}shared_expert.") + gated(score * h[t], f"{PREFIX}experts.{e}.")
        )
    return torch.stack(rows)


LAYOUTS = {
    "EP1": [(0, EXPERTS, 0, INNER)],
    "EP2": [(0, 2, 0, INNER), (2, EXPERTS, 0, INNER)],
    "TP3": [(0, EXPERTS, 0, 24), (0, EXPERTS, 24, 48), (0, EXPERTS, 48, INNER)],
    "EP2 x TP2": [(0, 2, 0, 32), (0, 2, 32, INNER), (2, EXPERTS, 0, 32), (2, EXPERTS, 32, INNER)],
}


TP3_FIRST = Span(start=0, stop=EXPERTS), Span(start=0, stop=24)


@pytest.mark.parametrize("kernels", ["reference", "cpu"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", FORMS)
def test_experts(tmp_path: Path, form: str, layout: str, kernels: str) -> None:
    means = written(tmp_path, form)
    ops = exact_ops(kernels)
    if layout == "TP3" and form in ("modelopt-nvfp4", "modelopt-nvfp4-fused"):
        with pytest.raises(CheckpointError, match=r"columns 0:24 cut a group of 16 inputs"):
            block(tmp_path, form, ops, torch.ones(1, HIDDEN), *TP3_FIRST)
        return
    x = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(5))
    parts = [
        block(tmp_path, form, ops, x, Span(start=a, stop=b), Span(start=c, stop=d))
        for a, b, c, d in LAYOUTS[layout]
    ]
    got, want = sum(parts), by_the_book(tmp_path, means, x, form)
    assert isinstance(got, Tensor)
    off = float((got - want).abs().max() / want.abs().max())
    if form == "compressed-fp8":  # inputs are rounded too
        assert 1e-4 < off < 0.1
        if kernels == "reference":
            book = ByTheBook(CPU)
            again = [
                block(tmp_path, form, book, x, Span(start=a, stop=b), Span(start=c, stop=d))
                for a, b, c, d in LAYOUTS[layout]
            ]
            assert all(torch.equal(one, two) for one, two in zip(parts, again, strict=True))
    else:
        assert off <= 1e-5


@pytest.mark.parametrize("form", ["modelopt-nvfp4", "modelopt-nvfp4-fused"])
def test_experts_beside_the_block_scaled_product(tmp_path: Path, form: str) -> None:
    """On a GPU with torch's NVFP4 product routed experts keep Triton's, in the same numbers."""
    pytest.importorskip("triton")
    from arriero.kernels.triton import triton_ops
    from arriero.kernels.triton.weights import Packed

    means = written(tmp_path, form)
    x = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(5))
    with block_scaled_product(scaled_mm_v2):
        ops = triton_ops(CPU, batch_independent=False)
        parts = [
            block(tmp_path, form, ops, x, Span(start=a, stop=b), Span(start=c, stop=d))
            for a, b, c, d in LAYOUTS["EP2 x TP2"]
        ]
    tables = ops._experts.values()
    assert len(tables) == 2 * len(parts) and all(isinstance(t.first, Packed) for t in tables)
    want = by_the_book(tmp_path, means, x, form)
    assert float((sum(parts) - want).abs().max() / want.abs().max()) <= 1e-5
