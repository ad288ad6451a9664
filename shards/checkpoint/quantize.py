"""Conversion of a plain checkpoint to a quantized checkpoint in compressed-tensors' layout.

Knows which matrices are quantized and how compressed-tensors stores them; knows nothing of the
choice of levels (see `kernels.quantize`). Memory holds one matrix of the result.

Layout: compressed-tensors (Neural Magic): `float-quantized` with one scale a row, or
`pack-quantized`: `weight_packed` int32 [out, in * bits / 32] with the lowest number in the lowest
bits, each as an unsigned level; `weight_scale` [out, groups]; `weight_zero_point` int32
[out / 8, groups]; `weight_shape` int64 [2].
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from arriero.kernels.quantize import in_pieces, quantize_fp8, quantize_int4_whole, quantize_int8
from arriero.kernels.quantized_weight import QuantizedWeight
from arriero.shards.checkpoint.formats.describe import describe, read_settings
from arriero.shards.checkpoint.formats.modules import Module
from arriero.shards.checkpoint.formats.nibbles import NIBBLES
from arriero.shards.checkpoint.formats.products import ProductReader
from arriero.shards.checkpoint.formats.scheme import QuantScheme
from arriero.shards.checkpoint.formats.stored import TensorSpec, modules_of, tensor_specs
from arriero.shards.checkpoint.reader import Checkpoint
from arriero.shards.checkpoint.safetensors_header import DTYPES
from arriero.shards.checkpoint.tensor_folder import TensorFolder
from arriero.shards.checkpoint.verify import verify
from arriero.shards.checkpoint.writer import Progress, new_folder, write_shards
from arriero.shards.errors import CheckpointError
from arriero.shards.files.json_file import read_json_object
from arriero.shards.layout.parts import AnyModel

To = Literal["int8", "int4", "fp8"]
TO: tuple[To, ...] = ("int8", "int4", "fp8")

KEPT = ("head", "router", "vision")
"""Kinds of matrices that are copied unchanged."""
_WEIGHTS = {".safetensors", ".bin", ".pth", ".pt", ".gguf", ".onnx", ".h5", ".msgpack"}
_MAX_COPIED_BYTES = 200_000_000
_EXPERT_PARTS = ("gate_proj", "up_proj", "down_proj")


def quantize_checkpoint(
    source: Path, out: Path, to: To, *, group_size: int = 32, progress: Progress | None = None
) -> None:
    """Write `source` with quantized weights; activations stay unquantized.

    Tables, head, norms, routers and vision are copied unchanged. The result loads in arriero and in
    each program that reads compressed-tensors. The folder appears complete or not at all.

    Args:
        source: folder of plain weights.
        out: new folder; must not exist.
        to: target: int8 and fp8 with a scale for each row, int4 in groups with integer zero points.
        group_size: columns of an int4 group.
        progress: called after each written tensor.

    Raises:
        CheckpointError: the source is incomplete or quantized already, a matrix does not divide
            into groups, or `out` exists.
    """
    model, scheme = describe(source)
    if scheme is not None:
        raise CheckpointError(
            f"{source}: is quantized already ({scheme.method}); give the original plain checkpoint"
        )
    report = verify(source)
    if not report.ok:
        raise CheckpointError("; ".join(report.problems[:5]))
    settings = read_json_object(source / "config.json")
    layout = QuantScheme(method="compressed-tensors")  # experts as separate modules
    modules = modules_of(model, layout)
    ignored = [module.name for module in modules if module.product and module.kind in KEPT]
    if not any(name.endswith("lm_head") for name in ignored):
        ignored.append("lm_head")  # tied: not stored, but other readers treat it as a matrix
    settings["quantization_config"] = quantization_config(to, group_size, ignored)
    target = read_settings(settings, source=str(source / "config.json"))[1]
    assert target is not None, "just added"
    with new_folder(out) as partial:
        (partial / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
        _copy_rest(source, partial)
        quantizer = _Quantizer(Checkpoint.open(source), model, target, to)
        entries = {spec.name: (quantizer.dtype(spec), spec.shape) for spec in quantizer.specs}
        write_shards(partial, entries, quantizer.tensor, progress)


def quantization_config(to: To, group_size: int, ignored: list[str]) -> dict[str, Any]:
    """The `quantization_config` object of the result."""
    weights: dict[str, Any] = {"dynamic": False, "symmetric": to != "int4"}
    if to == "int4":
        weights |= {"num_bits": 4, "type": "int", "strategy": "group", "group_size": group_size}
    else:
        kind = "float" if to == "fp8" else "int"
        weights |= {"num_bits": 8, "type": kind, "strategy": "channel", "group_size": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized" if to == "fp8" else "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": weights,
                "input_activations": None,
                "output_activations": None,
            }
        },
        "ignore": ignored,
        "kv_cache_scheme": None,
    }


class _Quantizer:
    """Computes the tensors of the result, by name."""

    def __init__(self, folder: TensorFolder, model: AnyModel, target: QuantScheme, to: To) -> None:
        self._folder, self._to = folder, to
        self._plain = ProductReader(folder, None)
        self._dtype: torch.dtype = getattr(torch, model.torch_dtype)
        self.specs = tensor_specs(model, target)
        self._covered = {
            module.name: module
            for module in modules_of(model, target)
            if module.product and target.covers(module.name, module.kind)
        }
        levels: dict[To, Callable[[Tensor], QuantizedWeight]] = {
            "int8": lambda w: quantize_int8(w, scale_dtype=self._dtype),
            "fp8": quantize_fp8,
            "int4": lambda w: quantize_int4_whole(w, target.group_size, scale_dtype=self._dtype),
        }
        self._levels = levels[to]
        self._last: tuple[str, dict[str, Tensor]] = ("", {})

    def dtype(self, spec: TensorSpec) -> torch.dtype:
        """Dtype of a tensor of the result."""
        if spec.name.removesuffix(".weight_scale") in self._covered and spec.scale:
            return torch.float32 if self._to == "fp8" else self._dtype
        if (
            spec.name in self._folder.stored
            and spec.name.removesuffix(".weight") not in self._covered
        ):
            return self._folder.dtype(spec.name)
        return DTYPES[spec.dtypes[0]]

    def tensor(self, name: str) -> Tensor:
        """A tensor; successive calls for the tensors of a matrix quantize the matrix once."""
        module_name, _, suffix = name.rpartition(".")
        module = self._covered.get(module_name)
        if module is None or suffix == "bias":
            return self._folder.tensor(name)
        if self._last[0] != module_name:
            self._last = (module_name, self._store(module))
        return self._last[1][suffix]

    def _store(self, module: Module) -> dict[str, Tensor]:
        weight = in_pieces(self._levels, self._matrix(module))
        if weight.kind == "fp8":
            return {"weight": weight.data, "weight_scale": weight.scales}
        shape = torch.tensor([weight.out_features, weight.in_features])
        scales = weight.scales.to(self._dtype)
        if weight.kind == "int8":
            levels = (weight.data.view(torch.uint8) ^ 0x80).contiguous()  # plus 128
            return {
                "weight_packed": levels.view(torch.int32),
                "weight_scale": scales,
                "weight_shape": shape,
            }
        assert weight.zeros is not None, "int4 in this layout has zero points"
        return {
            "weight_packed": weight.data.view(torch.int32),
            "weight_scale": scales,
            "weight_zero_point": _pack_rows(weight.zeros.to(torch.int32)),
            "weight_shape": shape,
        }

    def _matrix(self, module: Module) -> Tensor:
        if module.expert is None:
            weight = self._plain.product(module.name).weight
        else:
            prefix, _, part = module.name.rsplit(".", 2)
            parts = self._plain.expert(prefix, module.expert)
            weight = parts[_EXPERT_PARTS.index(part)].weight
        assert isinstance(weight, Tensor), "the source is plain"
        return weight


def _pack_rows(value_OG: Tensor) -> Tensor:
    """Pack numbers 0 .. 15 as int32 [ceil(O / 8), G], the first row in the lowest bits."""
    value_OG = F.pad(value_OG, (0, 0, 0, -value_OG.shape[0] % NIBBLES))
    value_WNG = value_OG.view(-1, NIBBLES, value_OG.shape[1])
    words = torch.zeros_like(value_WNG[:, 0])
    for nibble in range(NIBBLES):
        words |= value_WNG[:, nibble] << 4 * nibble
    return words


def _copy_rest(source: Path, out: Path) -> None:
    """Copy tokenizer, templates and other small files, but not weights and index."""
    for file in sorted(source.iterdir()):
        is_index = file.name.endswith(".index.json") or file.name == "config.json"
        if not file.is_file() or file.name.startswith(".") or is_index:
            continue
        if file.suffix not in _WEIGHTS and file.stat().st_size <= _MAX_COPIED_BYTES:
            shutil.copy2(file, out / file.name)
