"""The calibrated scales of a KV cache that a checkpoint ships, as powers of two.

Calibration writes the greatest magnitude of a layer's keys and values / 448, so that key / scale
fits float8_e4m3fn. A scale is rounded up to a power of two: e4m3 is a floating-point type, which
loses no precision by that, and a power of two multiplies every weight exactly. Knows the names of
the tensors; knows nothing of the weights that take the scales.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from arriero.shards.checkpoint.fit import KV_SCALES
from arriero.shards.checkpoint.formats.stored import text_prefix
from arriero.shards.checkpoint.reader import Checkpoint
from arriero.shards.checkpoint.side_files import side_file
from arriero.shards.checkpoint.tensor_folder import TensorFolder
from arriero.shards.errors import CheckpointError
from arriero.shards.files.json_file import read_json_object
from arriero.shards.layout.dense import Span

_PLACES = ("{0}_proj.{0}_scale", "attn.{0}_scale", "{0}_scale", "{0}_proj.output_scale")
"""Names within `self_attn.`, for "k" and "v": ModelOpt's and the two of compressed-tensors."""
_SHARED = ("kv_scale", "attn.kv_scale")
"""Names of a scale of both keys and values (AutoFP8)."""
_MOST_EXPONENT = 32
"""Bound of the exponents: beyond it factors could leave the range of the weights' dtypes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KvScales:
    """Scales of a layer, powers of two; the cache stores key / k and value / v."""

    k: float = 1.0
    v: float = 1.0


NO_SCALES = KvScales()


def kv_scales(checkpoint: Checkpoint, layers: Span) -> dict[int, KvScales]:
    """Scales of the layers whose scales are stored, by number of the layer.

    Of a scale for each head, the layer takes the greatest. A scale of 0 or less means that nothing
    was calibrated. Scales of 4-bit caches are not read: they are of another range.

    Raises:
        CheckpointError: a scale is empty, infinite or not a number; the message names the tensor.
    """
    if not any(name.endswith(KV_SCALES) for name in checkpoint.names) or _of_four_bits(checkpoint):
        return {}
    prefix = text_prefix(checkpoint.config)
    scales: dict[int, KvScales] = {}
    for layer in range(layers.start, layers.stop):
        name = f"{prefix}model.layers.{layer}.self_attn."
        of_layer = KvScales(k=_scale(checkpoint, name, "k"), v=_scale(checkpoint, name, "v"))
        if of_layer != NO_SCALES:
            scales[layer] = of_layer
    return scales


def _scale(folder: TensorFolder, prefix: str, kind: str) -> float:
    """The scale of "k" or "v" of a layer; 1 if none is stored."""
    places = [place.format(kind) for place in _PLACES]
    for place in (*places, *_SHARED):
        name = f"{prefix}{place}"
        if name in folder.stored:
            values = folder.copy(name).float().flatten()
            if not values.numel() or not values.isfinite().all():
                raise CheckpointError(
                    f"{folder.stored[name].file}: tensor {name!r} must hold a finite number for "
                    "the layer or for each head; calibrate the checkpoint again, or use "
                    "`kv: {dtype: int8}`, which needs no scales"
                )
            return _power_of_two(values.max().item())
    return 1.0


def _power_of_two(scale: float) -> float:
    """The least power of two that is not below `scale`, within the bound of the exponents."""
    if scale <= 0:
        return 1.0
    fraction, exponent = math.frexp(scale)  # scale = fraction * 2^exponent, 0.5 <= fraction < 1
    if fraction == 0.5:
        exponent -= 1
    return math.ldexp(1.0, max(-_MOST_EXPONENT, min(_MOST_EXPONENT, exponent)))


def _of_four_bits(checkpoint: Checkpoint) -> bool:
    """Whether the checkpoint's settings state a KV cache of 4 bits."""
    settings = read_json_object(checkpoint.path / "config.json")
    form: Any = settings.get("quantization_config")
    file = side_file(checkpoint.path)
    if form is None and file is not None:
        form = read_json_object(file)
    if isinstance(form, Mapping) and isinstance(form.get("quantization"), Mapping):
        form = form["quantization"]
    if not isinstance(form, Mapping):
        return False
    scheme = form.get("kv_cache_scheme")
    algorithm = str(form.get("kv_cache_quant_algo")).upper()
    return "FP4" in algorithm or (isinstance(scheme, Mapping) and scheme.get("num_bits") == 4)
