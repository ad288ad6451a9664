"""Llama 4 in each form of weights, in real groups: the text that the form's numbers say.

What a form means is written out as a plain float32 checkpoint, experts fused, which one slice of
the reference runs; tests/oracle/test_llama4.py holds that against transformers.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from arriero.kernels.quantize import quantize_fp8, quantize_int4, quantize_int8
from arriero.kernels.quantized_weight import QuantizedWeight
from arriero.shards.checkpoint.quantize import TO, quantize_checkpoint
from arriero.shards.checkpoint.tensor_folder import TensorFolder
from arriero.shards.config.group import GroupConfig
from arriero.shards.config.sampling_params import SamplingParams
from support.groups import running
from support.models import tiny_llama4, write_safetensors
from support.quantized_models import meaning

SETTINGS = {"moe_step": 2, "qk_norm": False, "experts": 4, "heads": 6, "kv_heads": 3}
TEXT = [(7 + 3 * j * j) % 128 for j in range(80)]
LAYOUTS = {"TP1": {}, "TP2": {"tp": 2}, "TP3": {"tp": 3}, "EP2": {"dp": 2}, "PP2": {"pp": 2}}
ON_LOAD: dict[str, Callable[[Tensor], QuantizedWeight]] = {
    "int8": quantize_int8,
    "int4": quantize_int4,
    "fp8": quantize_fp8,
}
TABLES = ("embed_tokens.weight", "lm_head.weight")


def plain(folder: TensorFolder, of: Callable[[str, Tensor], Tensor]) -> dict[str, Tensor]:
    """The tensors of a fused float32 checkpoint, each matrix [out, in] passed through `of`."""
    made: dict[str, Tensor] = {}
    for name in folder.names:
        whole = folder.tensor(name).float()
        if ".experts." in name:
            parts = 2 if "gate_up" in name else 1
            pieces = [one.T.chunk(parts) for one in whole]
            fused = [torch.cat([of(name, p.contiguous()) for p in each]).T for each in pieces]
            made[name] = torch.stack(fused).contiguous()
        else:
            made[name] = of(name, whole)
    return made


def written(folder: TensorFolder, fused: TensorFolder) -> dict[str, Tensor]:
    """What a quantized folder of unfused experts means, under the names of the fused one."""
    made: dict[str, Tensor] = {}
    for name in fused.names:
        if ".experts." in name:
            prefix, part = name.rsplit(".", 1)
            names = ("gate_proj", "up_proj") if part == "gate_up_proj" else ("down_proj",)
            each = [
                torch.cat([meaning(folder, f"{prefix}.{e}.{one}") for one in names]).T
                for e in range(SETTINGS["experts"])
            ]
            made[name] = torch.stack(each).float().contiguous()
        elif name in folder.stored and f"{name}_scale" not in folder.stored:
            made[name] = folder.tensor(name).float()
        else:
            made[name] = meaning(folder, name.removesuffix(".weight")).float()
    return made


def logprobs(folder: Path, layout: dict[str, int], **more: str | None) -> Tensor:
    """Of each token of the text, given those before it."""
    config = GroupConfig(
        model_path=str(folder),
        dtype="float32",
        kernels="reference",
        num_blocks=64,
        max_sequences=4,
        threads=1,
        **layout,
        **more,
    )
    params = SamplingParams(temperature=0.0, max_tokens=1, seed=0, prompt_logprobs=0)
    with running(config) as group:
        (answer,) = group.generate([TEXT], params)
    assert answer.error is None, answer.error
    return torch.tensor([one.logprob for one in answer.prompt_logprobs])


def same(path: Path, layout: str, means: dict[str, Tensor], **more: str | None) -> None:
    """The folder's text in the layout, against what it means."""
    dense = path.with_name(f"{path.name}-dense")
    dense.mkdir()
    settings = json.loads((path / "config.json").read_text())
    settings.pop("quantization_config", None)
    (dense / "config.json").write_text(json.dumps(settings))
    write_safetensors(dense / "model.safetensors", means)
    want, got = logprobs(dense, {}), logprobs(path, LAYOUTS[layout], **more)
    off = float((got - want).abs().max() / want.abs().max())
    print(f"off by {off:.1e}")
    assert off < 1e-5


SLOW = pytest.mark.slow
# a form and a layout that nothing else stands for are always run; the rest when there is time
CELLS = [
    pytest.param(
        to, layout, marks=() if (to, layout) in (("int4", "EP2"), ("fp8", "PP2")) else SLOW
    )
    for to in TO
    for layout in LAYOUTS
]


@pytest.mark.parametrize(("to", "layout"), CELLS)
def test_written(tmp_path: Path, to: str, layout: str) -> None:
    """As compressed-tensors, experts apart, the router and the head ignored."""
    tiny_llama4(tmp_path / "fused", seed=4, **SETTINGS)
    quantize_checkpoint(tmp_path / "fused", tmp_path / "quantized", to)  # type: ignore[arg-type]
    folders = [TensorFolder.of(tmp_path / one) for one in ("quantized", "fused")]
    same(tmp_path / "quantized", layout, written(*folders))


@pytest.mark.parametrize(
    ("to", "layout"),
    [
        pytest.param(to, layout, marks=() if (to, layout) == ("int8", "EP2") else SLOW)
        for to in ON_LOAD
        for layout in ("TP1", "EP2", "PP2")
    ],
)
def test_quantized_on_load(tmp_path: Path, to: str, layout: str) -> None:
    """Slices of columns have scales of their own: cuts by tensor parallelism mean other numbers."""
    tiny_llama4(tmp_path / "fused", seed=4, **SETTINGS)

    def of(name: str, matrix: Tensor) -> Tensor:
        if matrix.ndim == 1 or "router" in name:
            return matrix
        quantize = quantize_int8 if name.endswith(TABLES) else ON_LOAD[to]
        return quantize(matrix).dequantize()

    means = plain(TensorFolder.of(tmp_path / "fused"), of)
    same(tmp_path / "fused", layout, means, quantization=to)


@pytest.mark.parametrize("layout", [pytest.param(one, marks=SLOW) for one in ("TP2", "TP3", "EP2")])
def test_bfloat16_fused(tmp_path: Path, layout: str) -> None:
    """As Meta ships it; computed in float32, so that no token changes its expert."""
    tiny_llama4(tmp_path / "fused", seed=4, dtype="bfloat16", **SETTINGS)
    means = plain(TensorFolder.of(tmp_path / "fused"), lambda name, matrix: matrix)
    same(tmp_path / "fused", layout, means)
