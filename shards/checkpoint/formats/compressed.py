"""The forms of compressed-tensors, from `quantization_config` in config.json.

Supported formats: `float-quantized` (float8 with a scale for each row or matrix), `int-quantized`
(8 bits) and `pack-quantized` (4 bits in groups, 8 bits by row; weights only). The 8-bit formats may
round activations, with a scale for each token or a static scale. A missing field gets the default
of the compressed-tensors library. Needs no torch; knows nothing of tensors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypedDict

from arriero.shards.checkpoint.formats.names import read_names
from arriero.shards.checkpoint.formats.scheme import QuantScheme
from arriero.shards.model_config.fields import Fields

FORMATS = ("float-quantized", "int-quantized", "pack-quantized")
_REMEDY = "use the plain checkpoint and set `quantization`, or a checkpoint in a supported form"
_MAX_GROUPS = 1000

KV_NOTE = (
    "`kv_cache_scheme` does not set the dtype of the KV cache: `kv: {dtype: fp8}` does, and takes "
    "k_scale and v_scale; other dtypes are more exact and need none"
)


def read_compressed(read: Fields) -> QuantScheme | None:
    """The scheme of all quantized matrices; None if nothing is quantized.

    Raises:
        CheckpointError: an unsupported form; the message names the field.
    """
    _refuse_sparse_and_transformed(read)
    groups = read.get("config_groups")
    if read.get("format") == "dense" and not groups:
        return None
    if not isinstance(groups, Mapping) or not 0 < len(groups) <= _MAX_GROUPS:
        raise read.wrong("config_groups", groups, "an object with at least one group")
    schemes = [_group(read, name, group) for name, group in groups.items()]
    weight_schemes = [scheme for scheme in schemes if scheme is not None]
    if not weight_schemes:
        raise read.wrong("config_groups", groups, "an object with `weights` in at least one group")
    first = weight_schemes[0]
    if any(replace(scheme, targets=()) != replace(first, targets=()) for scheme in weight_schemes):
        raise read.wrong(
            "config_groups",
            sorted(groups),
            f"groups with equal forms: mixed forms are not supported; {_REMEDY}",
        )
    covers_all = any(not scheme.targets for scheme in weight_schemes)
    targets = tuple(name for scheme in weight_schemes for name in scheme.targets)
    kv_scheme = read.get("kv_cache_scheme") or len(weight_schemes) < len(schemes)
    return replace(
        first,
        targets=() if covers_all else targets,
        ignored=read_names(read, "ignore"),
        notes=(KV_NOTE,) if kv_scheme else (),
    )


def _refuse_sparse_and_transformed(read: Fields) -> None:
    sparse = read.get("sparsity_config")
    if isinstance(sparse, Mapping) and sparse.get("format") not in (None, "dense"):
        raise read.wrong("sparsity_config", sparse, f'null or of format "dense"; {_REMEDY}')
    transform = read.get("transform_config")
    if isinstance(transform, Mapping) and transform.get("config_groups"):
        raise read.wrong(
            "transform_config", transform, f"null: rotations are not supported; {_REMEDY}"
        )


def _group(read: Fields, name: str, group: Any) -> QuantScheme | None:  # noqa: ANN401
    """The form of a group; None for a group that only quantizes the KV cache."""
    if not isinstance(group, Mapping):
        raise read.wrong("config_groups", group, "an object of objects")
    fields = Fields(group, f"{read.source}, {name}")
    targets = read_names(fields, "targets")
    inputs, outputs = fields.get("input_activations"), fields.get("output_activations")
    weights_object = fields.get("weights")
    if weights_object is None and inputs is None and outputs is not None and _is_kv(targets):
        return None
    if outputs is not None:
        raise fields.wrong(
            "output_activations", outputs, f"null: rounded outputs are not supported; {_REMEDY}"
        )
    if not targets:
        raise fields.wrong("targets", fields.get("targets"), 'a list such as ["Linear"]')
    if not isinstance(weights_object, Mapping):
        raise fields.wrong("weights", weights_object, "an object")
    weights = Fields(weights_object, f"{fields.source}, weights")
    scheme = _form(read, fields, weights)
    return replace(scheme, targets=() if "Linear" in targets else targets)


def _is_kv(targets: tuple[str, ...]) -> bool:
    return bool(targets) and all(name.endswith(("k_proj", "v_proj")) for name in targets)


def _form(read: Fields, group: Fields, weights: Fields) -> QuantScheme:
    inputs = group.get("input_activations")
    numbers = weights.one_of("type", ("int", "float"), "int")
    form = _format(read, group, numbers, weights.size("num_bits", 8))
    if weights.get("dynamic") not in (None, False):
        raise weights.wrong("dynamic", weights.get("dynamic"), "false")
    if form == "float-quantized":
        if weights.size("num_bits", 8) != 8 or numbers != "float":
            raise weights.wrong("num_bits", weights.get("num_bits"), "8, of `type` float")
        _check_symmetric(weights)
        return QuantScheme(
            method="compressed-tensors",
            per_tensor=_strategy(weights, ("channel", "tensor")) == "tensor",
            **_activations(group, inputs, "float"),
        )
    if inputs is not None and form == "pack-quantized":
        raise group.wrong(
            "input_activations",
            inputs,
            "null: integer activations with packed weights (W4A8) are not supported; use a "
            "weight-only checkpoint (W4A16, W8A16), a W8A8 or FP8 checkpoint, or the plain "
            "checkpoint with `quantization: int8`",
        )
    if numbers != "int":
        raise weights.wrong("type", numbers, f'"int" in format {form}')
    if form == "int-quantized":
        if weights.size("num_bits", 8) != 8:
            raise weights.wrong("num_bits", weights.get("num_bits"), "8 in format int-quantized")
        _check_symmetric(weights)
        per_tensor = _strategy(weights, ("channel", "tensor")) == "tensor"
        return QuantScheme(
            method="int-quantized", per_tensor=per_tensor, **_activations(group, inputs, "int")
        )
    return _packed(weights)


def _format(read: Fields, group: Fields, numbers: str, bits: int) -> str:
    """Format of the group, else of the checkpoint, else the usual format for the numbers."""
    usual = "float-quantized" if numbers == "float" else "pack-quantized"
    if numbers == "int" and group.get("input_activations") is not None and bits == 8:
        usual = "int-quantized"
    format_name = group.get("format") or read.get("format") or usual
    if format_name == "naive-quantized":
        return "float-quantized" if numbers == "float" else "int-quantized"
    if format_name not in FORMATS:
        fields = group if group.get("format") else read
        raise fields.wrong("format", format_name, f"one of {', '.join(FORMATS)}; {_REMEDY}")
    return str(format_name)


def _strategy(weights: Fields, known: tuple[str, ...]) -> str:
    """How numbers share scales; a missing strategy follows from the group size."""
    strategy, size = weights.get("strategy"), weights.get("group_size")
    if strategy is None:
        strategy = "tensor" if size is None else "channel" if size == -1 else "group"
    strategy = str(strategy).lower()
    if strategy not in known:
        raise weights.wrong("strategy", strategy, f"one of {', '.join(known)}; {_REMEDY}")
    return strategy


def _check_symmetric(weights: Fields) -> None:
    if weights.get("symmetric") is not None and not weights.flag("symmetric"):
        raise weights.wrong("symmetric", False, f"true in this format; {_REMEDY}")


class _Activations(TypedDict):
    activation_bound: float | None
    input_scale: bool


def _activations(group: Fields, inputs: Any, numbers: str) -> _Activations:  # noqa: ANN401
    """The rounding of activations; `numbers` is the type of the weights, int or float."""
    if inputs is None:
        return {"activation_bound": None, "input_scale": False}
    if not isinstance(inputs, Mapping):
        raise group.wrong("input_activations", inputs, "an object")
    read = Fields(inputs, f"{group.source}, input_activations")
    if read.size("num_bits", 8) != 8 or read.get("type") not in (None, numbers):
        raise read.wrong("num_bits", read.get("num_bits"), f"8, of `type` {numbers}")
    if read.get("dynamic") not in (None, True, False):
        raise read.wrong("dynamic", read.get("dynamic"), "true or false")
    static = read.get("dynamic") is not True
    known, strategy = "tensor" if static else "token", read.get("strategy")
    if strategy not in (None, known):
        raise read.wrong(
            "strategy",
            strategy,
            f"{known} where `dynamic` is {str(not static).lower()}: other activation scales are "
            f"not supported; {_REMEDY}",
        )
    _check_symmetric(read)
    return {"activation_bound": None if static else math.inf, "input_scale": static}


def _packed(weights: Fields) -> QuantScheme:
    bits = weights.size("num_bits", 4)
    by_group = _strategy(weights, ("group", "channel")) == "group"
    symmetric = weights.get("symmetric") is None or weights.flag("symmetric")
    if bits not in (4, 8):
        raise weights.wrong("num_bits", bits, f"4 or 8; {_REMEDY}")
    if bits == 8 and (by_group or not symmetric):
        raise weights.wrong(
            "num_bits", 8, f"4, or 8 with strategy channel and symmetric; {_REMEDY}"
        )
    return QuantScheme(
        method="pack-quantized",
        bits=bits,
        group_size=weights.size("group_size", 128) if by_group else 0,
        symmetric=symmetric,
        act_order=_stores_group_index(weights) and by_group,
    )


def _stores_group_index(weights: Fields) -> bool:
    """Whether `weight_g_idx` is stored: columns were sorted, and groups are not consecutive."""
    order = weights.get("actorder")
    if order is None or isinstance(order, bool):
        return bool(order)
    if not isinstance(order, str) or order.lower() not in (*_IN_ORDER, *_OUT_OF_ORDER):
        raise weights.wrong(
            "actorder", order, f"null or one of {', '.join((*_IN_ORDER, *_OUT_OF_ORDER))}"
        )
    return order.lower() in _OUT_OF_ORDER


_IN_ORDER = ("static", "weight")
"""Groups are consecutive stored columns, in any order of quantization."""
_OUT_OF_ORDER = ("group", "dynamic")
