"""Reads an expert of a layer whose experts are stored in two tensors: plain, or ModelOpt's forms.

The layout as published for Llama 4: `gate_up_proj` [experts, in, 2 * inner] with gate before up,
and `down_proj` [experts, inner, out]. ModelOpt's FP8 adds `_weight_scale` and `_input_scale`, one
number each for all experts. ModelOpt's NVFP4 stores e2m1 codes, uint8 [experts, in / 2, out], an
even input in the low half of a byte, with `_weight_scale` float8 [experts, in / 16, out], and
`_weight_scale_2` and `_input_scale`, one number each.

Shape legend: O rows (outputs), I columns (inputs), G groups of columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from arriero.kernels.quantized_weight import QuantizedWeight
from arriero.shards.checkpoint.formats.column_groups import slice_groups
from arriero.shards.checkpoint.formats.nvfp4 import byte_span, check_cut, fp4_weight
from arriero.shards.checkpoint.formats.stored_matrix import StoredMatrix
from arriero.shards.checkpoint.formats.stored_product import StoredProduct
from arriero.shards.errors import CheckpointError
from arriero.shards.layout.dense import Span


@dataclass(frozen=True, kw_only=True, slots=True)
class FusedMatrix:
    """A slice of the matrix of an expert.

    Attributes:
        stored: the fused tensor and its scales; `rows` and `columns` of the slice.
        expert: number of the expert.
    """

    stored: StoredMatrix
    expert: int

    def read(self) -> StoredProduct:
        """The slice [out, in].

        Raises:
            CheckpointError: the tensor has fewer experts, or a cut that no kernel supports.
        """
        matrix_IO = self._expert("")
        if matrix_IO.dtype == torch.uint8:
            return self._nvfp4(matrix_IO)
        weight_OI = _cut(matrix_IO, self.stored.columns, self.stored.rows).t()
        if weight_OI.dtype != torch.float8_e4m3fn:
            return StoredProduct(weight=weight_OI)
        num_rows, num_columns = weight_OI.shape
        scale = self.stored.single_scale("weight_scale")
        return StoredProduct(
            weight=QuantizedWeight(
                kind="fp8",
                in_features=num_columns,
                data=weight_OI,
                scales=scale.expand(num_rows, 1).contiguous(),
                group_size=num_columns,
            ),
            inputs=self.stored.inputs(num_columns),
        )

    def _nvfp4(self, bytes_IO: Tensor) -> StoredProduct:
        stored, num_columns = self.stored, 2 * bytes_IO.shape[0]
        own = stored.own_columns(num_columns)
        check_cut(stored.name, own, num_columns, rounds=stored.scheme.input_scale)
        groups = slice_groups(stored.name, own, num_columns, stored.scheme.group_size)
        scales_GO = _cut(self._expert("weight_scale"), groups.needed, stored.rows).float()
        stored.check_finite("weight_scale", scales_GO)
        return StoredProduct(
            weight=fp4_weight(
                _cut(bytes_IO, byte_span(own), stored.rows).t(),
                scales_GO.t(),
                stored.single_scale("weight_scale_2"),
                own,
                groups,
            ),
            inputs=stored.inputs(own.size),
        )

    def _expert(self, suffix: str) -> Tensor:
        """The entry [.., ..] of the expert in a tensor of all experts."""
        name = self.stored.full_name(suffix)
        num_experts = self.stored.folder.shape(name)[0]
        if not 0 <= self.expert < num_experts:
            raise CheckpointError(
                f"tensor {name!r} holds {num_experts} experts, but expert {self.expert} is needed; "
                "check `num_local_experts` in config.json"
            )
        return self.stored.folder.rows(name, self.expert, self.expert + 1)[0]


def _cut(value_IO: Tensor, first: Span | None, last: Span | None) -> Tensor:
    if first is not None:
        value_IO = value_IO[first.start : first.stop]
    return value_IO if last is None else value_IO[:, last.start : last.stop]
