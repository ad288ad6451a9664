"""A checkpoint's matrices, whatever form they are stored in, by slice.

Gives plain matrices as views of the file, quantized ones as `QuantizedWeight` with the very
numbers stored: nothing is dequantized. Knows the layouts of `fbgemm_fp8`, compressed-tensors,
AWQ and GPTQ, and Llama 4's experts, fused or not; refuses to know how a backend packs.

Columns may be cut inside a group that shares a scale: the slice then has smaller groups, and the
scale several times.

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

from arriero.kernels.quant import INT4_ZERO, InputTransform, QuantizedWeight
from arriero.shards.checkpoint.formats.form_fit import in_order, index_problem
from arriero.shards.checkpoint.formats.scheme import QuantScheme
from arriero.shards.checkpoint.formats.stored import NIBBLES, cut_group
from arriero.shards.checkpoint.tensor_folder import TensorFolder
from arriero.shards.errors import CheckpointError
from arriero.shards.layout.dense import Span

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Nibble i of an AWQ word holds this one of its eight columns."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredProduct:
    """One matrix, or a slice of it, and what the format does to its inputs.

    Attributes:
        weight: a plain matrix [O, I] (a view of the file), or the quantized one.
        inputs: None where column i multiplies input i as it is. Where columns had to be sorted by
            group (GPTQ with act-order) a column may stand for no input: it names input 0 and its
            element is exactly zero.
    """

    weight: Tensor | QuantizedWeight
    inputs: InputTransform | None = None

    def dense(self) -> Tensor:
        """The matrix in its usual order, float32 [O, inputs]: to look at, not to compute with."""
        if isinstance(self.weight, Tensor):
            return self.weight.float()
        full_OI = self.weight.dequantize()
        if self.inputs is None or self.inputs.order_I is None:
            return full_OI
        out_OI = torch.zeros(full_OI.shape[0], self.inputs.num_inputs)
        return out_OI.index_add_(1, self.inputs.order_I, full_OI)


class ProductReader:
    """Reads matrices of an open folder."""

    def __init__(self, folder: TensorFolder, scheme: QuantScheme | None) -> None:
        self._folder, self._scheme = folder, scheme

    def product(
        self,
        name: str,
        rows: Span | None = None,
        columns: Span | None = None,
        *,
        alike: bool = False,
    ) -> StoredProduct:
        """The matrix `name` (without `.weight`), or the rows and columns asked for.

        Args:
            name: of the module.
            rows: None for all.
            columns: None for all.
            alike: equal cuts of equal matrices must give equal shapes, as one launch over many
                experts wants: columns sorted by group fill up every group.

        Raises:
            CheckpointError: it is not there, its scales are not finite, or a cut leaves groups of
                columns that no kernel takes.
        """
        if self._scheme is None or f"{name}.weight" in self._folder.stored:
            return self._eight_bits_or_plain(name, rows, columns)
        if self._scheme.method == "pack-quantized":
            return self._packed(name, rows, columns, alike)
        if self._scheme.method == "awq":
            return self._awq(name, rows, columns)
        return self._gptq(name, rows, columns, alike)

    def expert(
        self, prefix: str, expert: int, columns: Span | None = None
    ) -> tuple[StoredProduct, StoredProduct, StoredProduct]:
        """Gate, up and down matrices of one expert, each [out, in].

        Args:
            prefix: of the layer's experts, such as "model.layers.1.feed_forward.experts".
            expert: its number.
            columns: of its inner dimension: rows of gate and up, columns of down.
        """
        fused = f"{prefix}.gate_up_proj"
        if fused not in self._folder.stored:
            name = f"{prefix}.{expert}."
            return (
                self.product(f"{name}gate_proj", rows=columns, alike=True),
                self.product(f"{name}up_proj", rows=columns, alike=True),
                self.product(f"{name}down_proj", columns=columns, alike=True),
            )
        gate_up_IO = self._one(fused, expert)
        down_IO = self._one(f"{prefix}.down_proj", expert)
        inner = gate_up_IO.shape[1] // 2
        own = columns or Span(start=0, stop=inner)
        gate, up = (gate_up_IO[:, at + own.start : at + own.stop].t() for at in (0, inner))
        down = down_IO[own.start : own.stop].t()
        return StoredProduct(weight=gate), StoredProduct(weight=up), StoredProduct(weight=down)

    def _one(self, name: str, expert: int) -> Tensor:
        held = self._folder.shape(name)[0]
        if not 0 <= expert < held:
            raise CheckpointError(f"tensor {name!r} holds {held} experts, not {expert}")
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
        self, name: str, rows: Span | None, columns: Span | None, alike: bool
    ) -> StoredProduct:
        assert self._scheme is not None
        shape = self._folder.tensor(f"{name}.weight_shape").tolist()
        words_OW = self._cut(f"{name}.weight_packed", rows, None)
        num_columns = words_OW.shape[1] * 32 // self._scheme.bits
        if shape != [self._folder.shape(f"{name}.weight_packed")[0], num_columns]:
            raise CheckpointError(
                f"tensor {name + '.weight_shape'!r} says {shape}, but {num_columns} columns are "
                "packed"
            )
        own = columns or Span(start=0, stop=num_columns)
        bytes_OB = words_OW.view(torch.uint8)
        if self._scheme.bits == 8:
            scales_O1 = self._finite(f"{name}.weight_scale", rows, None)
            levels_OI = bytes_OB[:, own.start : own.stop] ^ 0x80  # stored plus 128
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
            return self._packed_by_index(name, words_OW, rows, own, group_of_I, alike)
        group, needed, index_G = self._groups(name, columns, num_columns)
        if own.start % 2:
            raise CheckpointError(f"{name}: columns {own.start}:{own.stop} begin inside a byte")
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
        """Zero points uint8 [G, O] of some groups; None where all are the middle level."""
        assert self._scheme is not None
        if self._scheme.symmetric:
            return None
        packed_WG = self._cut(f"{name}.weight_zero_point", _in_words(rows), groups)
        return _trim(_by_rows(packed_WG).t(), rows)[:, :num_rows]

    def _packed_by_index(
        self,
        name: str,
        words_OW: Tensor,
        rows: Span | None,
        own: Span,
        group_of_I: Tensor,
        alike: bool,
    ) -> StoredProduct:
        """Columns whose groups `weight_g_idx` names (act-order)."""
        levels_IO = _by_columns(words_OW, range(NIBBLES))[:, own.start : own.stop].t()
        scales_GO = self._finite(f"{name}.weight_scale", rows, None).t()
        zeros_GO = self._packed_zeros(name, rows, None, words_OW.shape[0])
        if zeros_GO is None:
            zeros_GO = torch.full(scales_GO.shape, int(INT4_ZERO), dtype=torch.uint8)
        return self._by_index(
            f"{name}.weight_g_idx", levels_IO, zeros_GO, scales_GO, group_of_I, own, alike
        )

    def _group_of(self, name: str, what: str, num_columns: int) -> Tensor | None:
        """The group of each column; None where groups are runs of columns in their order."""
        assert self._scheme is not None
        if f"{name}.{what}" not in self._folder.stored:
            return None
        group_of_I = self._folder.tensor(f"{name}.{what}").long()
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
        alike: bool,
    ) -> StoredProduct:
        """Sort the columns `own` by the groups that the tensor `index` names."""
        assert self._scheme is not None
        problem = index_problem(index, group_of_I, len(scales_GO))
        if problem is not None:
            raise CheckpointError(problem)
        whole_group = self._scheme.group_size or len(group_of_I)
        most = int(torch.bincount(group_of_I).max())
        if alike and most > whole_group:
            raise CheckpointError(
                f"tensor {index!r} gives a group {most} columns; the group size is {whole_group}"
            )
        own_I = group_of_I[own.start : own.stop]
        return self._sorted(levels_IO, zeros_GO, scales_GO, own_I, whole_group if alike else 0)

    def _awq(self, name: str, rows: Span | None, columns: Span | None) -> StoredProduct:
        num_inputs = self._folder.shape(f"{name}.qweight")[0]
        group, needed, index_G = self._groups(name, columns, num_inputs)
        levels_IO = _by_columns(self._words(f"{name}.qweight", columns, rows), AWQ_ORDER)
        zeros_GO = _by_columns(self._words(f"{name}.qzeros", needed, rows), AWQ_ORDER)
        zeros_GO = _trim(zeros_GO, rows)
        scales_GO = self._finite(f"{name}.scales", needed, rows)
        return _four_bits(_trim(levels_IO, rows), zeros_GO[index_G], scales_GO[index_G], group)

    def _gptq(
        self, name: str, rows: Span | None, columns: Span | None, alike: bool
    ) -> StoredProduct:
        assert self._scheme is not None
        num_inputs = self._folder.shape(f"{name}.qweight")[0] * NIBBLES
        own = columns or Span(start=0, stop=num_inputs)
        words = Span(start=own.start // NIBBLES, stop=-(-own.stop // NIBBLES))
        levels_IO = _by_rows(self._cut(f"{name}.qweight", words, rows))
        first = own.start - words.start * NIBBLES
        levels_IO = levels_IO[first : first + own.size]
        group_of_I = self._group_of(name, "g_idx", num_inputs)
        group, needed, index_G = 0, None, None
        if group_of_I is None:
            group, needed, index_G = self._groups(name, columns, num_inputs)
        zeros_GO = _by_columns(self._words(f"{name}.qzeros", needed, rows), range(NIBBLES))
        zeros_GO = _trim(zeros_GO, rows) + self._scheme.zero_offset & 15
        scales_GO = self._finite(f"{name}.scales", needed, rows)
        if index_G is not None:
            return _four_bits(levels_IO, zeros_GO[index_G], scales_GO[index_G], group)
        assert group_of_I is not None, "no order, so an index"
        return self._by_index(
            f"{name}.g_idx", levels_IO, zeros_GO, scales_GO, group_of_I, own, alike
        )

    def _groups(
        self, name: str, columns: Span | None, num_columns: int
    ) -> tuple[int, Span, Tensor]:
        """What a slice's columns share scales with.

        Returns:
            Columns that share a scale in the slice, the stored groups that it needs, and which of
            those each of its own groups is.
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
        """Sort columns by group; groups of fewer than `width` are filled with zero elements.

        A slice of the columns holds a part of every group, so that its groups differ in size; the
        largest gives the width where it exceeds the one asked for.
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
        """Scales, float32."""
        scales = self._cut(name, first, last).float()
        self._check_finite(name, scales)
        return scales

    def _row_scales(self, name: str, rows: Span | None, num_rows: int) -> Tensor:
        """Scales float32 [O, 1]; one that is of the whole matrix stands for each of its rows."""
        if self._scheme is None or not self._scheme.per_tensor:
            return self._finite(name, rows, None)
        scale = self._folder.tensor(name).float().reshape(1, 1)
        self._check_finite(name, scale)
        return scale.expand(num_rows, 1).contiguous()

    def _words(self, name: str, first: Span | None, rows: Span | None) -> Tensor:
        """Words along the last dimension that hold `rows`, which `_trim` cuts to measure."""
        return self._cut(name, first, _in_words(rows))

    def _cut(self, name: str, first: Span | None, last: Span | None) -> Tensor:
        if first is None:
            found = self._folder.tensor(name)
        else:
            found = self._folder.rows(name, first.start, first.stop)
        if last is None:
            return found
        if not 0 <= last.start <= last.stop <= found.shape[-1]:
            raise CheckpointError(
                f"tensor {name!r} of shape {list(found.shape)} has no {last.start}:{last.stop} in "
                "its last dimension"
            )
        return found.narrow(-1, last.start, last.size)

    def _check_finite(self, name: str, scales: Tensor) -> None:
        num_unfit = int(scales.numel() - torch.isfinite(scales).sum())
        if num_unfit:
            raise CheckpointError(
                f"{self._folder.path}: tensor {name!r} holds {num_unfit} scales that are infinite "
                "or not a number; fetch the file again"
            )


def _in_words(rows: Span | None) -> Span | None:
    if rows is None:
        return None
    return Span(start=rows.start // NIBBLES, stop=-(-rows.stop // NIBBLES))


def _by_columns(words_IW: Tensor, order: tuple[int, ...] | range) -> Tensor:
    """Numbers uint8 [I, 8 W] of words along the last dimension; `order` names nibbles' columns."""
    out_IWN = torch.empty(*words_IW.shape, NIBBLES, dtype=torch.uint8)
    for nibble, column in enumerate(order):
        out_IWN[..., column] = (words_IW >> 4 * nibble & 15).to(torch.uint8)
    return out_IWN.flatten(1)


def _by_rows(words_WO: Tensor) -> Tensor:
    """Numbers uint8 [8 W, O] of words along the first dimension."""
    out_WNO = torch.empty(words_WO.shape[0], NIBBLES, words_WO.shape[1], dtype=torch.uint8)
    for nibble in range(NIBBLES):
        out_WNO[:, nibble] = (words_WO >> 4 * nibble & 15).to(torch.uint8)
    return out_WNO.flatten(0, 1)


def _four_bits(levels_IO: Tensor, zeros_GO: Tensor, scales_GO: Tensor, group: int) -> StoredProduct:
    return StoredProduct(
        weight=QuantizedWeight(
            kind="int4",
            in_features=levels_IO.shape[0],
            data=_pack(levels_IO),
            scales=scales_GO.t().contiguous(),
            zeros=zeros_GO.t().float().contiguous(),
            group_size=group,
        )
    )


def _trim(value_IO: Tensor, rows: Span | None) -> Tensor:
    """Drop the rows that the first and last word hold beside those asked for."""
    if rows is None:
        return value_IO
    first = rows.start % NIBBLES
    return value_IO[:, first : first + rows.size]


def _pack(levels_IO: Tensor) -> Tensor:
    """Levels as `QuantizedWeight` keeps them: uint8 [O, I / 2], the even column in the low half."""
    if levels_IO.shape[0] % 2:
        levels_IO = torch.cat([levels_IO, torch.zeros_like(levels_IO[:1])])
    return (levels_IO[::2] | levels_IO[1::2] << 4).t().contiguous()
