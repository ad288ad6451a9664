"""The tensors of a checkpoint in a form, and the part of each tensor that a rank reads.

The same list serves to verify a folder, to write a folder, and to plan the bytes that each rank
reads. Needs no torch; knows nothing of files.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from math import gcd, prod

from arriero.shards.checkpoint.formats.modules import Axis, Kind, Module, Place
from arriero.shards.checkpoint.formats.nibbles import NIBBLES
from arriero.shards.checkpoint.formats.scheme import FLOAT8, QuantScheme
from arriero.shards.errors import CheckpointError
from arriero.shards.families.registry import family_of
from arriero.shards.layout.dense import Span
from arriero.shards.layout.parts import AnyModel, AnyPart

ITEMSIZE = {"BF16": 2, "F16": 2, "F32": 4, "F8_E4M3": 1, "I8": 1, "U8": 1, "I32": 4, "I64": 8}
"""Bytes of an element, by safetensors dtype."""
FLOATS = ("BF16", "F16", "F32")
LABELS = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


@dataclass(frozen=True, kw_only=True, slots=True)
class DimCut:
    """Cut of a dimension: a rank reads entries start * per // each .. ceil(stop * per / each).

    Attributes:
        dim: dimension of the stored tensor.
        axis: axis of the partition; start and stop are the span of the rank.
        per, each: `per` entries for every `each` indices of the axis.
        stacked: number of equal consecutive parts of the dimension, each with this cut.
    """

    dim: int
    axis: Axis
    per: int = 1
    each: int = 1
    stacked: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorSpec:
    """A tensor of a checkpoint.

    Attributes:
        name: full name.
        dtypes: accepted safetensors dtypes; the first is the usual dtype.
        shape: stored shape.
        kind: kind of module.
        scale: whether the tensor is a scale, zero point or group index of a quantization.
        layer, place: pipeline stage that reads the tensor.
        cuts: shares of the ranks; without cuts each rank reads the whole tensor.
        expert: number of the expert, if each expert has separate tensors.
        optional: the tensor may be missing.
    """

    name: str
    dtypes: tuple[str, ...]
    shape: tuple[int, ...]
    kind: Kind
    scale: bool = False
    layer: int | None = None
    place: Place = "layer"
    cuts: tuple[DimCut, ...] = ()
    expert: int | None = None
    optional: bool = False

    @property
    def itemsize(self) -> int:
        """Bytes of an element in the usual dtype."""
        return ITEMSIZE[self.dtypes[0]]

    @property
    def nbytes(self) -> int:
        """Stored bytes in the usual dtype."""
        return prod(self.shape) * self.itemsize


Box = tuple[Span, ...]
"""A range for each dimension of a tensor."""


def text_prefix(model: AnyModel) -> str:
    """Name prefix of the text model's tensors."""
    return family_of(model).text_prefix(model)


def modules_of(model: AnyModel, scheme: QuantScheme | None) -> tuple[Module, ...]:
    """The model's matrices and vectors; experts are fused in plain checkpoints and some forms."""
    return _modules(model, scheme is None or scheme.fused)


@lru_cache(maxsize=8)
def _modules(model: AnyModel, fused: bool) -> tuple[Module, ...]:
    return tuple(family_of(model).modules(model, fused))


def tensor_specs(model: AnyModel, scheme: QuantScheme | None) -> list[TensorSpec]:
    """Every tensor of a checkpoint of `model` in the form `scheme`.

    Raises:
        CheckpointError: the form cannot store a matrix of this shape.
    """
    specs: list[TensorSpec] = []
    plain = _plain_dtypes(model.torch_dtype)
    for module in modules_of(model, scheme):
        if scheme is not None and module.product and scheme.covers(module.name, module.kind):
            specs += _quantized(module, scheme, plain)
        else:
            specs += _plain(module, plain)
    return specs


def plain_specs(modules: Iterable[Module], torch_dtype: str) -> list[TensorSpec]:
    """The tensors of `modules` without a quantized form; `torch_dtype` is the usual dtype."""
    dtypes = _plain_dtypes(torch_dtype)
    return [spec for module in modules for spec in _plain(module, dtypes)]


def _plain_dtypes(torch_dtype: str) -> tuple[str, ...]:
    usual = LABELS[torch_dtype]
    return (usual, *(label for label in FLOATS if label != usual))


def _plain(module: Module, dtypes: tuple[str, ...]) -> Iterator[TensorSpec]:
    if module.experts:
        yield _fused(module, dtypes)
        return
    last = len(module.shape) - 1
    cuts = [(0, module.rows), (last, module.columns)]
    yield _spec(
        module,
        module.suffix,
        dtypes,
        module.shape,
        tuple(DimCut(dim=dim, axis=cut.axis, per=cut.per) for dim, cut in cuts if cut is not None),
    )
    if module.bias:
        yield _bias(module, dtypes)


def _bias(module: Module, dtypes: tuple[str, ...]) -> TensorSpec:
    return _spec(module, ".bias", dtypes, module.shape[:1], _row_cut(module, 0))


def _row_cut(module: Module, dim: int, each: int = 1) -> tuple[DimCut, ...]:
    cut = module.rows
    return () if cut is None else (DimCut(dim=dim, axis=cut.axis, per=cut.per, each=each),)


def _column_cut(module: Module, dim: int, each: int = 1) -> tuple[DimCut, ...]:
    cut = module.columns
    return () if cut is None else (DimCut(dim=dim, axis=cut.axis, per=cut.per, each=each),)


def _fused(module: Module, dtypes: tuple[str, ...], each: int = 1, scale: str = "") -> TensorSpec:
    """All experts in one tensor [experts, in, out], for scales with an end `scale` of the name."""
    rows, columns = module.shape
    cuts = [DimCut(dim=0, axis="experts")]
    if module.rows is not None:
        cuts.append(DimCut(dim=2, axis=module.rows.axis, stacked=module.stacked))
    if module.columns is not None:
        cuts.append(DimCut(dim=1, axis=module.columns.axis, each=each))
    shape = (module.experts, columns // each, rows)
    suffix = f"{module.suffix}{scale}"
    return _spec(module, suffix, dtypes, shape, tuple(cuts), scale=bool(scale))


def _quantized(module: Module, scheme: QuantScheme, plain: tuple[str, ...]) -> Iterator[TensorSpec]:
    rows, columns = module.shape
    if module.experts and scheme.method not in ("modelopt-fp8", "modelopt-nvfp4"):
        raise CheckpointError(
            f"{module.name}: {scheme.method} checkpoints store experts "
            "separately; use another checkpoint"
        )
    if scheme.method == "modelopt-nvfp4":
        yield from _nvfp4(module, scheme)
    elif module.experts:
        yield _fused(module, ("F8_E4M3",))
        yield _single_scale(module, "weight_scale")
    elif scheme.method in FLOAT8 or scheme.method == "int-quantized":
        cuts = _row_cut(module, 0) + _column_cut(module, 1)
        numbers = "F8_E4M3" if scheme.method in FLOAT8 else "I8"
        yield _spec(module, ".weight", (numbers,), (rows, columns), cuts)
        full = scheme.method in ("fbgemm_fp8", "fp8", "modelopt-fp8")
        scales = ("F32", "BF16", "F16") if full else ("BF16", "F32", "F16")
        if scheme.per_tensor:
            yield _spec(module, ".weight_scale", scales, (1,), (), scale=True)
        else:
            yield _spec(module, ".weight_scale", scales, (rows, 1), _row_cut(module, 0), scale=True)
    elif scheme.method == "pack-quantized":
        yield from _packed(module, scheme)
    else:
        yield from _four_bits(module, scheme)
    if scheme.input_scale:
        yield _single_scale(module, "input_scale")
    if module.bias:
        yield _bias(module, plain)


def _single_scale(module: Module, name: str) -> TensorSpec:
    """A scale of a whole matrix, or of all fused experts of a layer; each rank reads it."""
    suffix = f"_{name}" if module.experts else f".{name}"
    return _spec(module, suffix, ("F32", "BF16", "F16"), (1,), (), scale=True)


def _nvfp4(module: Module, scheme: QuantScheme) -> Iterator[TensorSpec]:
    """Two columns in a byte, a float8 scale for each group of columns, a scale of the matrix."""
    rows, columns = module.shape
    group = scheme.group_size
    if columns % group:
        raise CheckpointError(
            f"{module.name}: {columns} columns are not a multiple of {group}, which "
            f"{scheme.method} requires; use another form"
        )
    if module.experts:
        yield _fused(module, ("U8",), 2)
        yield _fused(module, ("F8_E4M3",), group, "_weight_scale")
    else:
        by_row = _row_cut(module, 0)
        cuts = by_row + _column_cut(module, 1, 2)
        yield _spec(module, ".weight", ("U8",), (rows, columns // 2), cuts)
        cuts = by_row + _column_cut(module, 1, group)
        shape = (rows, columns // group)
        yield _spec(module, ".weight_scale", ("F8_E4M3",), shape, cuts, scale=True)
    yield _single_scale(module, "weight_scale_2")


def _packed(module: Module, scheme: QuantScheme) -> Iterator[TensorSpec]:
    """Packed integers of compressed-tensors: [out, in], words along the columns."""
    rows, columns = module.shape
    group, word = scheme.group_size or columns, 32 // scheme.bits
    if columns % word or (columns % group and scheme.bits == 4):
        raise CheckpointError(
            f"{module.name}: {columns} columns are not a multiple of {word} and {group}, "
            "which pack-quantized requires; use another group size or form"
        )
    groups, floats = columns // group, ("BF16", "F16", "F32")
    by_row = _row_cut(module, 0)
    grouped = () if scheme.act_order else _column_cut(module, 1, group)
    cuts = by_row + _column_cut(module, 1, word)
    yield _spec(module, ".weight_packed", ("I32",), (rows, columns // word), cuts)
    cuts = by_row + (grouped if groups > 1 else ())
    yield _spec(module, ".weight_scale", floats, (rows, groups), cuts, scale=True)
    if not scheme.symmetric:
        cuts = _row_cut(module, 0, NIBBLES) + (grouped if groups > 1 else ())
        shape = (-(-rows // NIBBLES), groups)
        yield _spec(module, ".weight_zero_point", ("I32",), shape, cuts, scale=True)
    if scheme.act_order:
        cuts = _column_cut(module, 0)
        yield _spec(module, ".weight_g_idx", ("I32",), (columns,), cuts, scale=True)
    yield _spec(module, ".weight_shape", ("I64",), (2,), (), scale=True)


def _four_bits(module: Module, scheme: QuantScheme) -> Iterator[TensorSpec]:
    """AWQ and GPTQ, transposed: dimension 0 for the columns, dimension 1 for the rows."""
    rows, columns = module.shape
    group = scheme.group_size or columns
    for dimension, size, unit in (
        ("rows", rows, NIBBLES),
        ("columns", columns, NIBBLES),
        ("columns", columns, group),
    ):
        if size % unit:
            raise CheckpointError(
                f"{module.name}: {size} {dimension} are not a multiple of {unit}, which "
                f"{scheme.method} requires; use another group size or form"
            )
    by_row, by_word = _row_cut(module, 1), _row_cut(module, 1, NIBBLES)
    half = ("F16", "BF16")
    grouped = () if scheme.act_order else _column_cut(module, 0, group)
    if scheme.method == "awq":
        cuts = _column_cut(module, 0) + by_word
        yield _spec(module, ".qweight", ("I32",), (columns, rows // NIBBLES), cuts)
    else:
        cuts = _column_cut(module, 0, NIBBLES) + by_row
        yield _spec(module, ".qweight", ("I32",), (columns // NIBBLES, rows), cuts)
        index = _spec(module, ".g_idx", ("I32",), (columns,), _column_cut(module, 0), scale=True)
        yield replace(index, optional=not scheme.act_order)
    shape = (columns // group, rows // NIBBLES)
    yield _spec(module, ".qzeros", ("I32",), shape, grouped + by_word, scale=True)
    shape = (columns // group, rows)
    yield _spec(module, ".scales", half, shape, grouped + by_row, scale=True)


def _spec(
    module: Module,
    suffix: str,
    dtypes: tuple[str, ...],
    shape: tuple[int, ...],
    cuts: tuple[DimCut, ...],
    *,
    scale: bool = False,
) -> TensorSpec:
    return TensorSpec(
        name=module.name + suffix,
        dtypes=dtypes,
        shape=shape,
        kind=module.kind,
        scale=scale,
        layer=module.layer,
        place=module.place,
        cuts=cuts,
        expert=module.expert,
    )


def reads(tensor: TensorSpec, part: AnyPart) -> list[Box]:
    """The boxes of a tensor that a rank reads: none, or a box for each stacked part."""
    if not _on_stage(tensor, part):
        return []
    if tensor.expert is not None and not _within(tensor.expert, span_of(part, "experts")):
        return []
    boxes: list[Box] = [tuple(Span(start=0, stop=size) for size in tensor.shape)]
    for cut in tensor.cuts:
        span = span_of(part, cut.axis)
        size = tensor.shape[cut.dim] // cut.stacked
        start = span.start * cut.per // cut.each
        stop = min(-(-span.stop * cut.per // cut.each), size)
        pieces = [Span(start=k * size + start, stop=k * size + stop) for k in range(cut.stacked)]
        boxes = [(*box[: cut.dim], piece, *box[cut.dim + 1 :]) for box in boxes for piece in pieces]
    return boxes


def cut_group(columns: Span, num_columns: int, group: int) -> int:
    """Columns that share a scale in a slice; fewer than `group` if a cut falls inside a group.

    Args:
        columns: columns of the slice.
        num_columns: number of columns of the whole matrix.
        group: columns that share a scale in the whole matrix.
    """
    size = gcd(columns.start, group)
    if columns.stop != num_columns:
        size = gcd(columns.stop, size)
    return min(size, columns.size)


def span_of(part: AnyPart, axis: Axis) -> Span:
    """Span of a rank on an axis."""
    span: Span = getattr(part, axis)
    return span


def box_elements(box: Box) -> int:
    """Number of elements in a box."""
    return prod(span.size for span in box)


def bytes_read(tensors: Iterable[TensorSpec], part: AnyPart) -> int:
    """Bytes that a rank reads of all tensors, each tensor in the usual dtype."""
    return sum(
        box_elements(box) * tensor.itemsize for tensor in tensors for box in reads(tensor, part)
    )


def byte_ranges(
    shape: tuple[int, ...], itemsize: int, box: Box, start: int = 0
) -> Iterator[tuple[int, int]]:
    """The contiguous byte ranges of a box of a row-major tensor, in ascending order.

    Args:
        shape: shape of the tensor.
        itemsize: bytes of an element.
        box: range for each dimension.
        start: first byte of the tensor.
    """
    inner = len(shape)
    while inner and box[inner - 1].start == 0 and box[inner - 1].stop == shape[inner - 1]:
        inner -= 1
    run = itemsize * prod(shape[inner:])
    if inner == 0:
        yield start, start + run
        return
    *outer, span = box[:inner]
    strides = [itemsize * prod(shape[i + 1 :]) for i in range(inner)]
    offsets = [start]
    for rows, stride in zip(outer, strides[:-1], strict=True):
        offsets = [at + i * stride for at in offsets for i in range(rows.start, rows.stop)]
    for at in offsets:
        yield at + span.start * strides[-1], at + span.stop * strides[-1]


def _on_stage(tensor: TensorSpec, part: AnyPart) -> bool:
    if tensor.layer is not None:
        return _within(tensor.layer, part.layers)
    if tensor.place == "ends":
        return part.first_stage or part.last_stage
    return part.first_stage if tensor.place == "first" else part.last_stage


def _within(index: int, span: Span) -> bool:
    return span.start <= index < span.stop
