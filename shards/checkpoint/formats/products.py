"""Reader of a checkpoint's matrices or slices of matrices, in all stored forms.

Returns plain matrices as views of the file and quantized matrices as `QuantizedWeight` with the
stored numbers, without dequantization. Knows the layouts of `fbgemm_fp8`, compressed-tensors, AWQ
and GPTQ, and Llama 4's experts, fused or separate; knows nothing of the packing of a backend.

A column cut inside a group that shares a scale gives smaller groups; the scale is then repeated.

Sources of the layouts: fbgemm's and compressed-tensors' checkpoints as published (`weight` float8
[out, in], `weight_scale` [out, 1]; or `weight_packed` int32 [out, in / 8], low nibble first, and
`weight_scale` [out, groups]); AWQ (Lin et al., 2023), "gemm" packing; GPTQ (Frantar et al.,
2022), versions 1 and 2 of its checkpoints.

Shape legend: O rows (outputs), I columns (inputs), G groups of columns, W words of eight numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from arriero.kernels.input_transform import InputTransform
from arriero.kernels.quantized_weight import INT4_ZERO, QuantizedWeight
from arriero.shards.checkpoint.formats.form_fit import in_order, index_problem
from arriero.shards.checkpoint.formats.nibbles import (
    NIBBLES,
    pack_columns,
    trim,
    unpack_columns,
    unpack_rows,
    word_span,
)
from arriero.shards.checkpoint.formats.scheme import QuantScheme
from arriero.shards.checkpoint.formats.stored import cut_group
from arriero.shards.checkpoint.tensor_folder import TensorFolder
from arriero.shards.errors import CheckpointError
from arriero.shards.layout.dense import Span

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Column of each nibble of an AWQ word: nibble i holds column `AWQ_ORDER[i]` of eight."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredProduct:
    """A matrix or a slice of a matrix, and the change that the form makes to the inputs.

    Attributes:
        weight: plain matrix [O, I] (a view of the file), or quantized matrix.
        inputs: None if column i multiplies the unchanged input i. Columns sorted by group (GPTQ
            with act-order) can include padding columns, which name input 0 and are exactly zero.
    """

    weight: Tensor | QuantizedWeight
    inputs: InputTransform | None = None

    def dense(self) -> Tensor:
        """The matrix in usual column order, float32 [O, inputs]; for tests, not for inference."""
        if isinstance(self.weight, Tensor):
            return self.weight.float()
        full_OI = self.weight.dequantize()
        if self.inputs is None or self.inputs.order_I is None:
            return full_OI
        out_OI = torch.zeros(full_OI.shape[0], self.inputs.num_inputs)
        return out_OI.index_add_(1, self.inputs.order_I, full_OI)


class ProductReader:
    """Reads the matrices of an open folder."""

    def __init__(self, folder: TensorFolder, scheme: QuantScheme | None) -> None:
        self._folder, self._scheme = folder, scheme

    def product(
        self,
        name: str,
        rows: Span | None = None,
        columns: Span | None = None,
        *,
        pad_groups: bool = False,
    ) -> StoredProduct:
        """The matrix `name`, or a slice of rows and columns.

        Args:
            name: name of the module, without `.weight`.
            rows: rows of the slice; None for all rows.
            columns: columns of the slice; None for all columns.
            pad_groups: pad columns sorted by group to full groups. Equal cuts of equal matrices
                then have equal shapes, as a single launch over many experts requires.

        Raises:
            CheckpointError: the matrix is missing, scales are not finite, or a cut gives groups of
                columns that no kernel supports.
        """
        if self._scheme is None or f"{name}.weight" in self._folder.stored:
            return self._eight_bits_or_plain(name, rows, columns)
        if self._scheme.method == "pack-quantized":
            return self._packed(name, rows, columns, pad_groups)
        if self._scheme.method == "awq":
            return self._awq(name, rows, columns)
        return self._gptq(name, rows, columns, pad_groups)

    def expert(
        self, prefix: str, expert: int, columns: Span | None = None
    ) -> tuple[StoredProduct, StoredProduct, StoredProduct]:
        """Gate, up and down matrices of an expert, each [out, in].

        Args:
            prefix: name of the layer's experts, such as "model.layers.1.feed_forward.experts".
            expert: number of the expert.
            columns: slice of the inner dimension: rows of gate and up, columns of down.
        """
        fused = f"{prefix}.gate_up_proj"
        if fused not in self._folder.stored:
            name = f"{prefix}.{expert}."
            return (
                self.product(f"{name}gate_proj", rows=columns, pad_groups=True),
                self.product(f"{name}up_proj", rows=columns, pad_groups=True),
                self.product(f"{name}down_proj", columns=columns, pad_groups=True),
            )
        gate_up_IO = self._fused_expert(fused, expert)
        down_IO = self._fused_expert(f"{prefix}.down_proj", expert)
        inner = gate_up_IO.shape[1] // 2
        own = columns or Span(start=0, stop=inner)
        gate, up = (gate_up_IO[:, at + own.start : at + own.stop].t() for at in (0, inner))
        down = down_IO[own.start : own.stop].t()
        return StoredProduct(weight=gate), StoredProduct(weight=up), StoredProduct(weight=down)

    def _fused_expert(self, name: str, expert: int) -> Tensor:
        num_experts = self._folder.shape(name)[0]
        if not 0 <= expert < num_experts:
            raise CheckpointError(
                f"tensor {name!r} holds {num_experts} experts, but expert {expert} is needed; "
                "check `num_local_experts` in config.json"
            )
        return self._folder.rows(name, expert, expert + 1)[0]

    def _eight_bits_or_plain(
        self, name: str, rows: Span | None, columns: Span | None
    ) -> StoredProduct:
        weight_OI = self._cut(f"{name}.weight", rows, columns)
        if weight_OI.dtype not in (torch.float8_e4m3fn, torch.int8):
            return StoredProduct(weight=weight_OI)
        scales_O1 = self._row_scales(f"{name}.weight_scale", rows, weight_OI.shape[0])
        num_columns = weight_OI.shape[1]
        bound = None if self._scheme is None else self._scheme.activation_bound
        return StoredProduct(
            weight=QuantizedWeight(
                kind="int8" if weight_OI.dtype == torch.int8 else "fp8",
                in_features=num_columns,
                data=weight_OI,
                scales=scales_O1,
                group_size=num_columns,
            ),
            inputs=None if bound is None else InputTransform(num_inputs=num_columns, bound=bound),
        )

    def _packed(
        self, name: str, rows: Span | None, columns: Span | None, pad_groups: bool
    ) -> StoredProduct:
        assert self._scheme is not None
        shape = self._folder.tensor(f"{name}.weight_shape").tolist()
        words_OW = self._cut(f"{name}.weight_packed", rows, None)
        num_columns = words_OW.shape[1] * 32 // self._scheme.bits
        if shape != [self._folder.shape(f"{name}.weight_packed")[0], num_columns]:
            raise CheckpointError(
                f"tensor {name + '.weight_shape'!r} says {shape}, but {num_columns} columns are "
                "stored; fetch the checkpoint again"
            )
        own = columns or Span(start=0, stop=num_columns)
        bytes_OB = words_OW.view(torch.uint8)
        if self._scheme.bits == 8:
            scales_O1 = self._finite(f"{name}.weight_scale", rows, None)
            levels_OI = bytes_OB[:, own.start : own.stop] ^ 0x80  # stored with an offset of 128
            return StoredProduct(
                weight=QuantizedWeight(
                    kind="int8",
                    in_features=own.size,
                    data=levels_OI.view(torch.int8),
                    scales=scales_O1,
                    group_size=own.size,
                )
            )
        ordered = not self._scheme.act_order
        group_of_I = None if ordered else self._group_of(name, "weight_g_idx", num_columns)
        if group_of_I is not None:
            return self._packed_by_index(name, words_OW, rows, own, group_of_I, pad_groups)
        group, needed, index_G = self._groups(name, columns, num_columns)
        if own.start % 2:
            raise CheckpointError(
                f"{name}: columns {own.start}:{own.stop} begin inside a byte; "
                "use a tp (or tp_shares) that cuts at even columns"
            )
        zeros_GO = self._packed_zeros(name, rows, needed, words_OW.shape[0])
        zeros_OG = None if zeros_GO is None else zeros_GO.t()[:, index_G].float()
        return StoredProduct(
            weight=QuantizedWeight(
                kind="int4",
                in_features=own.size,
                data=bytes_OB[:, own.start // 2 : -(-own.stop // 2)],
                scales=self._finite(f"{name}.weight_scale", rows, needed)[:, index_G],
                zeros=zeros_OG,
                group_size=group,
            )
        )

    def _packed_zeros(
        self, name: str, rows: Span | None, groups: Span | None, num_rows: int
    ) -> Tensor | None:
        """Zero points uint8 [G, O] of `groups`; None if each zero point is the middle level."""
        assert self._scheme is not None
        if self._scheme.symmetric:
            return None
        packed_WG = self._cut(f"{name}.weight_zero_point", word_span(rows), groups)
        return trim(unpack_rows(packed_WG).t(), rows)[:, :num_rows]

    def _packed_by_index(
        self,
        name: str,
        words_OW: Tensor,
        rows: Span | None,
        own: Span,
        group_of_I: Tensor,
        pad_groups: bool,
    ) -> StoredProduct:
        """A matrix with the group of each column in `weight_g_idx` (act-order)."""
        levels_IO = unpack_columns(words_OW, range(NIBBLES))[:, own.start : own.stop].t()
        scales_GO = self._finite(f"{name}.weight_scale", rows, None).t()
        zeros_GO = self._packed_zeros(name, rows, None, words_OW.shape[0])
        if zeros_GO is None:
            zeros_GO = torch.full(scales_GO.shape, int(INT4_ZERO), dtype=torch.uint8)
        return self._by_index(
            f"{name}.weight_g_idx", levels_IO, zeros_GO, scales_GO, group_of_I, own, pad_groups
        )

    def _group_of(self, name: str, suffix: str, num_columns: int) -> Tensor | None:
        """The group of each column; None if groups are consecutive columns."""
        assert self._scheme is not None
        if f"{name}.{suffix}" not in self._folder.stored:
            return None
        group_of_I = self._folder.tensor(f"{name}.{suffix}").long()
        whole_group = self._scheme.group_size or num_columns
        if in_order(group_of_I, whole_group):
            return None
        return group_of_I

    def _by_index(
        self,
        index: str,
        levels_IO: Tensor,
        zeros_GO: Tensor,
        scales_GO: Tensor,
        group_of_I: Tensor,
        own: Span,
        pad_groups: bool,
    ) -> StoredProduct:
        """Sort the columns `own` by group; the tensor `index` gives the groups."""
        assert self._scheme is not None
        problem = index_problem(index, group_of_I, len(scales_GO))
        if problem is not None:
            raise CheckpointError(problem)
        whole_group = self._scheme.group_size or len(group_of_I)
        most = int(torch.bincount(group_of_I).max())
        if pad_groups and most > whole_group:
            raise CheckpointError(
                f"tensor {index!r} gives a group {most} columns, but the group size is "
                f"{whole_group}; quantize again without act-order"
            )
        own_I = group_of_I[own.start : own.stop]
        return self._sorted(levels_IO, zeros_GO, scales_GO, own_I, whole_group if pad_groups else 0)

    def _awq(self, name: str, rows: Span | None, columns: Span | None) -> StoredProduct:
        num_inputs = self._folder.shape(f"{name}.qweight")[0]
        group, needed, index_G = self._groups(name, columns, num_inputs)
        levels_IO = unpack_columns(self._words(f"{name}.qweight", columns, rows), AWQ_ORDER)
        zeros_GO = unpack_columns(self._words(f"{name}.qzeros", needed, rows), AWQ_ORDER)
        zeros_GO = trim(zeros_GO, rows)
        scales_GO = self._finite(f"{name}.scales", needed, rows)
        return _four_bits(trim(levels_IO, rows), zeros_GO[index_G], scales_GO[index_G], group)

    def _gptq(
        self, name: str, rows: Span | None, columns: Span | None, pad_groups: bool
    ) -> StoredProduct:
        assert self._scheme is not None
        num_inputs = self._folder.shape(f"{name}.qweight")[0] * NIBBLES
        own = columns or Span(start=0, stop=num_inputs)
        words = Span(start=own.start // NIBBLES, stop=-(-own.stop // NIBBLES))
        levels_IO = unpack_rows(self._cut(f"{name}.qweight", words, rows))
        first = own.start - words.start * NIBBLES
        levels_IO = levels_IO[first : first + own.size]
        group_of_I = self._group_of(name, "g_idx", num_inputs)
        group, needed, index_G = 0, None, None
        if group_of_I is None:
            group, needed, index_G = self._groups(name, columns, num_inputs)
        zeros_GO = unpack_columns(self._words(f"{name}.qzeros", needed, rows), range(NIBBLES))
        zeros_GO = trim(zeros_GO, rows) + self._scheme.zero_offset & 15
        scales_GO = self._finite(f"{name}.scales", needed, rows)
        if index_G is not None:
            return _four_bits(levels_IO, zeros_GO[index_G], scales_GO[index_G], group)
        assert group_of_I is not None, "columns without order have an index"
        return self._by_index(
            f"{name}.g_idx", levels_IO, zeros_GO, scales_GO, group_of_I, own, pad_groups
        )

    def _groups(
        self, name: str, columns: Span | None, num_columns: int
    ) -> tuple[int, Span, Tensor]:
        """Groups of the columns of a slice.

        Returns:
            Columns that share a scale in the slice, the stored groups that the slice needs, and for
            each group of the slice the index among the needed groups.
        """
        assert self._scheme is not None
        own = columns or Span(start=0, stop=num_columns)
        whole_group = self._scheme.group_size or num_columns
        group = cut_group(own, num_columns, whole_group)
        if group % 2 and group < own.size:
            raise CheckpointError(
                f"{name}: columns {own.start}:{own.stop} cut a group of {whole_group} that shares "
                f"a scale into groups of {group}; use a tp (or tp_shares) that cuts at even columns"
            )
        needed = Span(start=own.start // whole_group, stop=-(-own.stop // whole_group))
        index_G = torch.arange(own.start, own.stop, group) // whole_group - needed.start
        return group, needed, index_G

    def _sorted(
        self,
        levels_IO: Tensor,
        zeros_GO: Tensor,
        scales_GO: Tensor,
        group_of_I: Tensor,
        width: int,
    ) -> StoredProduct:
        """Sort columns by group; pad each group to `width` columns with zero elements.

        A slice of the columns holds a part of each group, so the group sizes differ. If the largest
        group has more than `width` columns, its size is the width.
        """
        num_groups = scales_GO.shape[0]
        counts_G = torch.bincount(group_of_I, minlength=num_groups)
        width = max(width, int(counts_G.max()))
        width += width % 2  # whole bytes
        order_I = torch.argsort(group_of_I, stable=True)
        starts_G = torch.cumsum(counts_G, 0) - counts_G
        place_I = torch.arange(len(order_I)) - starts_G[group_of_I[order_I]]
        place_I += group_of_I[order_I] * width
        input_order = torch.zeros(num_groups * width, dtype=torch.int64)
        input_order[place_I] = order_I
        filled_IO = zeros_GO.repeat_interleave(width, dim=0)  # level = zero point: exactly zero
        filled_IO[place_I] = levels_IO[order_I]
        return StoredProduct(
            weight=_four_bits(filled_IO, zeros_GO, scales_GO, width).weight,
            inputs=InputTransform(num_inputs=len(order_I), order_I=input_order),
        )

    def _finite(self, name: str, first: Span | None, last: Span | None) -> Tensor:
        """Scales in float32; an infinite scale or NaN is an error."""
        scales = self._cut(name, first, last).float()
        self._check_finite(name, scales)
        return scales

    def _row_scales(self, name: str, rows: Span | None, num_rows: int) -> Tensor:
        """Scales float32 [O, 1]; a scale of the whole matrix is repeated for each row."""
        if self._scheme is None or not self._scheme.per_tensor:
            return self._finite(name, rows, None)
        scale = self._folder.tensor(name).float().reshape(1, 1)
        self._check_finite(name, scale)
        return scale.expand(num_rows, 1).contiguous()

    def _words(self, name: str, first: Span | None, rows: Span | None) -> Tensor:
        """The words of the last dimension that contain `rows`; `trim` then removes other rows."""
        return self._cut(name, first, word_span(rows))

    def _cut(self, name: str, first: Span | None, last: Span | None) -> Tensor:
        if first is None:
            tensor = self._folder.tensor(name)
        else:
            tensor = self._folder.rows(name, first.start, first.stop)
        if last is None:
            return tensor
        if not 0 <= last.start <= last.stop <= tensor.shape[-1]:
            raise CheckpointError(
                f"tensor {name!r} of shape {list(tensor.shape)} has no range "
                f"{last.start}:{last.stop} in its last dimension; fetch the checkpoint again"
            )
        return tensor.narrow(-1, last.start, last.size)

    def _check_finite(self, name: str, scales: Tensor) -> None:
        num_bad = int(scales.numel() - torch.isfinite(scales).sum())
        if num_bad:
            raise CheckpointError(
                f"{self._folder.path}: tensor {name!r} holds {num_bad} scales that are infinite "
                "or not a number; fetch the file again"
            )


def _four_bits(levels_IO: Tensor, zeros_GO: Tensor, scales_GO: Tensor, group: int) -> StoredProduct:
    return StoredProduct(
        weight=QuantizedWeight(
            kind="int4",
            in_features=levels_IO.shape[0],
            data=pack_columns(levels_IO),
            scales=scales_GO.t().contiguous(),
            zeros=zeros_GO.t().float().contiguous(),
            group_size=group,
        )
    )
