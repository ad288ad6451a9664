"""Which matrices of a checkpoint are quantized and how, from its `quantization_config`.

The forms known: `fbgemm_fp8` (Meta's Llama 3.1 405B FP8), compressed-tensors' `float-quantized`
(Meta's Llama 4 Maverick FP8) and `pack-quantized` (4 or 8 bit integers), AWQ ("gemm" layout) and
GPTQ. Knows names and numbers; needs no torch and knows nothing of files.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from arriero.shards.models.config import Fields

Method = Literal["fbgemm_fp8", "compressed-tensors", "pack-quantized", "awq", "gptq"]

METHODS = ("fbgemm_fp8", "compressed-tensors", "awq", "gptq")
"""Values of `quant_method`."""

_MAX_IGNORED = 100_000
_MAX_PATTERN = 200
_SIMPLE = re.compile(r"\^?(?:[\w\-/]|\\\.|\.\*|\.|\\d\+)*\$?")
"""Patterns that cannot take long to match; ignore lists are input that anyone may write."""
_MAX_STARS = 4


@dataclass(frozen=True, kw_only=True)
class QuantScheme:
    """How the products of a checkpoint are stored.

    Attributes:
        method: the form; compressed-tensors stands for its `float-quantized` format, and its
            `pack-quantized` one is named so.
        bits: pack-quantized: of a number, 4 or 8.
        group_size: columns that share a scale (4 bits); 0 where a row has one scale.
        symmetric: pack-quantized: no zero points are stored, all are the middle level.
        act_order: gptq: rows of `qweight` are sorted by importance, `g_idx` names their groups.
        zero_offset: what a stored zero point lacks: 1 for gptq of version 1.
        activation_bound: float8 forms: each row of activations is rounded to float8 too, its scale
            at most this / 448 (fbgemm_fp8), inf for no bound (compressed-tensors with dynamic
            token scales); None: activations stay as they are.
        ignored: names, name prefixes, and patterns after "re:", of products left as they were.
    """

    method: Method
    bits: int = 0
    group_size: int = 0
    symmetric: bool = True
    act_order: bool = False
    zero_offset: int = 0
    activation_bound: float | None = None
    ignored: tuple[str, ...] = ()

    def covers(self, name: str, kind: str) -> bool:
        """Whether the product `name` (without `.weight`) of `kind` is quantized."""
        if self.method in ("awq", "gptq") and kind in ("head", "vision", "router"):
            return False
        names, patterns = self._sorted
        dotted = name.split(".")
        if any(".".join(dotted[:n]) in names for n in range(1, len(dotted) + 1)):
            return False
        return not any(pattern.match(name) for pattern in patterns)

    @property
    def kind(self) -> Literal["int4", "int8", "fp8"]:
        """What the numbers of a covered product are."""
        if self.method in ("fbgemm_fp8", "compressed-tensors"):
            return "fp8"
        return "int8" if self.bits == 8 else "int4"

    @cached_property
    def _sorted(self) -> tuple[frozenset[str], tuple[re.Pattern[str], ...]]:
        names = frozenset(one for one in self.ignored if not one.startswith("re:"))
        patterns = {one[3:] for one in self.ignored if one.startswith("re:")}
        return names, tuple(re.compile(one) for one in sorted(patterns))


def read_scheme(settings: Mapping[str, Any], *, source: str = "config.json") -> QuantScheme | None:
    """The scheme that config.json's object asks for; None for plain weights.

    Raises:
        CheckpointError: a form that is not known, or a field that cannot be.
    """
    found = settings.get("quantization_config")
    if found is None:
        return None
    whole = Fields(settings, source)
    if not isinstance(found, Mapping):
        raise whole.wrong("quantization_config", found, "an object")
    read = Fields(found, f"{source}, quantization_config")
    method = read.get("quant_method")
    if method == "fbgemm_fp8":
        return QuantScheme(
            method="fbgemm_fp8",
            activation_bound=read.number("activation_scale_ub", 1200.0, low=1e-6),
            ignored=_ignored(read, "modules_to_not_convert"),
        )
    if method == "compressed-tensors":
        return _compressed(read)
    if method == "awq":
        _four_bits(read)
        read.one_of("version", ("gemm", "GEMM"), "gemm")
        if read.get("zero_point") is not None and not read.flag("zero_point"):
            raise read.wrong("zero_point", False, "true: AWQ stores its zero points")
        return QuantScheme(
            method="awq",
            group_size=_group_size(read),
            ignored=_ignored(read, "modules_to_not_convert"),
        )
    if method == "gptq":
        _four_bits(read)
        form = read.one_of("checkpoint_format", ("gptq", "gptq_v2"), "gptq")
        return QuantScheme(
            method="gptq",
            group_size=_group_size(read),
            act_order=read.flag("desc_act"),
            zero_offset=1 if form == "gptq" else 0,
            ignored=_ignored(read, "modules_to_not_convert"),
        )
    raise read.wrong("quant_method", method, f"one of {', '.join(METHODS)}: no other is read")


def _four_bits(read: Fields) -> None:
    bits = read.size("bits", 4)
    if bits != 4:
        raise read.wrong("bits", bits, "4: no other width is read")


def _ignored(read: Fields, name: str) -> tuple[str, ...]:
    listed = read.get(name)
    if listed is None:
        return ()
    if not isinstance(listed, list) or len(listed) > _MAX_IGNORED:
        raise read.wrong(name, listed, f"a list of at most {_MAX_IGNORED} names")
    for one in listed:
        if not isinstance(one, str):
            raise read.wrong(name, one, "names")
        if one.startswith("re:") and not _is_simple(one[3:]):
            raise read.wrong(name, one, "a pattern of names, `.`, `.*`, `\\.` and `\\d+` alone")
    return tuple(listed)


def _is_simple(pattern: str) -> bool:
    stars = pattern.count("*") + pattern.count("+")
    return (
        len(pattern) <= _MAX_PATTERN
        and stars <= _MAX_STARS
        and _SIMPLE.fullmatch(pattern) is not None
    )


def _group_size(read: Fields) -> int:
    """Columns that share a scale; 0 for a whole row, which files say as -1."""
    return 0 if read.get("group_size") == -1 else read.size("group_size", 128)


def _compressed(read: Fields) -> QuantScheme:
    """One group of all products: float8 as Maverick's release has it, or packed integers."""
    form = read.one_of("format", ("float-quantized", "pack-quantized"), "float-quantized")
    groups = read.get("config_groups")
    if not isinstance(groups, Mapping) or len(groups) != 1:
        raise read.wrong("config_groups", groups, "an object with one group: no other is read")
    (group,) = groups.values()
    if not isinstance(group, Mapping) or group.get("targets") != ["Linear"]:
        raise read.wrong("config_groups", groups, 'one group with targets ["Linear"]')
    found = group.get("weights")
    if not isinstance(found, Mapping):
        raise read.wrong("weights", found, "an object")
    weights = Fields(found, f"{read.source}, weights")
    inputs = group.get("input_activations")
    ignored = _ignored(read, "ignore")
    if form == "float-quantized":
        _must_be(weights, {"num_bits": 8, "type": "float", "strategy": "channel"})
        _must_be(weights, {"dynamic": False, "symmetric": True})
        bound = None
        if inputs is not None:
            if not isinstance(inputs, Mapping):
                raise read.wrong("input_activations", inputs, "an object")
            taken = Fields(inputs, f"{read.source}, input_activations")
            _must_be(taken, {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True})
            bound = math.inf
        return QuantScheme(method="compressed-tensors", activation_bound=bound, ignored=ignored)
    _must_be(weights, {"type": "int", "dynamic": False, "actorder": None})
    if inputs is not None:
        raise read.wrong("input_activations", inputs, "null: packed integers go with plain inputs")
    bits = weights.size("num_bits", 4)
    by_group = weights.one_of("strategy", ("group", "channel"), "group") == "group"
    symmetric = weights.get("symmetric") is None or weights.flag("symmetric")
    if bits not in (4, 8):
        raise weights.wrong("num_bits", bits, "4 or 8: no other width is read")
    if bits == 8 and (by_group or not symmetric):
        raise weights.wrong("num_bits", 8, "of strategy channel, symmetric: no other is read")
    return QuantScheme(
        method="pack-quantized",
        bits=bits,
        group_size=_group_size(weights) if by_group else 0,
        symmetric=symmetric,
        ignored=ignored,
    )


def _must_be(read: Fields, due: Mapping[str, object]) -> None:
    for name, value in due.items():
        found = read.get(name)
        if found is not None and found != value:
            raise read.wrong(name, found, f"{value!r}: no other is read")
