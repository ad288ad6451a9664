"""A checkpoint's matrices, whatever form they are stored in, by slice.

Gives plain matrices as views of the file, quantized ones as `QuantizedWeight` with the very
numbers stored: nothing is dequantized. Knows the layouts of `fbgemm_fp8`, compressed-tensors FP8,
AWQ and GPTQ, and Llama 4's experts, fused or not; refuses to know how a backend packs.

Sources of the layouts: fbgemm's and compressed-tensors' checkpoints as published (`weight` float8
[out, in], `weight_scale` [out, 1]); AWQ (Lin et al., 2023), "gemm" packing; GPTQ (Frantar et al.,
2022), versions 1 and 2 of its checkpoints.

Shape legend: O rows (outputs), I columns (inputs), G groups of columns, W words of eight numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from arriero.kernels.quant import QuantizedWeight
from arriero.shards.checkpoint.formats.scheme import QuantScheme
from arriero.shards.checkpoint.formats.stored import NIBBLES
from arriero.shards.checkpoint.reader import TensorFolder
from arriero.shards.errors import CheckpointError
from arriero.shards.partition import Span

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Nibble i of an AWQ word holds this one of its eight columns."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredProduct:
    """One matrix, or a slice of it: y = W x, or y = W x[input_order].

    Attributes:
        weight: a plain matrix [O, I] (a view of the file), or the quantized one.
        input_order: int64 [W's columns]: which input of the slice each column takes. Only where
            columns had to be sorted by group (GPTQ with act-order); then a column may stand for no
            input: it names input 0 and its element is exactly zero.
    """

    weight: Tensor | QuantizedWeight
    input_order: Tensor | None = None

    def dense(self) -> Tensor:
        """The matrix in its usual order, float32 [O, inputs]: to look at, not to compute with."""
        if isinstance(self.weight, Tensor):
            return self.weight.float()
        full_OI = self.weight.dequantize()
        if self.input_order is None:
            return full_OI
        num_inputs = int(self.input_order.max()) + 1
        out_OI = torch.zeros(full_OI.shape[0], num_inputs)
        return out_OI.index_add_(1, self.input_order, full_OI)


class ProductReader:
    """Reads matrices of an open folder."""

    def __init__(self, folder: TensorFolder, scheme: QuantScheme | None) -> None:
        self._folder, self._scheme = folder, scheme

    def product(
        self, name: str, rows: Span | None = None, columns: Span | None = None
    ) -> StoredProduct:
        """The matrix `name` (without `.weight`), or the rows and columns asked for.

        Raises:
            CheckpointError: it is not there, its scales are not finite, or a cut falls inside a
                group of columns that share a scale.
        """
        if self._scheme is None or f"{name}.weight" in self._folder.stored:
            return self._eight_bits_or_plain(name, rows, columns)
        if self._scheme.method == "awq":
            return self._awq(name, rows, columns)
        return self._gptq(name, rows, columns)

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
                self.product(f"{name}gate_proj", rows=columns),
                self.product(f"{name}up_proj", rows=columns),
                self.product(f"{name}down_proj", columns=columns),
            )
        gate_up_IO = self._one(fused, expert)
        down_IO = self._one(f"{prefix}.down_proj", expert)
        inner = gate_up_IO.shape[1] // 2
        own = columns or Span(start=0, stop=inner)
        gate, up = (gate_up_IO[:, at + own.start : at + own.stop].t() for at in (0, inner))
        down = down_IO[own.start : own.stop].t()
        return StoredProduct(weight=gate), StoredProduct(weight=up), StoredProduct(weight=down)

    def _one(self, name: str, expert: int) -> Tensor:
        whole = self._folder.tensor(name)
        if not 0 <= expert < whole.shape[0]:
            raise CheckpointError(f"tensor {name!r} holds {whole.shape[0]} experts, not {expert}")
        return whole[expert]

    def _eight_bits_or_plain(
        self, name: str, rows: Span | None, columns: Span | None
    ) -> StoredProduct:
        weight_OI = self._cut(f"{name}.weight", rows, columns)
        if weight_OI.dtype != torch.float8_e4m3fn:
            return StoredProduct(weight=weight_OI)
        scales_O1 = self._cut(f"{name}.weight_scale", rows, None).float()
        self._check_finite(f"{name}.weight_scale", scales_O1)
        num_columns = weight_OI.shape[1]
        return StoredProduct(
            weight=QuantizedWeight(
                kind="fp8",
                in_features=num_columns,
                data=weight_OI,
                scales=scales_O1,
                group_size=num_columns,
            )
        )

    def _awq(self, name: str, rows: Span | None, columns: Span | None) -> StoredProduct:
        num_inputs = self._folder.shape(f"{name}.qweight")[0]
        groups = self._groups(name, columns, num_inputs)
        levels_IO = _by_columns(self._words(f"{name}.qweight", columns, rows), AWQ_ORDER)
        zeros_GO = _by_columns(self._words(f"{name}.qzeros", groups, rows), AWQ_ORDER)
        return self._four_bits(
            name, _trim(levels_IO, rows), _trim(zeros_GO, rows), self._scales(name, groups, rows)
        )

    def _gptq(self, name: str, rows: Span | None, columns: Span | None) -> StoredProduct:
        assert self._scheme is not None
        group = self._scheme.group_size
        group_of_I = self._folder.tensor(f"{name}.g_idx").long()
        own = columns or Span(start=0, stop=len(group_of_I))
        words = Span(start=own.start // NIBBLES, stop=-(-own.stop // NIBBLES))
        levels_IO = _by_rows(self._cut(f"{name}.qweight", words, rows))
        first = own.start - words.start * NIBBLES
        levels_IO = levels_IO[first : first + own.size]
        in_order = torch.equal(group_of_I, torch.arange(len(group_of_I)) // group)
        groups = self._groups(name, columns, len(group_of_I)) if in_order else None
        zeros_GO = _by_columns(self._words(f"{name}.qzeros", groups, rows), range(NIBBLES))
        zeros_GO = _trim(zeros_GO, rows) + self._scheme.zero_offset & 15
        scales_GO = self._scales(name, groups, rows)
        if in_order:
            return self._four_bits(name, levels_IO, zeros_GO, scales_GO)
        own_I = group_of_I[own.start : own.stop]
        if int(group_of_I.min()) < 0 or int(group_of_I.max()) >= len(scales_GO):
            raise CheckpointError(f"tensor {name + '.g_idx'!r} names groups beyond its scales")
        return self._sorted(levels_IO, zeros_GO, scales_GO, own_I)

    def _groups(self, name: str, columns: Span | None, num_inputs: int) -> Span | None:
        assert self._scheme is not None
        group = self._scheme.group_size
        if columns is None:
            return None
        for at in (columns.start, columns.stop):
            if at % group and at != num_inputs:
                raise CheckpointError(
                    f"{name}: columns {columns.start}:{columns.stop} cut a group of {group} that "
                    "shares a scale; use a tp (or tp_shares) that divides the groups"
                )
        return Span(start=columns.start // group, stop=-(-columns.stop // group))

    def _four_bits(
        self, name: str, levels_IO: Tensor, zeros_GO: Tensor, scales_GO: Tensor
    ) -> StoredProduct:
        assert self._scheme is not None
        return StoredProduct(
            weight=QuantizedWeight(
                kind="int4",
                in_features=levels_IO.shape[0],
                data=_pack(levels_IO),
                scales=scales_GO.t().contiguous(),
                zeros=zeros_GO.t().float().contiguous(),
                group_size=min(self._scheme.group_size, levels_IO.shape[0]),
            )
        )

    def _sorted(
        self, levels_IO: Tensor, zeros_GO: Tensor, scales_GO: Tensor, group_of_I: Tensor
    ) -> StoredProduct:
        """Sort columns by group; groups of fewer members are filled with zero elements.

        A slice of the columns holds a part of every group, so that its groups differ in size.
        """
        num_groups = scales_GO.shape[0]
        counts_G = torch.bincount(group_of_I, minlength=num_groups)
        width = int(counts_G.max())
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
            weight=QuantizedWeight(
                kind="int4",
                in_features=num_groups * width,
                data=_pack(filled_IO),
                scales=scales_GO.t().contiguous(),
                zeros=zeros_GO.t().float().contiguous(),
                group_size=width,
            ),
            input_order=input_order,
        )

    def _scales(self, name: str, groups: Span | None, rows: Span | None) -> Tensor:
        scales_GO = self._cut(f"{name}.scales", groups, rows).float()
        self._check_finite(f"{name}.scales", scales_GO)
        return scales_GO

    def _words(self, name: str, first: Span | None, rows: Span | None) -> Tensor:
        """Words of eight rows each that hold `rows`, which `_trim` cuts to measure."""
        words = None
        if rows is not None:
            words = Span(start=rows.start // NIBBLES, stop=-(-rows.stop // NIBBLES))
        return self._cut(name, first, words)

    def _cut(self, name: str, first: Span | None, last: Span | None) -> Tensor:
        found = self._folder.tensor(name)
        for dim, span in ((0, first), (found.ndim - 1, last)):
            if span is None:
                continue
            if not 0 <= span.start <= span.stop <= found.shape[dim]:
                raise CheckpointError(
                    f"tensor {name!r} of shape {list(found.shape)} has no {span.start}:{span.stop} "
                    f"in dimension {dim}"
                )
            found = found.narrow(dim, span.start, span.size)
        return found

    def _check_finite(self, name: str, scales: Tensor) -> None:
        num_unfit = int(scales.numel() - torch.isfinite(scales).sum())
        if num_unfit:
            raise CheckpointError(
                f"{self._folder.path}: tensor {name!r} holds {num_unfit} scales that are infinite "
                "or not a number; fetch the file again"
            )


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
