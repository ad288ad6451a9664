"""The planner counts a drafter as the slices allocate it."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
import torch

from arriero.cluster.planner.drafter_bytes import DrafterBytes, drafter_bytes
from arriero.kernels.select import ops_for
from arriero.shards.checkpoint.reader import Checkpoint
from arriero.shards.collectives.mesh import Mesh
from arriero.shards.config.group import GroupConfig
from arriero.shards.config.speculation import DraftKind, SpeculationConfig
from arriero.shards.layout.families import parts_of
from arriero.shards.layout.parts import AnyPart
from arriero.shards.models.model_slice import SliceSettings, load_slice
from arriero.shards.worker.speculation.sources import Target, draft_source
from support.eagle3_heads import head_settings, head_weights, write_head
from support.models import tiny_llama
from support.slices import BLOCK, CPU, ThreadMesh

NUM_BLOCKS = 5


def _mesh(config: GroupConfig, part: AnyPart) -> Mesh:
    mesh = ThreadMesh(config.tp, part.tp_rank, [], threading.Barrier(1))
    mesh.part = part  # type: ignore[attr-defined]
    return cast(Mesh, mesh)


@pytest.mark.parametrize("kernels", ["reference", "cpu"])
@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize(
    ("kind", "flags"),
    [("draft", {}), ("eagle3", {}), ("eagle3", {"norm_before_fc": True, "fc_norm": True})],
)
def test_bytes_are_exact(
    tmp_path: Path, kind: DraftKind, flags: dict[str, bool], tp: int, pp: int, kernels: str
) -> None:
    """Weights and KV blocks, also where a head needs the target's embedding on a later stage."""
    target = tiny_llama(tmp_path / "target", layers=8)
    own = not flags
    if kind == "draft":
        tiny_llama(tmp_path / "drafter", layers=2, hidden=48, intermediate=64, head_dim=16)
    else:
        settings = head_settings(**flags)
        write_head(tmp_path / "drafter", settings, head_weights(settings, own_embedding=own))
    config = GroupConfig(
        model_path=str(tmp_path / "target"),
        tp=tp,
        pp=pp,
        dtype="bfloat16",
        max_model_len=64,
        max_sequences=2,
        num_blocks=NUM_BLOCKS,
        speculation=SpeculationConfig(kind=kind, model_path=str(tmp_path / "drafter")),
    )
    checkpoint = Checkpoint.open(config.model_path)
    source = draft_source(config, checkpoint.config)
    assert source is not None
    parts = parts_of(checkpoint.config, config)
    for part in parts:
        planned = drafter_bytes(config, target, part, kernels)
        if not part.last_stage:
            assert planned == DrafterBytes()
            continue
        ops, mesh = ops_for(CPU, kernels, threads=1), _mesh(config, part)
        model = load_slice(
            checkpoint,
            part,
            mesh,
            ops,
            SliceSettings(dtype=torch.bfloat16, num_blocks=NUM_BLOCKS, block_size=BLOCK),
        )
        drafter = source.load(
            Target(
                checkpoint=checkpoint,
                model=model,
                parts=parts,
                mesh=mesh,
                ops=ops,
                num_blocks=NUM_BLOCKS,
            )
        )
        assert drafter.weights_nbytes == planned.weights
        assert drafter.kv_nbytes == planned.kv_block * NUM_BLOCKS


def test_nothing_without_a_drafter(tmp_path: Path) -> None:
    """Sources that need no model cost nothing on the slices."""
    target = tiny_llama(tmp_path / "target")
    config = GroupConfig(model_path="", speculation=SpeculationConfig(kind="ngram"))
    (part,) = parts_of(target, config)
    assert drafter_bytes(config, target, part, "cpu") == DrafterBytes()
    assert drafter_bytes(replace(config, speculation=SpeculationConfig()), target, part, "cpu") == (
        DrafterBytes()
    )
