"""Which backends this machine can run; each conformance test runs once for each of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from arriero.kernels.ops import Ops
from arriero.kernels.registry import BACKENDS
from arriero.kernels.select import ops_for
from support import triton_interpreter

# Before Triton is first imported by anything: it settles then whether kernels are interpreted.
triton_interpreter.install()

CPU = torch.device("cpu")


def backend(name: str, threads: int | None = None) -> Ops:
    try:
        ops = ops_for(CPU, name, threads)
    except (RuntimeError, ImportError) as error:
        pytest.skip(f"backend {name}: {error}")
    if ops.name != name:
        pytest.skip(f"backend {name} is not built here")
    return ops


@pytest.fixture(params=list(BACKENDS))
def ops(request: pytest.FixtureRequest) -> Ops:
    if request.param == "triton":
        dtypes = request.node.callspec.params.values()
        if torch.bfloat16 in dtypes:
            pytest.skip("Triton's interpreter truncates to bfloat16 instead of rounding")
        if torch.float16 in dtypes and (
            "bits" in request.node.name or "not_depend" in request.node.name
        ):
            pytest.skip("whose bits depend on what is one question for all dtypes; this is slow")
    return backend(request.param)


@pytest.fixture(params=["cpu"])
def ops_by_threads(request: pytest.FixtureRequest) -> Iterator[tuple[Ops, Ops]]:
    """The same backend with one thread and with three."""
    before = torch.get_num_threads()
    try:
        yield backend(request.param, 1), backend(request.param, 3)
    finally:
        torch.set_num_threads(before)


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    chosen: torch.dtype = request.param
    return chosen
