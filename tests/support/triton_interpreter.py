"""Triton's interpreter, made fit for these tests in two ways.

Products sum as a tensor core does: alike for every row. Its own go through BLAS, whose order of
summing depends on where in the tile a row stands, so no kernel could give a row the same bits in
two places. Here the sum is taken in float64 and rounded once, which any order of it survives.

The language is patched once. It patches and restores hundreds of functions at every launch and
every call of a helper, half of all time spent.
"""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import numpy as np

Part = Any
"""Something of Triton's, which has no types."""


def install() -> None:
    """Have Triton interpret kernels in this process; nothing to do where it is not installed."""
    os.environ.setdefault("TRITON_INTERPRET", "1")
    try:
        import triton.language as tl
        from triton.runtime import interpreter
    except ImportError:
        return
    if interpreter.InterpreterBuilder.create_dot.__module__ == __name__:
        return

    def create_dot(builder: Part, a: Part, b: Part, d: Part, precision: Part, most: Part) -> Part:
        for operand in (a, b):
            assert operand.data.dtype in (np.float16, np.float32), "bfloat16 is held as integers"
        total = np.matmul(a.data.astype(np.float64), b.data.astype(np.float64))
        return interpreter.TensorHandle((total + d.data).astype(d.data.dtype), d.dtype.scalar)

    interpreter.InterpreterBuilder.create_dot = create_dot
    patch, empty_scope = interpreter._patch_lang, interpreter._LangPatchScope()
    patched: list[bool] = []

    def patch_once(fn: Part) -> Part:
        if not patched:
            patch(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
            # Triton 3.6's own does not take what newer numpy makes of a scalar
            tl.tensor.__index__ = lambda self: int(self.handle.data.squeeze())
            patched.append(True)
        return empty_scope

    interpreter._patch_lang = patch_once
