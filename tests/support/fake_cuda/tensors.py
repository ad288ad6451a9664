"""Tensors that say cuda:0 over CPU memory, and what each op does to them.

Knows torch's op list (each op passes here after its decomposition) and the ledger; knows nothing of
the product.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from support.fake_cuda.ledger import Ledger, Recorded, where
from support.fake_cuda.streams import Memory, streams
from support.scaled_fp4 import scaled_mm_v2
from support.scaled_grouped import scaled_grouped_mm

DEVICE = torch.device("cuda", 0)
HOST = torch.device("cpu")
aten = torch.ops.aten

WAITING = {
    "aten::_local_scalar_dense", "aten::equal", "aten::is_nonzero", "aten::nonzero",
    "aten::masked_select", "aten::_unique2", "aten::unique_consecutive", "aten::unique_dim",
    "aten::bincount", "aten::allclose",
}  # fmt: skip
"""Ops whose result the host must see before it goes on."""
PINNING = {aten.is_pinned.default, aten._pin_memory.default, aten.pin_memory.default}
TO_HOST = {"aten::_local_scalar_dense", "aten::equal", "aten::is_nonzero", "aten::allclose"}
"""Ops that give numbers and not tensors."""


class DeviceTensor(Tensor):
    """A tensor on the simulated device; `plain` has its numbers, `memory` its uses by streams."""

    plain: Tensor
    memory: Memory | None

    @staticmethod
    def __new__(cls: type[DeviceTensor], plain: Tensor) -> DeviceTensor:
        made = Tensor._make_wrapper_subclass(
            cls,
            plain.size(),
            strides=plain.stride(),
            storage_offset=plain.storage_offset(),
            dtype=plain.dtype,
            device=DEVICE,
        )
        made.plain, made.memory = plain, None
        if plain.untyped_storage().nbytes():
            made.memory = streams().memory(_address(plain))
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        simulation = Simulation.current
        assert simulation is not None, "a simulated tensor outlived its device"
        return simulation.op(func, args, kwargs or {})

    def data_ptr(self) -> int:
        return self.plain.data_ptr()

    def __getitem__(self, index: Any) -> Tensor:  # noqa: ANN401
        return super().__getitem__(_index(index))

    def __setitem__(self, index: Any, value: Any) -> None:  # noqa: ANN401
        super().__setitem__(_index(index), value)

    def tolist(self) -> Any:  # noqa: ANN401
        assert Simulation.current is not None, "a simulated tensor outlived its device"
        Simulation.current.ledger.wait("tolist")
        return self.plain.tolist()

    def numpy(self, *, force: bool = False) -> Any:  # noqa: ANN401
        raise TypeError("can't convert cuda:0 device type tensor to numpy; use .cpu() first")

    def __repr__(self) -> str:  # its numbers would be a wait
        return f"DeviceTensor({tuple(self.shape)}, {self.dtype})"

    __str__ = __repr__

    def __format__(self, spec: str) -> str:
        return repr(self)


class Simulation(TorchDispatchMode):
    """The device: entered once in each thread, so that what threads make lands on it."""

    current: Simulation | None = None

    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self.ledger = ledger
        self._pinned: dict[int, Tensor] = {}  # kept, so that no other memory takes an address

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        kwargs = kwargs or {}
        host = kwargs.get("device") is None and not kwargs.get("pin_memory")
        if host and DeviceTensor not in types and func not in PINNING:  # most ops while loading
            return func(*args, **kwargs)
        return self.op(func, args, kwargs)

    def op(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:  # noqa: ANN401
        """Run one op of torch's."""
        name = func.name().split(".")[0]
        tensors = [one for one in pytree.tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        on_device = [one for one in tensors if isinstance(one, DeviceTensor)]
        if name == "aten::is_pinned":
            return _address(tensors[0]) in self._pinned
        if name in ("aten::_pin_memory", "aten::pin_memory"):
            return self._pin(tensors[0].clone())
        if name == "aten::_to_copy":
            return self._to_copy(func, args[0], kwargs)
        if name == "aten::copy_":
            self._copying(args[1], args[0], args[2] if len(args) > 2 else False)
            return self._run(func, args, kwargs, device=isinstance(args[0], DeviceTensor))
        device = kwargs.get("device")
        to_device = bool(on_device)
        if device is not None:
            to_device = torch.device(device).type == "cuda"
            kwargs = kwargs | {"device": HOST}
        pinned = kwargs.get("pin_memory")
        if pinned is not None:
            kwargs = {key: value for key, value in kwargs.items() if key != "pin_memory"}
        if pinned:
            self.ledger.allocate()
            return self._pin(func(*args, **kwargs))
        if on_device:
            self._check(name, args, tensors)
        if name in TO_HOST:
            to_device = False
        return self._run(func, args, kwargs, device=to_device)

    def _run(self, func: Any, args: Any, kwargs: dict[str, Any], *, device: bool) -> Any:  # noqa: ANN401
        """Run an op over the plain memory; what it makes is on the device or not."""
        name, schema = func.name().split(".")[0], func._schema
        plain_args, plain_kwargs = pytree.tree_map(_plain, (args, kwargs))
        if func is aten.mm.dtype:  # the CPU has none

            def func(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:  # type: ignore[misc]
                return a.to(dtype) @ b.to(dtype)
        elif func is aten._scaled_grouped_mm.default:  # nor this one
            func = scaled_grouped_mm
        elif func is aten._scaled_mm_v2.default:
            func = scaled_mm_v2

        with _disable_current_modes():
            out = func(*plain_args, **plain_kwargs)
            inputs = (plain_args, plain_kwargs)
            self._record(name, lambda: func(*plain_args, **plain_kwargs), inputs, out)
        self._use(schema, name, args, kwargs, out)
        if not device:
            return out
        given = dict(
            zip(
                map(id, pytree.tree_leaves((plain_args, plain_kwargs))),
                pytree.tree_leaves((args, kwargs)),
                strict=True,
            )
        )

        def wrap(one: Any) -> Any:  # noqa: ANN401
            if not isinstance(one, Tensor):
                return one
            if id(one) in given:  # in place
                return given[id(one)]
            return DeviceTensor(one)

        return pytree.tree_map(wrap, out)

    def _use(
        self,
        schema: Any,  # noqa: ANN401
        name: str,
        args: Any,  # noqa: ANN401
        kwargs: dict[str, Any],
        out: Any,  # noqa: ANN401
    ) -> None:
        """Tell the streams what the op has read and written; a view does neither."""
        reads: list[Memory] = []
        writes: list[Memory] = []
        for at, argument in enumerate(schema.arguments):
            value = args[at] if at < len(args) else kwargs.get(argument.name)
            writes_it = argument.alias_info is not None and argument.alias_info.is_write
            for one in pytree.tree_leaves(value):
                if isinstance(one, DeviceTensor) and one.memory is not None:
                    (writes if writes_it else reads).append(one.memory)
        if not reads and not writes:
            return
        made = [_address(one) for one in pytree.tree_leaves(out) if isinstance(one, Tensor)]
        of_inputs = {_address(one) for one in pytree.tree_leaves((args, kwargs)) if _is(one)}
        if writes or not made or not of_inputs.issuperset(made):
            self.ledger.streams.use(reads, writes, name)

    def _record(self, name: str, run: Callable[[], Any], inputs: Any, out: Any) -> None:  # noqa: ANN401
        recorded = self.ledger.recording
        if recorded is None:
            return
        held = {_address(one) for one in pytree.tree_leaves(inputs) if isinstance(one, Tensor)}
        made = [one for one in pytree.tree_leaves(out) if isinstance(one, Tensor)]
        outputs = [None if _address(one) in held else one for one in made]
        recorded.append(Recorded(run, name, outputs))

    def _check(self, name: str, args: Any, tensors: list[Tensor]) -> None:  # noqa: ANN401
        """What a real device refuses, and what it waits for."""
        ledger = self.ledger
        if name in WAITING:
            ledger.wait(name)
        if name == "aten::repeat_interleave" and isinstance(args[0], DeviceTensor):
            ledger.wait(name)
        if name in ("aten::index", "aten::index_put", "aten::index_put_"):
            for index in args[1]:
                if index is None:
                    continue
                if not isinstance(index, DeviceTensor) and index.dim():
                    ledger.copy_pageable(f"{name}, its index")
                    ledger.wait(f"{name}: an index on the host")
                if index.dtype in (torch.bool, torch.uint8):
                    ledger.wait(f"{name} by a mask")
            tensors = [args[0], *(one for one in args[2:] if isinstance(one, Tensor))]
        for one in tensors:
            if not isinstance(one, DeviceTensor) and one.dim() and one.numel():
                raise RuntimeError(
                    "Expected all tensors to be on the same device, but found cuda:0 and cpu "
                    f"({name} {tuple(one.shape)}) @ {where()}"
                )

    def _to_copy(self, func: Any, source: Tensor, kwargs: dict[str, Any]) -> Any:  # noqa: ANN401
        device = kwargs.get("device")
        was = isinstance(source, DeviceTensor)
        will = was if device is None else torch.device(device).type == "cuda"
        if device is not None:
            kwargs = kwargs | {"device": HOST}
        non_blocking = bool(kwargs.pop("non_blocking", False))
        if was != will:
            pinned = bool(kwargs.pop("pin_memory", False))
            self._transfer(source if will else None, non_blocking, pinned)
        return self._run(func, (source,), kwargs, device=will)

    def _copying(self, source: Tensor, target: Tensor, non_blocking: bool) -> None:
        was, will = isinstance(source, DeviceTensor), isinstance(target, DeviceTensor)
        if was != will and source.numel():
            host = source if will else target
            self._transfer(source if will else None, non_blocking, _address(host) in self._pinned)

    def _transfer(self, upload: Tensor | None, non_blocking: bool, pinned: bool) -> None:
        """A copy over the link: up from a tensor of the host's, or down."""
        way = "copy to the host" if upload is None else "copy to the device"
        if upload is not None:
            pinned = _address(upload) in self._pinned
        if not pinned:
            self.ledger.copy_pageable(way)
        # what comes down into pageable memory is there when the call returns
        if not non_blocking or (upload is None and not pinned):
            self.ledger.wait(way)

    def _pin(self, made: Tensor) -> Tensor:
        self._pinned[_address(made)] = made
        return made


def _index(index: Any) -> Any:  # noqa: ANN401
    """Lists as tensors of the host, since torch's C++ would make them on the device itself."""
    if isinstance(index, tuple):
        return tuple(map(_index, index))
    return torch.tensor(index) if isinstance(index, list) else index


def _is(one: object) -> bool:
    return isinstance(one, DeviceTensor)


def _plain(one: Any) -> Any:  # noqa: ANN401
    return one.plain if isinstance(one, DeviceTensor) else one


def plain_memory(one: Any) -> Any:  # noqa: ANN401
    """The CPU memory behind a tensor of the device; anything else as it is."""
    return _plain(one)


def _address(one: Tensor) -> int:
    return int(_plain(one).untyped_storage().data_ptr())


def bytes_allocated() -> int:
    """Of all tensors on the device, each memory counted once."""
    gc.collect()
    held = {}
    for one in gc.get_objects():
        if type(one) is DeviceTensor:
            storage = one.plain.untyped_storage()
            held[storage.data_ptr()] = storage.nbytes()
    return sum(held.values())


@contextmanager
def device_guard() -> Iterator[None]:
    """Let torch's C++ take a device of type cuda for one that it knows.

    Builds without CUDA have no guard for such devices, and indexing asks for one. The one of
    torch's meta device does nothing, which is right here.
    """
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    symbol = "_ZN3c104impl26device_guard_impl_registryE"
    registry = (ctypes.c_void_p * 16).in_dll(library, symbol)
    cuda, meta = 1, 14  # of c10::DeviceType
    before = registry[cuda]
    registry[cuda] = registry[meta]
    try:
        yield
    finally:
        registry[cuda] = before
