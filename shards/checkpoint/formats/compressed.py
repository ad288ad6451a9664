"""The forms of compressed-tensors, from its object in config.json.

Formats known: `float-quantized` (float8 with a scale a row or a matrix), `int-quantized` (8 bits,
weights only) and `pack-quantized` (4 bits in groups, 8 bits by row; weights only), with the
defaults that its library gives to what an object leaves out. Needs no torch; knows no tensors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from arriero.shards.checkpoint.formats.names import read_names
from arriero.shards.checkpoint.formats.scheme import QuantScheme
from arriero.shards.model_config.dense import Fields

FORMATS = ("float-quantized", "int-quantized", "pack-quantized")
_REMEDY = "take the plain checkpoint and set `quantization`, or one in a form that is read"
_MAX_GROUPS = 1000

KV_NOTE = (
    "`kv_cache_scheme` is not followed: the KV cache keeps its own dtype, which is more exact; "
    "k_scale and v_scale are not read"
)


def read_compressed(read: Fields) -> QuantScheme | None:
    """The scheme of all products; None where nothing is quantized.

    Raises:
        CheckpointError: a form that is not read, by the field that says so.
    """
    _refuse_sparse_and_transformed(read)
    groups = read.get("config_groups")
    if read.get("format") == "dense" and not groups:
        return None
    if not isinstance(groups, Mapping) or not 0 < len(groups) <= _MAX_GROUPS:
        raise read.wrong("config_groups", groups, "an object with at least one group")
    schemes = [_group(read, name, group) for name, group in groups.items()]
    found = [one for one in schemes if one is not None]
    if not found:
        raise read.wrong("config_groups", groups, "with `weights` in at least one group")
    if any(replace(one, targets=()) != replace(found[0], targets=()) for one in found):
        raise read.wrong(
            "config_groups",
            sorted(groups),
            f"groups whose weights are of one form: mixed forms are not read; {_REMEDY}",
        )
    everything = any(not one.targets for one in found)
    return replace(
        found[0],
        targets=() if everything else tuple(name for one in found for name in one.targets),
        ignored=read_names(read, "ignore"),
        notes=(KV_NOTE,) if read.get("kv_cache_scheme") or len(found) < len(schemes) else (),
    )


def _refuse_sparse_and_transformed(read: Fields) -> None:
    sparse = read.get("sparsity_config")
    if isinstance(sparse, Mapping) and sparse.get("format") not in (None, "dense"):
        raise read.wrong(
            "sparsity_config", sparse, f'null or of format "dense": no other is read; {_REMEDY}'
        )
    turned = read.get("transform_config")
    if isinstance(turned, Mapping) and turned.get("config_groups"):
        raise read.wrong("transform_config", turned, f"null: rotations are not computed; {_REMEDY}")


def _group(read: Fields, name: str, group: Any) -> QuantScheme | None:  # noqa: ANN401
    """One group's form; None for one that only rounds the KV cache."""
    if not isinstance(group, Mapping):
        raise read.wrong("config_groups", group, "objects")
    fields = Fields(group, f"{read.source}, {name}")
    targets = read_names(fields, "targets")
    inputs, outputs = fields.get("input_activations"), fields.get("output_activations")
    found = fields.get("weights")
    if found is None and inputs is None and outputs is not None and _is_kv(targets):
        return None
    if outputs is not None:
        raise fields.wrong("output_activations", outputs, f"null: not computed; {_REMEDY}")
    if not targets:
        raise fields.wrong("targets", fields.get("targets"), 'a list such as ["Linear"]')
    if not isinstance(found, Mapping):
        raise fields.wrong("weights", found, "an object")
    weights = Fields(found, f"{fields.source}, weights")
    scheme = _form(read, fields, weights)
    return replace(scheme, targets=() if "Linear" in targets else targets)


def _is_kv(targets: tuple[str, ...]) -> bool:
    return bool(targets) and all(one.endswith(("k_proj", "v_proj")) for one in targets)


def _form(read: Fields, group: Fields, weights: Fields) -> QuantScheme:
    inputs = group.get("input_activations")
    numbers = weights.one_of("type", ("int", "float"), "int")
    form = _format(read, group, numbers)
    if weights.get("dynamic") not in (None, False):
        raise weights.wrong("dynamic", weights.get("dynamic"), "false")
    if form == "float-quantized":
        if weights.size("num_bits", 8) != 8 or numbers != "float":
            raise weights.wrong("num_bits", weights.get("num_bits"), "8, of `type` float")
        _symmetric(weights)
        return QuantScheme(
            method="compressed-tensors",
            activation_bound=_rounded_inputs(group, inputs),
            per_tensor=_strategy(weights, ("channel", "tensor")) == "tensor",
        )
    if inputs is not None:
        raise group.wrong(
            "input_activations",
            inputs,
            "null: integer activations (W8A8) are not computed; take a checkpoint of weights alone "
            "(W8A16, W4A16), an FP8 one, or the plain one with `quantization: int8`",
        )
    if numbers != "int":
        raise weights.wrong("type", numbers, f'"int" in format {form}')
    if form == "int-quantized":
        if weights.size("num_bits", 8) != 8:
            raise weights.wrong("num_bits", weights.get("num_bits"), "8 in format int-quantized")
        _symmetric(weights)
        per_tensor = _strategy(weights, ("channel", "tensor")) == "tensor"
        return QuantScheme(method="int-quantized", per_tensor=per_tensor)
    return _packed(weights)


def _format(read: Fields, group: Fields, numbers: str) -> str:
    """The group's format, the whole checkpoint's, or the one that goes with the numbers."""
    usual = "float-quantized" if numbers == "float" else "pack-quantized"
    found = group.get("format") or read.get("format") or usual
    if found == "naive-quantized":
        return "float-quantized" if numbers == "float" else "int-quantized"
    if found not in FORMATS:
        fields = group if group.get("format") else read
        raise fields.wrong(
            "format", found, f"one of {', '.join(FORMATS)}: no other is read; {_REMEDY}"
        )
    return str(found)


def _strategy(weights: Fields, known: tuple[str, ...]) -> str:
    """How numbers share scales; what an object leaves out follows from its group size."""
    found, size = weights.get("strategy"), weights.get("group_size")
    if found is None:
        found = "tensor" if size is None else "channel" if size == -1 else "group"
    found = str(found).lower()
    if found not in known:
        raise weights.wrong(
            "strategy", found, f"one of {', '.join(known)}: no other is read; {_REMEDY}"
        )
    return found


def _symmetric(weights: Fields) -> None:
    if weights.get("symmetric") is not None and not weights.flag("symmetric"):
        raise weights.wrong("symmetric", False, f"true: no other is read here; {_REMEDY}")


def _rounded_inputs(group: Fields, inputs: Any) -> float | None:  # noqa: ANN401
    """Bound of the float8 rounding of activations; None where they stay as they are."""
    if inputs is None:
        return None
    if not isinstance(inputs, Mapping):
        raise group.wrong("input_activations", inputs, "an object")
    taken = Fields(inputs, f"{group.source}, input_activations")
    if taken.get("dynamic") is not True:
        raise taken.wrong(
            "dynamic",
            taken.get("dynamic"),
            "true: static scales of activations (`input_scale`) are not computed; take a "
            "checkpoint with dynamic ones (FP8-dynamic), or the plain one with `quantization: fp8`",
        )
    if taken.size("num_bits", 8) != 8 or taken.get("type") not in (None, "float"):
        raise taken.wrong("num_bits", taken.get("num_bits"), "8, of `type` float")
    strategy = taken.get("strategy")
    if strategy not in (None, "token"):
        raise taken.wrong(
            "strategy", strategy, f"token: other scales of activations are not computed; {_REMEDY}"
        )
    _symmetric(taken)
    return math.inf


def _packed(weights: Fields) -> QuantScheme:
    bits = weights.size("num_bits", 4)
    by_group = _strategy(weights, ("group", "channel")) == "group"
    symmetric = weights.get("symmetric") is None or weights.flag("symmetric")
    if bits not in (4, 8):
        raise weights.wrong("num_bits", bits, f"4 or 8: no other width is read; {_REMEDY}")
    if bits == 8 and (by_group or not symmetric):
        raise weights.wrong(
            "num_bits", 8, f"of strategy channel, symmetric: no other is read; {_REMEDY}"
        )
    return QuantScheme(
        method="pack-quantized",
        bits=bits,
        group_size=weights.size("group_size", 128) if by_group else 0,
        symmetric=symmetric,
        act_order=_names_groups(weights) and by_group,
    )


def _names_groups(weights: Fields) -> bool:
    """Whether `weight_g_idx` is stored: only where columns were sorted and groups were not kept."""
    order = weights.get("actorder")
    if order is None or isinstance(order, bool):
        return bool(order)
    if not isinstance(order, str) or order.lower() not in (*_IN_ORDER, *_OUT_OF_ORDER):
        raise weights.wrong(
            "actorder", order, f"null or one of {', '.join((*_IN_ORDER, *_OUT_OF_ORDER))}"
        )
    return order.lower() in _OUT_OF_ORDER


_IN_ORDER = ("static", "weight")
"""Groups are runs of columns as stored, whatever order they were quantized in."""
_OUT_OF_ORDER = ("group", "dynamic")
