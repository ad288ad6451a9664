"""The forms of NVIDIA's ModelOpt, from `hf_quant_config.json` or `quantization_config`.

Supported values of `quant_algo`: FP8 (a scale for each matrix and for its inputs), NVFP4 (e2m1
numbers; a float8 scale for each 16 columns, a scale for each matrix and for its inputs) and
W4A16_NVFP4 (the same without a scale for inputs). Needs no torch; knows nothing of tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from arriero.shards.checkpoint.formats.names import PATTERN, check_names, read_names
from arriero.shards.checkpoint.formats.scheme import QuantScheme
from arriero.shards.model_config.fields import Fields

NVFP4_GROUP = 16
"""Columns of an NVFP4 matrix that share a scale."""

_SCHEMES = {
    "FP8": QuantScheme(method="modelopt-fp8", per_tensor=True, input_scale=True),
    "NVFP4": QuantScheme(method="modelopt-nvfp4", group_size=NVFP4_GROUP, input_scale=True),
    "W4A16_NVFP4": QuantScheme(method="modelopt-nvfp4", group_size=NVFP4_GROUP),
}
_IGNORED = ("exclude_modules", "ignore")
_KV = ("kv_cache_quant_algo", "kv_cache_scheme")
_PREFIXES = ("model.language_model.", "language_model.model.")
"""Beginnings of names of a text model beside images; matched names may have either or none."""


def read_modelopt(read: Fields) -> QuantScheme | None:
    """The scheme; None if only the KV cache is quantized.

    Args:
        read: the object of `hf_quant_config.json`, or `quantization_config` of config.json.

    Raises:
        CheckpointError: an unsupported form; the message names the field.
    """
    nested = read.get("quantization")
    if isinstance(nested, Mapping):
        read = Fields(nested, f"{read.source}, quantization")
    algorithm = read.get("quant_algo")
    kv = next((name for name in _KV if read.get(name) is not None), None)
    if algorithm is None and kv is not None:
        return None
    scheme = _SCHEMES.get(str(algorithm).upper())
    if scheme is None:
        raise read.wrong(
            "quant_algo",
            algorithm,
            f"one of {', '.join(_SCHEMES)}; use a checkpoint in one of these forms, or the plain "
            "checkpoint and set `quantization`",
        )
    if scheme.kind == "fp4" and read.size("group_size", NVFP4_GROUP) != NVFP4_GROUP:
        raise read.wrong("group_size", read.get("group_size"), f"{NVFP4_GROUP}, as NVFP4 defines")
    return replace(scheme, ignored=_ignored(read), notes=() if kv is None else (_kv_note(kv),))


def _kv_note(field: str) -> str:
    return (
        f"`{field}` does not set the dtype of the KV cache: `kv: {{dtype: fp8}}` does, and takes "
        "k_scale and v_scale; other dtypes are more exact and need none"
    )


def _ignored(read: Fields) -> tuple[str, ...]:
    """The matrices that are not quantized; `*` in a name stands for any letters."""
    listed = [_text_name(name) for name in read_names(read, *_IGNORED)]
    patterns = tuple(dict.fromkeys(_patterns(name for name in listed if "*" in name)))
    check_names(read, _IGNORED[0], patterns)
    return (*(name for name in listed if "*" not in name), *patterns)


def _text_name(name: str) -> str:
    """The name in a text model alone; a listed name matches within longer names too."""
    for prefix in _PREFIXES:
        if name.startswith(prefix):
            return f"model.{name.removeprefix(prefix)}"
    return name.removeprefix("language_model.")


def _patterns(wildcards: Iterable[str]) -> Iterable[str]:
    """Patterns of whole names, with and without the prefix of a text model beside images."""
    for wildcard in wildcards:
        if wildcard.startswith(PATTERN):
            yield wildcard
            continue
        pattern = wildcard.replace(".", r"\.").replace("*", ".*")
        yield f"{PATTERN}{pattern}$"
        if not wildcard.startswith("*"):
            yield rf"{PATTERN}language_model\.{pattern}$"
