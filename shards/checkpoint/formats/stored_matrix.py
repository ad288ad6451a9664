"""The stored tensors of a matrix, each cut to the part that a slice of the matrix needs.

Knows names, cuts and checks of tensors; knows nothing of the layouts of forms.

Shape legend: O rows (outputs), I columns (inputs), G groups of columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from arriero.kernels.input_transform import InputTransform, Levels
from arriero.shards.checkpoint.formats.nibbles import word_span
from arriero.shards.checkpoint.formats.scheme import QuantScheme
from arriero.shards.checkpoint.tensor_folder import TensorFolder
from arriero.shards.errors import CheckpointError
from arriero.shards.layout.dense import Span

_LEVELS: dict[str, Levels] = {"fp8": "fp8", "int8": "int8", "fp4": "fp4"}
"""Numbers that inputs are rounded to, by the numbers of the weights."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredMatrix:
    """A slice of a quantized matrix in a folder.

    Tensors are named by their suffix, such as "weight_scale".

    Attributes:
        folder: the open folder.
        scheme: form of the matrix.
        name: name of the module, without `.weight`.
        rows: rows of the slice; None for all rows.
        columns: columns of the slice; None for all columns.
        pad_groups: pad columns sorted by group to full groups.
        separator: between the name and a suffix: "_" for fused experts, such as
            "experts.down_proj_weight_scale".
    """

    folder: TensorFolder
    scheme: QuantScheme
    name: str
    rows: Span | None
    columns: Span | None
    pad_groups: bool = False
    separator: str = "."

    def full_name(self, suffix: str) -> str:
        """Name of a tensor; of the fused experts themselves for an empty suffix."""
        return f"{self.name}{self.separator}{suffix}" if suffix else self.name

    def own_columns(self, num_columns: int) -> Span:
        """Columns of the slice, of a matrix of `num_columns`."""
        return self.columns or Span(start=0, stop=num_columns)

    def has(self, suffix: str) -> bool:
        """Whether the tensor is stored."""
        return self.full_name(suffix) in self.folder.stored

    def shape(self, suffix: str) -> tuple[int, ...]:
        """Shape of a whole tensor."""
        return tuple(self.folder.shape(self.full_name(suffix)))

    def whole(self, suffix: str) -> Tensor:
        """A whole tensor."""
        return self.folder.tensor(self.full_name(suffix))

    def cut(self, suffix: str, first: Span | None, last: Span | None) -> Tensor:
        """A tensor, cut in its first and its last dimension; None for no cut.

        Raises:
            CheckpointError: the last dimension is too short for the cut.
        """
        name = self.full_name(suffix)
        if first is None:
            tensor = self.folder.tensor(name)
        else:
            tensor = self.folder.rows(name, first.start, first.stop)
        if last is None:
            return tensor
        if not 0 <= last.start <= last.stop <= tensor.shape[-1]:
            raise CheckpointError(
                f"tensor {name!r} of shape {list(tensor.shape)} has no range "
                f"{last.start}:{last.stop} in its last dimension; fetch the checkpoint again"
            )
        return tensor.narrow(-1, last.start, last.size)

    def words(self, suffix: str, first: Span | None) -> Tensor:
        """The words of the last dimension that contain `rows`; `trim` then removes other rows."""
        return self.cut(suffix, first, word_span(self.rows))

    def scales(self, suffix: str, first: Span | None, last: Span | None) -> Tensor:
        """Scales in float32.

        Raises:
            CheckpointError: a scale is infinite or not a number.
        """
        scales = self.cut(suffix, first, last).float()
        self.check_finite(suffix, scales)
        return scales

    def row_scales(self, suffix: str, num_rows: int) -> Tensor:
        """Scales float32 [O, 1]; a scale of the whole matrix is repeated for each row."""
        if not self.scheme.per_tensor:
            return self.scales(suffix, self.rows, None)
        return self.single_scale(suffix).expand(num_rows, 1).contiguous()

    def single_scale(self, suffix: str) -> Tensor:
        """A scale of the whole matrix, float32 [1].

        Raises:
            CheckpointError: the scale is infinite or not a number.
        """
        scale = self.whole(suffix).float().reshape(1)
        self.check_finite(suffix, scale)
        return scale

    def inputs(self, num_inputs: int) -> InputTransform | None:
        """The rounding of the inputs of the slice; None for inputs that are not rounded.

        Raises:
            CheckpointError: the static scale of the inputs is not positive and finite.
        """
        if not self.scheme.rounds_inputs:
            return None
        scale = None
        if self.scheme.input_scale:
            scale = self.single_scale("input_scale")
            if not float(scale) > 0:
                name = self.full_name("input_scale")
                raise CheckpointError(
                    f"{self.folder.path}: tensor {name!r} is {float(scale)}, but a scale of inputs "
                    "must be positive; fetch the file again"
                )
        return InputTransform(
            num_inputs=num_inputs,
            levels=_LEVELS[self.scheme.kind],
            bound=self.scheme.activation_bound,
            scale=scale,
        )

    def check_finite(self, suffix: str, scales: Tensor) -> None:
        """Refuse scales that are infinite or not a number.

        Raises:
            CheckpointError: the message names the tensor.
        """
        num_bad = int(scales.numel() - torch.isfinite(scales).sum())
        if num_bad:
            raise CheckpointError(
                f"{self.folder.path}: tensor {self.full_name(suffix)!r} holds {num_bad} scales "
                "that are infinite or not a number; fetch the file again"
            )
