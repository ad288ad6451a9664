"""Full-size Llama 4 on the meta device: each rank packs what it should hold, and nothing else.

The slice's own loader runs for every rank; what it packs are views of meta tensors, whose strides
say which part of which tensor of the checkpoint they are.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import pairwise
from math import prod
from pathlib import Path

import pytest
import torch
from torch import Tensor

from arriero.kernels.packed_weights import Linear, Vocab
from arriero.kernels.reference.backend import ReferenceOps
from arriero.shards.checkpoint.formats.stored import TensorSpec, reads, tensor_specs
from arriero.shards.checkpoint.reader import Checkpoint
from arriero.shards.checkpoint.safetensors_header import StoredTensor
from arriero.shards.collectives.mesh import Mesh
from arriero.shards.config.parallel import ParallelConfig
from arriero.shards.layout.expert_placement import ExpertPlacement
from arriero.shards.layout.moe import MoEPart, partition_moe
from arriero.shards.model_config.llama4 import Llama4Config
from arriero.shards.models import loader
from arriero.shards.models.llama4 import Llama4Slice
from support.checkpoints_sparse import MAVERICK, SCOUT

META = torch.device("meta")
Box = tuple[tuple[int, int], ...]


class Folder(Checkpoint):
    """A checkpoint of meta tensors, which notes the vectors and the routers that are read."""

    def __init__(self, config: Llama4Config, due: Sequence[TensorSpec]) -> None:
        stored, at = {}, 0
        for one in due:
            stored[one.name] = StoredTensor(
                name=one.name,
                file=Path("full-size"),
                dtype=torch.bfloat16,
                shape=one.shape,
                start=at,
                stop=at + one.nbytes,
            )
            at += one.nbytes
        super().__init__(Path("full-size"), config, stored)
        self.tensors = {one.name: torch.empty(one.shape, device=META) for one in due}
        self.name_of = {id(tensor): name for name, tensor in self.tensors.items()}
        self.claimed: dict[str, set[Box]] = defaultdict(set)

    def _view(self, found: StoredTensor) -> Tensor:
        tensor = self.tensors[found.name]
        if tensor.ndim == 1:
            self.claim(tensor)
        return tensor

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def claim(self, view: Tensor) -> None:
        base = view if view._base is None else view._base
        box, offset = [], view.storage_offset()
        sizes = dict(zip(view.stride(), view.shape, strict=True))
        for stride in base.stride():
            start, offset = divmod(offset, stride)
            box.append((start, start + sizes.get(stride, 1)))
        assert prod(b - a for a, b in box) == view.numel()
        name = self.name_of[id(base)]
        assert tuple(box) not in self.claimed[name], f"{name} is packed twice"
        self.claimed[name].add(tuple(box))


class Packing(ReferenceOps):
    """Packs nothing, and notes what it is given."""

    def __init__(self, folder: Folder) -> None:
        super().__init__(META)
        self.folder = folder

    def pack_linear(
        self, weights_OI: Sequence[Tensor], bias_O: Tensor | None, dtype: torch.dtype
    ) -> Linear:
        for one in weights_OI:
            self.folder.claim(one)
        rows, columns = sum(one.shape[0] for one in weights_OI), weights_OI[0].shape[1]
        return Linear(
            out_features=rows,
            in_features=columns,
            packed=None,
            bias=None,
            nbytes=rows * columns * dtype.itemsize,
        )

    def pack_vocab(self, weight_VH: Tensor, first_row: int, dtype: torch.dtype) -> Vocab:
        self.folder.claim(weight_VH)
        rows, hidden = weight_VH.shape
        return Vocab(
            first_row=first_row,
            num_rows=rows,
            hidden_size=hidden,
            packed=None,
            nbytes=rows * hidden * dtype.itemsize,
        )


def claims(
    config: Llama4Config, due: list[TensorSpec], part: MoEPart, mesh: ParallelConfig
) -> Folder:
    folder = Folder(config, due)
    even = [config.num_experts // mesh.stage_size] * mesh.stage_size
    placement = ExpertPlacement.even(even) if mesh.dp > 1 else None
    Llama4Slice(
        folder,
        part,
        Mesh(part, mesh, device=META),
        Packing(folder),
        dtype=torch.bfloat16,
        num_blocks=1,
        num_local_blocks=1,
        block_size=16,
        placement=placement,
    )
    return folder


LAYOUTS = {
    "EP8": ParallelConfig(tp=8),
    "EP16 TP8 DP2": ParallelConfig(tp=8, dp=2),
    "PP2 EP8": ParallelConfig(tp=8, pp=2),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_maverick_is_claimed_by_the_ranks_that_should_hold_it(
    layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "PAGED_BYTES", 1 << 60)  # nothing is read ahead
    config, mesh = Llama4Config.from_dict(MAVERICK), LAYOUTS[layout]
    due = tensor_specs(config, None)
    assert sum(prod(one.shape) for one in due) == config.num_parameters() == 401_583_781_376
    text = [one for one in due if one.kind != "vision"]
    parts = partition_moe(config, mesh)
    holders: dict[str, Counter[Box]] = defaultdict(Counter)
    for part in parts:
        folder = claims(config, due, part, mesh)
        planned = {
            one.name: {tuple((span.start, span.stop) for span in box) for box in reads(one, part)}
            for one in text
        }
        for one in text:
            # the loader takes a fused tensor expert by expert
            found = folder.claimed[one.name]
            assert _elements(found) == _elements(planned[one.name]), one.name
            assert all(any(_inside(a, b) for b in planned[one.name]) for a in found), one.name
            holders[one.name].update(found)
    for one in text:
        copies = _copies(one, mesh)
        boxes = holders[one.name]
        assert set(boxes.values()) == {copies}, f"{one.name} is held {boxes} times"
        assert sum(_elements({box}) for box in boxes) == prod(one.shape), one.name
        assert _disjoint(list(boxes)), one.name


def _copies(one: TensorSpec, mesh: ParallelConfig) -> int:
    """How many ranks must hold each element: those that do not cut it."""
    axes = {cut.axis for cut in one.cuts}
    if "experts" in axes:
        return 1
    return mesh.dp if axes else mesh.dp * mesh.tp


def _elements(boxes: set[Box]) -> int:
    return sum(prod(b - a for a, b in box) for box in boxes)


def _inside(inner: Box, outer: Box) -> bool:
    return all(c <= a and b <= d for (a, b), (c, d) in zip(inner, outer, strict=True))


def _disjoint(boxes: list[Box]) -> bool:
    """No two boxes of a regular grid meet: sorted by their first edge that differs."""
    starts = [tuple(a for a, _ in box) for box in boxes]
    if len(set(starts)) < len(starts):
        return False
    for dim in range(len(boxes[0])):
        spans = sorted({box[dim] for box in boxes})
        if any(b > c for (_, b), (c, _) in pairwise(spans)):
            return False
    return True


def test_scout_s_total() -> None:
    config = Llama4Config.from_dict(SCOUT)
    due = tensor_specs(config, None)
    assert sum(prod(one.shape) for one in due) == config.num_parameters() == 108_641_793_536
