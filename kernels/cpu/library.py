"""The compiled library: the variant for this machine, its C structs and its functions.

Knows shared objects and ctypes; knows nothing of the meaning of the numbers. The same C++ is built
once per instruction set (setup.py); the best variant that loads is used. Calls release the GIL.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.machinery
import logging
import os
import platform
import weakref
from pathlib import Path
from typing import Any

_LOG = logging.getLogger(__name__)

_ABI = 13
"""Must equal `arriero_abi()`, so that a library of an older build is not used."""

VARIANTS = ("amx", "avx512bf16", "avx512", "avx2", "portable")
"""Variants of the library, the fastest first."""

ON_REQUEST = frozenset({"amx"})
"""Variants that are used only where ARRIERO_CPU_VARIANT names them: they have run under emulation
and on no processor yet."""

_AVX512 = {"avx512f", "avx512bw", "avx512dq", "avx512vl", "fma", "f16c"}
_AVX512BF16 = _AVX512 | {"avx512_bf16", "avx512_vnni"}
_FLAGS = {
    "amx": _AVX512BF16 | {"amx_tile", "amx_bf16", "amx_int8"},
    "avx512bf16": _AVX512BF16,
    "avx512": _AVX512,
    "avx2": {"avx2", "fma", "f16c"},
    "portable": set[str](),
}


class Matrix(ctypes.Structure):
    """`struct Matrix` of native/matrix.h."""

    _fields_ = (
        ("out_features", ctypes.c_int64),
        ("in_features", ctypes.c_int64),
        ("data", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("zero", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("type", ctypes.c_int32),
        ("scale_type", ctypes.c_int32),
        ("group", ctypes.c_int32),
        ("whole", ctypes.c_int32),
    )


class Cache(ctypes.Structure):
    """`struct Cache` of native/attention.h."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("layer_bytes", ctypes.c_int64),
        ("block_bytes", ctypes.c_int64),
        ("head_bytes", ctypes.c_int64),
        ("type", ctypes.c_int32),
        ("block_size", ctypes.c_int32),
        ("num_blocks", ctypes.c_int32),
        ("num_heads", ctypes.c_int32),
        ("head_dim", ctypes.c_int32),
        ("num_layers", ctypes.c_int32),
    )


class Batch(ctypes.Structure):
    """`struct Batch` of native/attention.h."""

    _fields_ = (
        ("tokens", ctypes.c_int64),
        ("sequences", ctypes.c_int64),
        ("positions", ctypes.c_void_p),
        ("query_start", ctypes.c_void_p),
        ("context", ctypes.c_void_p),
        ("block_table", ctypes.c_void_p),
        ("table_stride", ctypes.c_int64),
        ("table_blocks", ctypes.c_int64),
        ("slots", ctypes.c_void_p),
        ("cos", ctypes.c_void_p),
        ("sin", ctypes.c_void_p),
        ("cos_stride", ctypes.c_int64),
        ("sin_stride", ctypes.c_int64),
        ("adapters", ctypes.c_void_p),
    )
    rows: LoraRows | None = None  # what `adapters` points to, kept alive with the struct


class AttentionMask(ctypes.Structure):
    """`struct AttentionMask` of native/cache.h."""

    _fields_ = (
        ("chunk_size", ctypes.c_int32),
        ("window", ctypes.c_int32),
        ("sinks", ctypes.c_int32),
    )


class Style(ctypes.Structure):
    """`struct Style` of native/attention.h."""

    _fields_ = (
        ("rope", ctypes.c_int32),
        ("qk_norm", ctypes.c_int32),
        ("eps", ctypes.c_float),
        ("query_gain", ctypes.c_float),
        ("query_floor", ctypes.c_float),
        ("visible", AttentionMask),
        ("q_norm", ctypes.c_void_p),
        ("k_norm", ctypes.c_void_p),
    )


class Layer(ctypes.Structure):
    """`struct Layer` of native/decoder.h."""

    _fields_ = (
        ("attn_norm", ctypes.c_void_p),
        ("mlp_norm", ctypes.c_void_p),
        ("qkv", Matrix),
        ("o", Matrix),
        ("gate_up", Matrix),
        ("down", Matrix),
        ("experts", ctypes.c_void_p),
        ("lora", ctypes.c_void_p),
        ("num_q_heads", ctypes.c_int32),
        ("num_kv_heads", ctypes.c_int32),
        ("head_dim", ctypes.c_int32),
        ("scale", ctypes.c_float),
        ("eps", ctypes.c_float),
        ("style", Style),
        ("local", ctypes.c_int32),
        ("index", ctypes.c_int32),
    )


class Experts(ctypes.Structure):
    """`struct Experts` of native/experts.h."""

    _fields_ = (
        ("router", Matrix),
        ("gate_up", ctypes.c_void_p),
        ("down", ctypes.c_void_p),
        ("first", ctypes.c_int64),
        ("held", ctypes.c_int64),
        ("top_k", ctypes.c_int32),
    )


class Draws(ctypes.Structure):
    """`struct Draws` of native/sampling.h."""

    _fields_ = (
        ("temperature", ctypes.c_void_p),
        ("top_k", ctypes.c_void_p),
        ("top_p", ctypes.c_void_p),
        ("min_p", ctypes.c_void_p),
        ("seed", ctypes.c_void_p),
        ("position", ctypes.c_void_p),
        ("token_ids", ctypes.c_void_p),
        ("allowed", ctypes.c_void_p),
        ("allowed_stride", ctypes.c_int64),
    )


class Lora(ctypes.Structure):
    """`struct Lora` of native/lora.h."""

    _fields_ = (
        ("a", ctypes.c_void_p),
        ("b", ctypes.c_void_p),
        ("ranks", ctypes.c_void_p),
        ("slots", ctypes.c_int64),
        ("max_rank", ctypes.c_int64),
        ("in_features", ctypes.c_int64),
        ("out_features", ctypes.c_int64),
        ("first", ctypes.c_int64),
        ("type", ctypes.c_int32),
    )


class LoraRows(ctypes.Structure):
    """`struct LoraRows` of native/lora.h."""

    _fields_ = (
        ("order", ctypes.c_void_p),
        ("runs", ctypes.c_void_p),
        ("num_ordered", ctypes.c_int64),
        ("num_runs", ctypes.c_int64),
    )


class LoraParts(ctypes.Structure):
    """`struct LoraParts` of native/lora.h."""

    _fields_ = (("parts", ctypes.c_void_p), ("count", ctypes.c_int64))


class LayerLora(ctypes.Structure):
    """`struct LayerLora` of native/lora.h."""

    _fields_ = (("qkv", LoraParts), ("o", LoraParts), ("gate_up", LoraParts), ("down", LoraParts))


_P, _I64, _I32, _F32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float

_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "pack": (_P, _P, _I64, _P, _I64, _I64, _I64, _I32),
    "embed": (_P, _P, _I64, _P, _I64, _P),
    "linear": (_P, _P, _P, _I64, _I64, _P),
    "lora": (_P, _P, _I64, _P, _I64, _I64, _P, _I64, _P),
    "logits": (_P, _P, _P, _F32, _P, _I64, _I64, _P),
    "rms_norm": (_P, _P, _I64, _I64, _I64, _P, _F32, _P),
    "silu_mul": (_P, _P, _I64, _I64, _I64, _P),
    "grouped_linear": (_P, _P, _P, _I64, _P, _I64, _P),
    "rope_write": (_P, _P, _I64, _P, _P, _I64, _P),
    "paged_attention": (_P, _P, _I64, _I32, _F32, _P, _P, _I64, _P, _P),
    "decoder": (_P, _P, _I64, _P, _P, _P, _P, _P),
    "attention_block": (_P, _P, _P, _P, _P, _P),
    "mlp_block": (_P, _P, _I64, _P, _P, _P),
    "cache_copy": (_P, _I64, _P, _I64, _P, _I32),
    "argmax": (_P, _P, _I64, _I64, _I64, _P),
    "sample": (_P, _P, _I64, _I64, _I64, _P, _P),
    "log_totals": (_P, _P, _I64, _I64, _I64, _P, _I64, _P),
    "read": (_P, _P, _I64, _P),
    "multiply": (_P, _I64, _I32, _P),
}


class Library:
    """A loaded variant; its functions raise errors of C++ as exceptions."""

    def __init__(self, variant: str, path: Path) -> None:
        """Load `path`.

        Raises:
            OSError: the file does not load, comes from a build of other sources, or needs registers
                that the system does not give.
        """
        self.variant, self.path = variant, path
        self._dll = ctypes.CDLL(str(path))
        abi = getattr(self._dll, "arriero_abi", None)
        if abi is None or abi() != _ABI:
            raise OSError(f"{path.name} is from a build of another version; build it again")
        granted = getattr(self._dll, "arriero_granted", None)
        if granted is not None and not granted():
            raise OSError(f"Linux does not give this process the registers of {variant}")
        self._dll.arriero_failure.restype = ctypes.c_char_p
        self._dll.arriero_machine.restype = ctypes.c_void_p
        self._dll.arriero_machine.argtypes = (_I32, _I32)
        self._dll.arriero_machine_free.argtypes = (_P,)
        for name, types in _SIGNATURES.items():
            function = getattr(self._dll, f"arriero_{name}")
            function.argtypes = types
            function.restype = ctypes.c_int32
            setattr(self, f"_{name}", function)

    def call(self, name: str, *arguments: Any) -> None:  # noqa: ANN401
        """Call `arriero_<name>`.

        Raises:
            ValueError: an index or a shape would lead the kernels out of bounds.
        """
        if getattr(self, f"_{name}")(*arguments):
            reason = self._dll.arriero_failure().decode()
            raise ValueError(f"{name}: {reason}")

    def machine(self, num_threads: int, exact: bool) -> Machine:
        """Start a set of threads."""
        handle = self._dll.arriero_machine(num_threads, int(exact))
        if not handle:
            reason = self._dll.arriero_failure().decode()
            raise RuntimeError(f"cannot start {num_threads} threads: {reason}")
        return Machine(self._dll, handle)


class Machine:
    """A set of threads with scratch memory; the threads stop when the object is collected."""

    def __init__(self, dll: ctypes.CDLL, handle: int) -> None:
        self.handle = handle
        finalizer = weakref.finalize(self, dll.arriero_machine_free, handle)
        # At exit the threads sleep and end with the process; a join could only hang.
        finalizer.atexit = False


def cpu_flags() -> set[str] | None:
    """Instruction sets of this CPU in Linux's names; None if the system does not list them."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() == "flags":
            return set(value.split())
    return None


def runnable() -> list[str]:
    """The variants that this CPU has the instructions for, the fastest first."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return ["portable"]
    flags = cpu_flags()
    if flags is None:
        return ["portable"]
    return [variant for variant in VARIANTS if _FLAGS[variant] <= flags]


def find(variant: str) -> Path | None:
    """The shared object of a variant; None if not built."""
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = Path(__file__).parent / f"_{variant}{suffix}"
        if path.exists():
            return path
    return None


@functools.cache
def load(variant: str | None = None) -> Library:
    """Load a variant, or the fastest variant that this machine can run, less `ON_REQUEST`.

    The environment variable ARRIERO_CPU_VARIANT names a variant too, for comparisons and tests.

    Raises:
        RuntimeError: this machine can use no variant; the message has the reasons and a remedy.
    """
    variant = variant or os.environ.get("ARRIERO_CPU_VARIANT") or None
    if variant is not None and variant not in runnable():
        raise RuntimeError(
            f"the variant {variant!r} of the CPU kernels does not run on this CPU; "
            f"use {', '.join(runnable())}"
        )
    reasons: list[str] = []
    default = [name for name in runnable() if name not in ON_REQUEST]
    for name in default if variant is None else [variant]:
        path = find(name)
        if path is None:
            reasons.append(f"{name} was not built")
            continue
        try:
            library = Library(name, path)
        except OSError as error:
            reasons.append(f"{name}: {error}")
            continue
        if reasons:
            _LOG.info("CPU kernels: using %s (%s)", name, "; ".join(reasons))
        return library
    raise RuntimeError(
        f"the CPU kernels cannot be used here ({'; '.join(reasons)}); install a C++20 compiler "
        "and run `pip install` again (or `python setup.py build_ext --inplace` in a checkout)"
    )
