"""KV pools of the manifests: what the engine allocates is what the planner says, to the byte."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch

from arriero.cluster.planner.memory import GroupPlan
from arriero.kernels.ops import Ops
from arriero.shards.config.group import GroupConfig
from arriero.shards.layout.families import parts_of, visible_keys
from arriero.shards.layout.parts import AnyModel, AnyPart
from arriero.shards.layout.resolve import first_placement, resolve
from arriero.shards.models.model_slice import SliceSettings, load_slice
from arriero.shards.worker.cuda.runner import CudaRunner

from .test_kubernetes import GENERATE, as_served, each_deployment, spec_of


def allocated(model: AnyModel, group: GroupConfig, part: AnyPart, ops: Ops) -> int:
    """Bytes of the KV pools that a slice makes for itself, over tensors without memory."""
    settings = SliceSettings(
        dtype=getattr(torch, group.dtype),
        quantization=group.quantization,
        num_blocks=(group.num_blocks or 0) + CudaRunner.spare_blocks,
        num_local_blocks=(group.num_local_blocks or 0) + CudaRunner.spare_blocks,
        block_size=group.block_size,
        placement=first_placement(group, parts_of(model, group)),
        visible=visible_keys(model, group),
    )
    checkpoint = mock.MagicMock(config=model, scheme=None)
    loader = mock.MagicMock()
    loader.return_value.__enter__.return_value.expert.return_value = (None, None)
    mesh = mock.MagicMock(device=torch.device("meta"), tp=group.tp)
    with (
        mock.patch("arriero.shards.models.llama.slice.Loader", loader),
        mock.patch("arriero.shards.models.llama4.slice.Loader", loader),
        mock.patch.object(type(ops), "decoder"),
    ):
        made = load_slice(checkpoint, part, mesh, ops, settings)
    return made.kv_nbytes


@each_deployment
def test_the_engine_allocates_the_planned_pools_to_the_byte(deployment: Any) -> None:  # noqa: ANN401
    """Each rank's pools by the engine's own resolution of the spec, and by the planner's."""
    pytest.importorskip("triton")
    from arriero.kernels.triton.backend import TritonOps

    plan: GroupPlan = GENERATE.plan(deployment)
    model = replace(plan.model.config, vision=None) if plan.chunk else plan.model.config
    group = resolve(spec_of(deployment).models[0].group_config("cuda"), model)
    assert (group.num_blocks, group.num_local_blocks or 0) == plan.kv_blocks()
    served = as_served(plan, group)
    ops = TritonOps(torch.device("meta"), batch_independent=False)
    by_part = {}
    for rank, part in zip(served.ranks, parts_of(model, group), strict=True):
        key = (part.layers, part.kv_heads.size)  # what decides the bytes
        if key not in by_part:
            by_part[key] = allocated(model, group, part, ops)
        assert by_part[key] == rank.kv_pool_bytes, f"rank {part.rank}"
        assert rank.weights.total + by_part[key] < rank.memory_bytes
