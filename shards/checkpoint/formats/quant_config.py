"""The quantized matrices of a checkpoint and their form, from `quantization_config`.

Supported forms: `fbgemm_fp8` (Meta's Llama 3.1 405B FP8), `fp8` (a scale for each matrix or row),
compressed-tensors (see `compressed`), AWQ ("gemm" layout), GPTQ and ModelOpt (see `modelopt`).
Needs no torch; knows nothing of tensors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from arriero.shards.checkpoint.formats.compressed import read_compressed
from arriero.shards.checkpoint.formats.modelopt import read_modelopt
from arriero.shards.checkpoint.formats.names import PATTERN, check_names, read_names
from arriero.shards.checkpoint.formats.scheme import QuantScheme
from arriero.shards.model_config.fields import Fields

METHODS = ("fbgemm_fp8", "fp8", "compressed-tensors", "awq", "gptq", "modelopt")
"""Values of `quant_method`."""

_UNQUANTIZED = ("modules_to_not_convert", "ignored_layers")
_REMEDY = "use the plain checkpoint and set `quantization`, or a checkpoint in a supported form"


def read_scheme(settings: Mapping[str, Any], *, source: str = "config.json") -> QuantScheme | None:
    """The scheme in the object of config.json; None for plain weights.

    Raises:
        CheckpointError: an unsupported form or an invalid field.
    """
    name = "quantization_config"
    if settings.get(name) is None and settings.get("compression_config") is not None:
        name = "compression_config"  # the old field name of compressed-tensors
    quant_settings = settings.get(name)
    if quant_settings is None:
        return None
    whole = Fields(settings, source)
    if not isinstance(quant_settings, Mapping):
        raise whole.wrong(name, quant_settings, "an object")
    if not quant_settings:
        return None
    return scheme_of(Fields(quant_settings, f"{source}, {name}"))


def scheme_of(read: Fields, default: str | None = None) -> QuantScheme | None:
    """The scheme in a `quantization_config` object.

    Args:
        read: fields of the object.
        default: `quant_method` for an object without this field.

    Raises:
        CheckpointError: an unsupported form or an invalid field.
    """
    method = read.get("quant_method") or default
    if method is None and read.get("config_groups") is not None:
        method = "compressed-tensors"
    if method == "fbgemm_fp8":
        return QuantScheme(
            method="fbgemm_fp8",
            activation_bound=read.number("activation_scale_ub", 1200.0, low=1e-6),
            ignored=read_names(read, *_UNQUANTIZED),
        )
    if method == "fp8":
        return _fp8(read)
    if method == "compressed-tensors":
        return read_compressed(read)
    if method == "awq":
        return _awq(read)
    if method == "gptq":
        return _gptq(read)
    if method in ("modelopt", "modelopt_fp4"):
        return read_modelopt(read)
    raise read.wrong("quant_method", method, f"one of {', '.join(METHODS)}; {_REMEDY}")


def _fp8(read: Fields) -> QuantScheme:
    """A scale for each matrix or row; activations have a scale for each row, or a static scale."""
    block = read.get("weight_block_size")
    if block is not None:
        raise read.wrong(
            "weight_block_size", block, f"null: block scales are not supported; {_REMEDY}"
        )
    static = read.one_of("activation_scheme", ("dynamic", "static"), "dynamic") == "static"
    return QuantScheme(
        method="fp8",
        activation_bound=None if static else math.inf,
        input_scale=static,
        per_tensor=True,
        ignored=read_names(read, *_UNQUANTIZED),
    )


def _awq(read: Fields) -> QuantScheme:
    _four_bits(read, "bits", "w_bit")
    version = read.get("version")
    if version is not None and (not isinstance(version, str) or version.lower() != "gemm"):
        raise read.wrong("version", version, f'"gemm"; {_REMEDY}')
    if read.get("zero_point") is not None and not read.flag("zero_point"):
        raise read.wrong("zero_point", False, "true: AWQ checkpoints store zero points")
    return QuantScheme(
        method="awq",
        group_size=_group_size(read, "group_size", "q_group_size"),
        ignored=read_names(read, *_UNQUANTIZED),
    )


def _gptq(read: Fields) -> QuantScheme:
    _four_bits(read, "bits", "w_bit")
    form = read.one_of("checkpoint_format", ("gptq", "gptq_v2"), "gptq")
    for name in ("is_marlin_format", "lm_head"):
        if read.flag(name):
            raise read.wrong(name, True, f"false: this layout is not supported; {_REMEDY}")
    return QuantScheme(
        method="gptq",
        group_size=_group_size(read, "group_size"),
        act_order=read.flag("desc_act"),
        zero_offset=1 if form == "gptq" else 0,
        ignored=(*read_names(read, *_UNQUANTIZED), *_unquantized_patterns(read)),
        targets=read_names(read, "modules_in_block_to_quantize"),
    )


def _unquantized_patterns(read: Fields) -> tuple[str, ...]:
    """Patterns of unquantized matrices in GPTQModel's `dynamic` (keys that begin with "-:")."""
    dynamic = read.get("dynamic")
    if dynamic is None:
        return ()
    if not isinstance(dynamic, Mapping):
        raise read.wrong("dynamic", dynamic, "an object")
    for pattern in dynamic:
        if not str(pattern).startswith("-:"):
            raise read.wrong(
                "dynamic",
                pattern,
                f'only patterns that begin with "-:": mixed widths are not supported; {_REMEDY}',
            )
    patterns = tuple(f"{PATTERN}{str(pattern)[2:]}" for pattern in dynamic)
    check_names(read, "dynamic", patterns)
    return patterns


def _four_bits(read: Fields, *names: str) -> None:
    name = next((name for name in names if read.get(name) is not None), names[0])
    bits = read.size(name, 4)
    if bits != 4:
        raise read.wrong(name, bits, f"4; {_REMEDY}")


def _group_size(read: Fields, *names: str) -> int:
    """Columns that share a scale; 0 for a whole row (-1 in files)."""
    name = next((name for name in names if read.get(name) is not None), names[0])
    return 0 if read.get(name) == -1 else read.size(name, 128)
