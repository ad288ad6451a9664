"""Which matrices of a checkpoint are quantized and how, from its `quantization_config`.

The forms known: `fbgemm_fp8` (Meta's Llama 3.1 405B FP8), `fp8` (one scale a matrix, or a row),
compressed-tensors (see `compressed`), AWQ ("gemm" layout) and GPTQ. Needs no torch; knows nothing
of tensors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from arriero.shards.checkpoint.formats.compressed import read_compressed
from arriero.shards.checkpoint.formats.names import PATTERN, check_names, read_names
from arriero.shards.checkpoint.formats.scheme import QuantScheme
from arriero.shards.model_config.dense import Fields

METHODS = ("fbgemm_fp8", "fp8", "compressed-tensors", "awq", "gptq")
"""Values of `quant_method`."""

_KEPT = ("modules_to_not_convert", "ignored_layers")
_REMEDY = "take the plain checkpoint and set `quantization`, or one in a form that is read"


def read_scheme(settings: Mapping[str, Any], *, source: str = "config.json") -> QuantScheme | None:
    """The scheme that config.json's object asks for; None for plain weights.

    Raises:
        CheckpointError: a form that is not known, or a field that cannot be.
    """
    name = "quantization_config"
    if settings.get(name) is None and settings.get("compression_config") is not None:
        name = "compression_config"  # compressed-tensors' first name for it
    found = settings.get(name)
    if found is None:
        return None
    whole = Fields(settings, source)
    if not isinstance(found, Mapping):
        raise whole.wrong(name, found, "an object")
    if not found:
        return None
    return scheme_of(Fields(found, f"{source}, {name}"))


def scheme_of(read: Fields, default: str | None = None) -> QuantScheme | None:
    """The scheme that a `quantization_config` object says.

    Args:
        read: its fields.
        default: `quant_method` where the object names none.

    Raises:
        CheckpointError: a form that is not known, or a field that cannot be.
    """
    method = read.get("quant_method") or default
    if method is None and read.get("config_groups") is not None:
        method = "compressed-tensors"
    if method == "fbgemm_fp8":
        return QuantScheme(
            method="fbgemm_fp8",
            activation_bound=read.number("activation_scale_ub", 1200.0, low=1e-6),
            ignored=read_names(read, *_KEPT),
        )
    if method == "fp8":
        return _fp8(read)
    if method == "compressed-tensors":
        return read_compressed(read)
    if method == "awq":
        return _awq(read)
    if method == "gptq":
        return _gptq(read)
    raise read.wrong(
        "quant_method", method, f"one of {', '.join(METHODS)}: no other is read; {_REMEDY}"
    )


def _fp8(read: Fields) -> QuantScheme:
    """One scale a matrix or a row; activations are rounded row by row."""
    block = read.get("weight_block_size")
    if block is not None:
        raise read.wrong(
            "weight_block_size", block, f"null: scales of blocks are not computed; {_REMEDY}"
        )
    scheme = read.get("activation_scheme")
    if scheme not in (None, "dynamic"):
        raise read.wrong(
            "activation_scheme",
            scheme,
            '"dynamic": static scales of activations (`input_scale`) are not computed; take a '
            "checkpoint with dynamic ones, or the plain one with `quantization: fp8`",
        )
    return QuantScheme(
        method="fp8",
        activation_bound=math.inf,
        per_tensor=True,
        ignored=read_names(read, *_KEPT),
    )


def _awq(read: Fields) -> QuantScheme:
    _four_bits(read, "bits", "w_bit")
    version = read.get("version")
    if version is not None and (not isinstance(version, str) or version.lower() != "gemm"):
        raise read.wrong("version", version, f'"gemm": no other layout is read; {_REMEDY}')
    if read.get("zero_point") is not None and not read.flag("zero_point"):
        raise read.wrong("zero_point", False, "true: AWQ stores its zero points")
    return QuantScheme(
        method="awq",
        group_size=_group_size(read, "group_size", "q_group_size"),
        ignored=read_names(read, *_KEPT),
    )


def _gptq(read: Fields) -> QuantScheme:
    _four_bits(read, "bits", "w_bit")
    form = read.one_of("checkpoint_format", ("gptq", "gptq_v2"), "gptq")
    for name in ("is_marlin_format", "lm_head"):
        if read.flag(name):
            raise read.wrong(name, True, f"false: it is not read; {_REMEDY}")
    return QuantScheme(
        method="gptq",
        group_size=_group_size(read, "group_size"),
        act_order=read.flag("desc_act"),
        zero_offset=1 if form == "gptq" else 0,
        ignored=(*read_names(read, *_KEPT), *_left_out(read)),
        targets=read_names(read, "modules_in_block_to_quantize"),
    )


def _left_out(read: Fields) -> tuple[str, ...]:
    """Patterns of GPTQModel's `dynamic` whose products it left as they were ("-:")."""
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
                f'only patterns after "-:": mixed widths are not read; {_REMEDY}',
            )
    patterns = tuple(f"{PATTERN}{str(one)[2:]}" for one in dynamic)
    check_names(read, "dynamic", patterns)
    return patterns


def _four_bits(read: Fields, *names: str) -> None:
    name = next((one for one in names if read.get(one) is not None), names[0])
    bits = read.size(name, 4)
    if bits != 4:
        raise read.wrong(name, bits, f"4: no other width is read; {_REMEDY}")


def _group_size(read: Fields, *names: str) -> int:
    """Columns that share a scale; 0 for a whole row, which files say as -1."""
    name = next((one for one in names if read.get(one) is not None), names[0])
    return 0 if read.get(name) == -1 else read.size(name, 128)
