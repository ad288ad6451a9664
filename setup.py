"""Builds the C++ of the CPU backend, once per instruction set; everything else is pyproject.toml.

Every extension is optional: where no compiler is found, or an old one lacks an instruction set,
the install goes on and the package runs on what is there, down to the reference backend.
"""

import platform
import sys

from setuptools import Extension, setup

_NATIVE = "kernels/cpu/native"
_HEADERS = [
    "simd.h",
    "amx.h",
    "amx_levels.h",
    "buffer.h",
    "dot.h",
    "exponentials.h",
    "levels.h",
    "matrix.h",
    "narrow.h",
    "pairs.h",
    "pool.h",
    "product.h",
    "rows.h",
    "cache.h",
    "attention_plan.h",
    "attention_tiles.h",
    "attention.h",
    "check.h",
    "decoder.h",
    "experts.h",
    "limits.h",
    "lora_tiles.h",
    "lora.h",
    "pack.h",
    "peaks.h",
    "likelihood.h",
    "race.h",
    "sampling.h",
    "api.inc",
]

_AVX512 = ["-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
_AVX512BF16 = [*_AVX512, "-mavx512bf16", "-mavx512vnni"]  # every CPU with one has the other
_X86_FLAGS = {
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": _AVX512,
    "avx512bf16": _AVX512BF16,
    "amx": [*_AVX512BF16, "-mamx-tile", "-mamx-bf16", "-mamx-int8"],
}


def _extension(name: str, flags: list[str]) -> Extension:
    return Extension(
        f"arriero.kernels.cpu._{name}",
        sources=[f"{_NATIVE}/{name}.cpp"],
        depends=[f"{_NATIVE}/{header}" for header in _HEADERS],
        extra_compile_args=[
            "-std=c++20",
            "-O3",
            "-g",
            "-ffp-contract=off",  # a product and a sum fuse where the source says so, or nowhere
            "-fno-math-errno",
            "-fvisibility=hidden",  # the variants share names, and must not share code
            "-pthread",
            "-Wno-maybe-uninitialized",  # GCC 12 warns about its own AVX-512 header
            *flags,
        ],
        extra_link_args=["-pthread"],
        language="c++",
        optional=True,
    )


def _extensions() -> list[Extension]:
    if sys.platform == "win32":  # no threads of the kind used; the reference backend runs there
        return []
    flags: dict[str, list[str]] = {"portable": []}
    if platform.machine() in ("x86_64", "AMD64"):
        flags |= _X86_FLAGS
    return [_extension(name, of) for name, of in flags.items()]


setup(ext_modules=_extensions())
