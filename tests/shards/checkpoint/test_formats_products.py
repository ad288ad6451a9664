"""Quantized matrices mean what an independent reading of their numbers says, whole and cut."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from arriero.kernels.quantized_weight import QuantizedWeight
from arriero.kernels.select import ops_for
from arriero.shards.checkpoint.formats.products import ProductReader, StoredProduct
from arriero.shards.checkpoint.formats.scheme import Method, QuantScheme
from arriero.shards.checkpoint.tensor_folder import TensorFolder
from arriero.shards.errors import CheckpointError
from arriero.shards.layout.dense import Span
from support.models import write_safetensors
from support.quantized_files import Matrix, awq, fp8, gptq, packed

NAME = "model.layers.0.mlp.up_proj"
ROWS, COLUMNS, GROUP = 40, 48, 8
FORMS = (
    "fbgemm_fp8",
    "compressed-tensors",
    "packed-8",
    "packed-4",
    "packed-4-zeros",
    "awq",
    "gptq-v1",
    "gptq-v2",
    "gptq-act-order",
)


def written(path: Path, form: str, *, groups: int = GROUP) -> tuple[ProductReader, Matrix]:
    if form == "awq":
        tensors, full = awq(NAME, ROWS, COLUMNS, groups, 1)
    elif form.startswith("gptq"):
        tensors, full = gptq(
            NAME,
            ROWS,
            COLUMNS,
            groups,
            2,
            act_order="act" in form,
            version=2 if form.endswith("v2") else 1,
        )
    elif form.startswith("packed"):
        bits = int(form.split("-")[1])
        tensors, full = packed(
            NAME, ROWS, COLUMNS, groups if bits == 4 else COLUMNS, 4, bits, form.endswith("zeros")
        )
    else:
        dtype = torch.float32 if form == "fbgemm_fp8" else torch.bfloat16
        tensors, full = fp8(NAME, ROWS, COLUMNS, 3, dtype)
    write_safetensors(path / "model.safetensors", tensors)
    short = form.split("-v")[0].split("-act")[0]
    method: Method = "pack-quantized" if form.startswith("packed") else short  # type: ignore[assignment]
    scheme = QuantScheme(
        method=method,
        bits=int(form.split("-")[1]) if form.startswith("packed") else 0,
        symmetric=not form.endswith("zeros"),
        group_size=groups,
        act_order="act" in form,
        zero_offset=0 if form.endswith("v2") else 1,
    )
    return ProductReader(TensorFolder.of(path), scheme), full


def dense(product: StoredProduct, num_inputs: int) -> np.ndarray:
    got = product.dense()
    assert got.shape[1] == num_inputs
    return got.double().numpy()


@pytest.mark.parametrize("form", FORMS)
def test_a_matrix_is_what_its_numbers_say(tmp_path: Path, form: str) -> None:
    reader, full = written(tmp_path, form)
    product = reader.product(NAME)
    assert isinstance(product.weight, QuantizedWeight)
    inputs = product.inputs
    assert (inputs is not None and inputs.order_I is not None) == (form == "gptq-act-order")
    # one rounding of a product to float32
    np.testing.assert_allclose(dense(product, COLUMNS), full, rtol=1e-6, atol=0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tp", [2, 3])
def test_slices_join_to_the_whole(tmp_path: Path, form: str, tp: int) -> None:
    reader, full = written(tmp_path, form)
    row_cuts = {2: [0, 24, 40], 3: [0, 11, 30, 40]}[tp]  # also inside a word of eight
    column_cuts = {2: [0, 16, 48], 3: [0, 8, 32, 48]}[tp]
    for a, b in itertools.pairwise(row_cuts):
        part = reader.product(NAME, rows=Span(start=a, stop=b))
        np.testing.assert_allclose(dense(part, COLUMNS), full[a:b], rtol=1e-6)
    for a, b in itertools.pairwise(column_cuts):
        part = reader.product(NAME, columns=Span(start=a, stop=b))
        np.testing.assert_allclose(dense(part, b - a), full[:, a:b], rtol=1e-6)


def test_act_order_can_be_cut_anywhere(tmp_path: Path) -> None:
    """Its slices hold parts of every group, whatever the cut."""
    reader, full = written(tmp_path, "gptq-act-order")
    part = reader.product(NAME, rows=Span(start=3, stop=9), columns=Span(start=5, stop=23))
    np.testing.assert_allclose(dense(part, 18), full[3:9, 5:23], rtol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_backends_compute_with_the_numbers_stored(tmp_path: Path, form: str) -> None:
    reader, full = written(tmp_path, form)
    product = reader.product(NAME)
    assert isinstance(product.weight, QuantizedWeight)
    ops = ops_for(torch.device("cpu"), "reference")
    if product.inputs is None:
        packed = ops.pack_quantized([product.weight], None)
    else:
        packed = ops.pack_transformed([product.weight], None, product.inputs)
    x_TI = torch.randn(5, COLUMNS, generator=torch.Generator().manual_seed(0))
    want = x_TI.double().numpy() @ full.T
    got = ops.linear(x_TI, packed).double().numpy()
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("form", ["awq", "gptq-v1", "packed-4", "packed-4-zeros"])
def test_a_cut_inside_a_group_makes_smaller_groups(tmp_path: Path, form: str) -> None:
    reader, full = written(tmp_path, form)
    for a, b, group in ((4, 16, 4), (0, 20, 4), (16, 32, 8), (40, 48, 8), (6, 48, 2)):
        part = reader.product(NAME, columns=Span(start=a, stop=b))
        assert isinstance(part.weight, QuantizedWeight) and part.weight.group_size == group
        np.testing.assert_allclose(dense(part, b - a), full[:, a:b], rtol=1e-6)
    with pytest.raises(CheckpointError, match=r"columns 3:16 cut a group of 8"):
        reader.product(NAME, columns=Span(start=3, stop=16))


@pytest.mark.parametrize("form", FORMS)
def test_scales_that_are_not_finite_are_refused(tmp_path: Path, form: str) -> None:
    reader, _ = written(tmp_path, form)
    folder = TensorFolder.of(tmp_path)
    scales = next(one for one in folder.names if one.endswith("scale") or one.endswith("scales"))
    tensors = {name: folder.tensor(name).clone() for name in folder.names}
    tensors[scales][0, 0] = float("nan")
    (tmp_path / "b").mkdir()
    write_safetensors(tmp_path / "b" / "model.safetensors", tensors)
    broken = ProductReader(TensorFolder.of(tmp_path / "b"), reader._scheme)
    with pytest.raises(CheckpointError, match="1 scales that are infinite or not a number"):
        broken.product(NAME)


def test_a_group_index_beyond_the_scales_is_refused(tmp_path: Path) -> None:
    tensors, _ = gptq(NAME, ROWS, COLUMNS, GROUP, 2, act_order=True, version=1)
    tensors[f"{NAME}.g_idx"][7] = 99
    write_safetensors(tmp_path / "model.safetensors", tensors)
    scheme = QuantScheme(method="gptq", group_size=GROUP, act_order=True, zero_offset=1)
    with pytest.raises(CheckpointError, match="beyond its scales"):
        ProductReader(TensorFolder.of(tmp_path), scheme).product(NAME)


def test_plain_matrices_of_a_quantized_folder_are_views(tmp_path: Path) -> None:
    weight = torch.randn(8, 16).to(torch.bfloat16)
    write_safetensors(tmp_path / "model.safetensors", {"lm_head.weight": weight})
    reader = ProductReader(TensorFolder.of(tmp_path), QuantScheme(method="awq", group_size=8))
    got = reader.product("lm_head", rows=Span(start=2, stop=5)).weight
    assert isinstance(got, torch.Tensor) and torch.equal(got, weight[2:5])
    with pytest.raises(CheckpointError, match="no tensor"):
        reader.product("model.norm")


@pytest.mark.parametrize("fused", [True, False])
def test_experts_fused_or_not(tmp_path: Path, fused: bool) -> None:
    experts, inner, hidden = 3, 10, 6
    generator = torch.Generator().manual_seed(0)
    gate, up = (torch.randn(experts, inner, hidden, generator=generator) for _ in range(2))
    down = torch.randn(experts, hidden, inner, generator=generator)
    prefix = "model.layers.1.feed_forward.experts"
    if fused:
        tensors = {
            f"{prefix}.gate_up_proj": torch.cat([gate.mT, up.mT], dim=-1),
            f"{prefix}.down_proj": down.mT,
        }
    else:
        tensors = {
            f"{prefix}.{e}.{name}_proj.weight": one[e]
            for e in range(experts)
            for name, one in (("gate", gate), ("up", up), ("down", down))
        }
    write_safetensors(tmp_path / "model.safetensors", tensors)
    reader = ProductReader(TensorFolder.of(tmp_path), None)
    for columns in (None, Span(start=2, stop=7)):
        cut = slice(None) if columns is None else slice(columns.start, columns.stop)
        for e in range(experts):
            got = [one.weight for one in reader.expert(prefix, e, columns)]
            want = (gate[e][cut], up[e][cut], down[e][:, cut])
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    if fused:
        with pytest.raises(CheckpointError, match="holds 3 experts"):
            reader.expert(prefix, 3)
