"""A tiny model in each form that checkpoints ship in gives the logits that its numbers say."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from arriero.shards.config.group import GroupConfig
from arriero.shards.errors import CheckpointError
from arriero.shards.layout.families import parts_of
from arriero.shards.model_config.dense import ModelConfig
from support import triton_interpreter
from support.by_the_book import ByTheBook
from support.modelopt_files import float8_inputs, int8_inputs, nvfp4_inputs
from support.models import tiny_llama
from support.quantized_models import (
    ROUNDING,
    STATIC,
    WEIGHT_ONLY,
    dense_logits,
    quantized_llama,
)
from support.scaled_fp4 import block_scaled_product, scaled_mm_v2
from support.slices import CPU, logits_of

triton_interpreter.install()  # before anything imports the kernels

TOKENS = [3, 99, 14, 15, 92, 65, 35, 89, 79, 32, 38, 46, 26, 43, 38, 32, 79, 50, 28, 84]
LAYOUTS = [
    pytest.param(1, 1, id="TP1"),
    pytest.param(2, 1, id="TP2"),
    pytest.param(3, 1, id="TP3"),
    pytest.param(1, 2, id="PP2"),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Tensor]]:
    """Folder of each form, and the logits in float64 of what its numbers mean."""
    found = {}
    for form in (*WEIGHT_ONLY, *ROUNDING):
        path = tmp_path_factory.mktemp(form)
        # 4 heads of 16 and 96 columns: the cuts of TP2 and TP3 fall inside groups of 32
        config, means = quantized_llama(path, form)
        found[form] = path, dense_logits(config, means, TOKENS)
    return found


@pytest.mark.parametrize("kernels", ["reference", "cpu"])
@pytest.mark.parametrize(("tp", "pp"), LAYOUTS)
@pytest.mark.parametrize("form", WEIGHT_ONLY)
def test_weight_only(
    models: dict[str, tuple[Path, Tensor]], form: str, tp: int, pp: int, kernels: str
) -> None:
    path, want = models[form]
    got = logits_of(path, TOKENS, tp=tp, pp=pp, kernels=kernels)
    assert float((got - want).abs().max()) <= 1e-5 * float(want.abs().max())


SHORT = TOKENS[:8]
STACKS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("o_proj",), ("down_proj",))
_STEADY = 1e-6


def rounding(
    form: str, config: ModelConfig, means: dict[str, Tensor], tp: int
) -> Callable[[Tensor, str], Tensor]:
    """The rounding of inputs that a form defines.

    Stacked matrices share the greatest of their static scales. A scale for each row is that of the
    columns of a rank.
    """
    parts = parts_of(config, GroupConfig(model_path="x", tp=tp))

    def rounded(h: Tensor, name: str) -> Tensor:
        prefix, _, word = name.rpartition(".")
        if form.endswith("token"):
            sizes = [h.shape[1]]
            if word == "o_proj":
                sizes = [part.q_heads.size * config.head_dim for part in parts]
            elif word == "down_proj":
                sizes = [part.columns.size for part in parts]
            return torch.cat([int8_inputs(piece) for piece in h.split(sizes, 1)], 1)
        stack = next(stack for stack in STACKS if word in stack)
        scale = torch.stack([means[f"{prefix}.{one}.input_scale"] for one in stack]).amax()
        if "nvfp4" in form:
            return nvfp4_inputs(h, scale)
        return int8_inputs(h, scale) if form.startswith("int8") else float8_inputs(h, scale)

    def steady(h: Tensor, name: str) -> Tensor:
        """No input lies so near to a boundary that a sum's last bit turns its rounding."""
        for factor in (1 - _STEADY, 1 + _STEADY):
            off = rounded(h * factor, name) - rounded(h, name)
            assert float(off.abs().max()) < 1e-5 * float(h.abs().max()), "take other tokens"
        return rounded(h, name)

    return steady


Folder = tuple[Path, ModelConfig, dict[str, Tensor]]


@pytest.fixture(scope="module")
def static_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Folder]:
    """Folder of each form, its config and what its numbers mean."""
    folders = {form: tmp_path_factory.mktemp(form) for form in STATIC}
    return {form: (path, *quantized_llama(path, form, layers=1)) for form, path in folders.items()}


@pytest.mark.parametrize("kernels", ["reference", "cpu"])
@pytest.mark.parametrize("tp", [1, 2, 3])
@pytest.mark.parametrize("form", STATIC)
def test_activations_round_as_the_form_says(
    static_models: dict[str, Folder], form: str, tp: int, kernels: str
) -> None:
    path, config, means = static_models[form]
    want = dense_logits(config, means, SHORT, rounding(form, config, means, tp))
    got = logits_of(path, SHORT, tp=tp, kernels=kernels)
    assert float((got - want).abs().max()) <= 1e-5 * float(want.abs().max())
    plain = dense_logits(config, means, SHORT)
    assert float((plain - want).norm() / plain.norm()) > 1e-3  # the rounding is there


@pytest.mark.parametrize("tp", [1, 2, 3])
def test_nvfp4_by_the_block_scaled_product(
    static_models: dict[str, Folder], tp: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At TP3 a rank has 16 columns of the o product, which the product pads to 32."""
    pytest.importorskip("triton")
    from triton.runtime.interpreter import GridExecutor

    from arriero.kernels.triton import block_scaled, triton_ops

    interpret, lock, products = GridExecutor.__call__, threading.Lock(), []

    def interpret_alone(self: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        with lock:  # the interpreter has a single program at a time, and the ranks are threads
            return interpret(self, *args, **kwargs)

    def counted(*args: Any) -> Tensor:  # noqa: ANN401
        products.append(args[1].shape)
        return scaled_mm_v2(*args)

    monkeypatch.setattr(GridExecutor, "__call__", interpret_alone)
    path, config, means = static_models["modelopt-nvfp4"]
    want = dense_logits(config, means, SHORT, rounding("modelopt-nvfp4", config, means, tp))
    with block_scaled_product(counted):
        assert block_scaled.works_on(CPU)
        products.clear()
        make_ops = partial(triton_ops, CPU, batch_independent=False)
        got = logits_of(path, SHORT, tp=tp, make_ops=make_ops)
    assert float((got - want).abs().max()) <= 1e-5 * float(want.abs().max())
    assert len(products) == 4 * tp, "q, k and v; o; gate and up; down"


@pytest.mark.parametrize(("tp", "pp"), LAYOUTS)
@pytest.mark.parametrize("form", ROUNDING)
def test_rounded_activations_bit_for_bit(
    models: dict[str, tuple[Path, Tensor]], form: str, tp: int, pp: int
) -> None:
    path, dense = models[form]
    got = logits_of(path, TOKENS, tp=tp, pp=pp)
    book = logits_of(path, TOKENS, tp=tp, pp=pp, make_ops=lambda: ByTheBook(CPU))
    assert torch.equal(got, book)
    # and the rounding is there, and no larger than four significant bits explain
    off = float((got - dense).norm() / dense.norm())
    assert 1e-3 < off < 0.15


@pytest.mark.parametrize("form", ROUNDING)
def test_the_cpu_kernels_round_alike(models: dict[str, tuple[Path, Tensor]], form: str) -> None:
    """A sum's last bit may turn a rounding to float8: close, not equal."""
    path, _ = models[form]
    want = logits_of(path, TOKENS)
    got = logits_of(path, TOKENS, kernels="cpu")
    assert float((got - want).norm() / want.norm()) < 0.03


def test_quantized_weights_are_not_quantized_again(tmp_path: Path) -> None:
    quantized_llama(tmp_path, "awq", layers=1)
    with pytest.raises(CheckpointError, match="quantized already"):
        logits_of(tmp_path, TOKENS, quantization="int8")


def test_half_quantized_products_are_refused(tmp_path: Path) -> None:
    quantized_llama(tmp_path / "a", "fbgemm_fp8", layers=1)
    tiny_llama(tmp_path / "b", layers=1)
    settings = json.loads((tmp_path / "a" / "config.json").read_text())
    settings["quantization_config"]["modules_to_not_convert"] += ["model.layers.0.mlp.up_proj"]
    (tmp_path / "a" / "config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=r"up_proj.* has dtype .*float8"):
        logits_of(tmp_path / "a", TOKENS)
