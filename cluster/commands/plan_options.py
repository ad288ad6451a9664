"""Groups of options of `arriero plan`, and the planner's input that they stand for.

Knows flags and their defaults; knows nothing of models and plans.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

from arriero.cluster.commands.options import set_options
from arriero.cluster.planner.catalog import DEVICES
from arriero.cluster.planner.demand import KvDemand
from arriero.cluster.planner.layouts import Machines
from arriero.shards.config.parallel import ParallelConfig
from arriero.shards.errors import SpecError


@dataclass(frozen=True, kw_only=True, slots=True)
class MachineOptions:
    """The machines to plan for."""

    gpu: Annotated[str, typer.Option(help=f"GPU type: {', '.join(DEVICES)}; or cpu.")] = "h100-80g"
    memory: Annotated[
        str | None,
        typer.Option(help="Memory of a GPU (with --gpu cpu: of a node), for example 64GiB."),
    ] = None
    nodes: Annotated[int, typer.Option(help="Number of nodes.")] = 1
    gpus_per_node: Annotated[
        int | None, typer.Option(help="GPUs (on cpu: slices) of a node; by default 8 (cpu: 1).")
    ] = None

    def machines(self, layout: ParallelConfig | None) -> Machines:
        """The machines; on CPUs without `gpus_per_node`, as many slices as the layout needs."""
        per_node = _cpu_slices(layout, self.nodes) if self.gpu == "cpu" else 8
        return Machines(
            gpu=self.gpu,
            nodes=self.nodes,
            per_node=self.gpus_per_node or per_node,
            memory_bytes=None if self.memory is None else _size("memory", self.memory),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class MeshOptions:
    """The mesh of a group."""

    tp: Annotated[int | None, typer.Option(help="Tensor-parallel slices of a stage.")] = None
    pp: Annotated[int | None, typer.Option(help="Pipeline stages.")] = None
    dp: Annotated[int | None, typer.Option(help="Data-parallel ranks of attention (MoE).")] = None
    ep: Annotated[int | None, typer.Option(help="Slices that share the experts (MoE).")] = None

    def layout(self) -> ParallelConfig | None:
        """The mesh; None without any of the options.

        Raises:
            SpecError: an option is below 1.
        """
        given = set_options(self)
        if not given:
            return None
        layout = ParallelConfig(**given)
        layout.check()
        return layout


@dataclass(frozen=True, kw_only=True, slots=True)
class DemandOptions:
    """The load of a group, and the memory beside."""

    context: Annotated[
        int | None, typer.Option(help="Tokens of a sequence that must fit; used in the ranking.")
    ] = None
    max_sequences: Annotated[int | None, typer.Option(help="Most sequences that run at once.")] = (
        None
    )
    max_batch_tokens: Annotated[int | None, typer.Option(help="Most tokens of a step.")] = None
    block_size: Annotated[int | None, typer.Option(help="Tokens of a KV block.")] = None
    spare_experts: Annotated[
        int, typer.Option(help="Second copies of busy experts on each rank (MoE).")
    ] = 0
    reserve: Annotated[
        str | None, typer.Option(help="Free memory of each device, for example 4GiB.")
    ] = None

    def demand(self, kv_dtype: str | None) -> KvDemand:
        """The demand; context 0 and dtype "" where the model decides.

        Raises:
            SpecError: an option is below its least value.
        """
        _check_at_least(
            1,
            context=self.context,
            max_sequences=self.max_sequences,
            max_batch_tokens=self.max_batch_tokens,
            block_size=self.block_size,
        )
        _check_at_least(0, spare_experts=self.spare_experts)
        return KvDemand(
            context=self.context or 0,
            max_sequences=self.max_sequences or 256,
            max_batch_tokens=self.max_batch_tokens or 2048,
            block_size=self.block_size or 16,
            kv_dtype=kv_dtype or "",
            spare_experts=self.spare_experts,
            reserve_bytes=None if self.reserve is None else _size("reserve", self.reserve),
        )


def _check_at_least(least: int, **values: int | None) -> None:
    """Refuse a flag with a value below `least`."""
    for name, value in values.items():
        if value is not None and value < least:
            raise SpecError(f"`{name}`={value} must be at least {least}")


def _cpu_slices(layout: ParallelConfig | None, nodes: int) -> int:
    return 1 if layout is None else -(-layout.world_size // max(1, nodes))


def _size(name: str, text: str) -> int:
    from arriero.cluster.spec.fields import parse_bytes

    return parse_bytes(name, text)
