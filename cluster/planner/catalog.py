"""Models and devices that a plan can name although none is at hand.

The memory of a device is the size that the driver gives a program, less than the name says. Knows
published numbers; knows nothing of layouts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from arriero.shards.checkpoint.formats.describe import describe, read_settings
from arriero.shards.checkpoint.formats.scheme import QuantScheme
from arriero.shards.errors import SpecError
from arriero.shards.families.registry import families
from arriero.shards.layout.parts import AnyModel

_GIB = 1 << 30


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """An accelerator, or the share of a machine that a slice gets.

    Attributes:
        name: as in `--gpu`.
        memory_bytes: bytes that a program can allocate.
        bandwidth: bytes per second from the device's memory.
        matrix_rate: operations per second of bfloat16 products; 0 where no estimate is made.
        link_rate: bytes per second to a device, from the others of the machine.
        network_rate: bytes per second to a device, from other machines.
        fp8: the device multiplies float8.
        cuda: the GPU backend runs on the device.
        context_bytes: bytes of the driver and its libraries in each process.
    """

    name: str
    memory_bytes: int
    bandwidth: float
    matrix_rate: float = 0.0
    link_rate: float = 0.0
    network_rate: float = 0.0
    fp8: bool = True
    cuda: bool = True
    context_bytes: int = _GIB


def _gpu(
    name: str, gib: float, tb_s: float, tflops: float, link_gb_s: float, *, fp8: bool = True
) -> Device:
    return Device(
        name=name,
        memory_bytes=int(gib * _GIB),
        bandwidth=tb_s * 1e12,
        matrix_rate=tflops * 1e12,
        link_rate=link_gb_s * 1e9,
        network_rate=(_SERVER_NETWORK if link_gb_s > _PCIE_GEN4 else _CARD_NETWORK) * 1e9,
        fp8=fp8,
    )


_PCIE_GEN4 = 32
"""GB/s of 16 lanes, each way: GPUs without links between them."""
_SERVER_NETWORK, _CARD_NETWORK = 50, 12.5
"""GB/s to a GPU from other machines: a port of 400 Gb/s for each GPU of a server, of 100 Gb/s for
cards."""

# Memory that the driver gives a program, in GiB, and the data sheets' bandwidth in TB/s, dense
# bfloat16 products in TFLOPS and links between GPUs in GB/s each way: NVIDIA H100 SXM, H200, H20
# (96 GB HBM3, 4.0), A100, B200 and GB200 (GB200 NVL72: 186 GB and 8 of each GPU), L40S, A10, L4;
# AMD Instinct MI300X (192 GB HBM3, 5.3) and MI325X (256 GB HBM3E, 6.0). Where no driver's figure is
# at hand (GB200, H20, MI325X), the published size less 0.5 %.
DEVICES = {
    entry.name: entry
    for entry in (
        _gpu("h100-80g", 79.1, 3.35, 989, 450),
        _gpu("h200-141g", 139.7, 4.8, 989, 450),
        _gpu("a100-40g", 39.4, 1.55, 312, 300, fp8=False),
        _gpu("a100-80g", 79.1, 2.04, 312, 300, fp8=False),
        _gpu("b200-192g", 178.3, 8.0, 2250, 900),
        _gpu("gb200-186g", 172.3, 8.0, 2500, 900),
        _gpu("h20-96g", 95.0, 4.0, 148, 450),
        _gpu("l40s-48g", 44.4, 0.86, 362, _PCIE_GEN4),
        _gpu("a10-24g", 22.1, 0.6, 125, _PCIE_GEN4, fp8=False),
        _gpu("l4-24g", 22.0, 0.3, 121, _PCIE_GEN4),
        _gpu("rtx4090-24g", 23.5, 1.01, 165, _PCIE_GEN4),
        _gpu("mi300x-192g", 191.5, 5.3, 1307, 448),
        _gpu("mi325x-256g", 254.7, 6.0, 1307, 448),
    )
}
RAY_TYPES = {
    "H100": "h100-80g",
    "H200": "h200-141g",
    "A100": "a100-80g",
    "A100-40G": "a100-40g",
    "A100-80G": "a100-80g",
    "B200": "b200-192g",
    "GB200": "gb200-186g",
    "H20": "h20-96g",
    "L40S": "l40s-48g",
    "A10G": "a10-24g",
    "L4": "l4-24g",
}
"""The device of a GPU type as Ray names it; of several sizes the largest."""
CPU_BANDWIDTH = 2e10
"""Bytes per second of a machine's memory, a low estimate; all slices of the machine share them."""


def cpu(memory_bytes: int, slices: int) -> Device:
    """The share of a machine's memory and bandwidth that each of `slices` slices gets."""
    return Device(
        name="cpu",
        memory_bytes=memory_bytes // slices,
        bandwidth=CPU_BANDWIDTH / slices,
        cuda=False,
        context_bytes=300 * 10**6,
    )


def device(name: str, memory_bytes: int | None, slices: int) -> Device:
    """The device `name`, with another memory size where `memory_bytes` is given.

    Args:
        name: a name of `DEVICES`, with or without its size ("h100"), or "cpu".
        memory_bytes: bytes of the device; for "cpu" bytes of the machine.
        slices: number of slices that share a machine (for "cpu").

    Raises:
        SpecError: the name is unknown or that of several sizes, or "cpu" comes without
            `memory_bytes`.
    """
    if name == "cpu":
        if memory_bytes is None:
            raise SpecError("`gpu`=cpu needs the memory of each machine; add --memory 64GiB")
        return cpu(memory_bytes, slices)
    entry = _find_gpu(name)
    if memory_bytes is None:
        return entry
    return replace(entry, memory_bytes=memory_bytes)


def _find_gpu(name: str) -> Device:
    known = name.lower()
    sizes = [full for full in DEVICES if known in (full, full.rpartition("-")[0])]
    if not sizes:
        raise SpecError(f"`gpu`={name!r} is none of {', '.join(DEVICES)}, cpu")
    if len(sizes) > 1:
        raise SpecError(f"`gpu`={name!r} has several sizes; give one of {', '.join(sizes)}")
    return DEVICES[sizes[0]]


MODELS: dict[str, Mapping[str, Any]] = {
    name: settings for family in families() for name, settings in family.catalog.items()
}
"""The fields of each model's config.json that decide memory; see `read_settings`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NamedModel:
    """A model to plan for.

    Attributes:
        name: a name of `MODELS`, or the name of the folder.
        config: sizes of the model.
        scheme: quantization of the checkpoint; None for plain weights.
    """

    name: str
    config: AnyModel
    scheme: QuantScheme | None = None


def find_model(name: str) -> NamedModel:
    """The model `name` of `MODELS`, or the model in the folder `name`.

    Raises:
        SpecError: `name` is neither a known model nor a folder.
        CheckpointError: the folder's config.json is not valid.
    """
    settings = MODELS.get(name.lower())
    if settings is not None:
        config, scheme = read_settings(settings, source=name)
        return NamedModel(name=name.lower(), config=config, scheme=scheme)
    if not Path(name).is_dir():
        raise SpecError(f"`model`={name!r} is neither a folder nor one of {', '.join(MODELS)}")
    config, scheme = describe(name)
    return NamedModel(name=Path(name).resolve().name, config=config, scheme=scheme)
