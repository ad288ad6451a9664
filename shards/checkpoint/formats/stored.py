"""Which tensors a checkpoint of some format must hold, and which part of each a rank reads.

One list serves all: verifying a folder, writing one, and planning who reads which bytes. Needs no
torch; knows nothing of files.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from math import gcd, prod

from arriero.shards.checkpoint.formats.llama4_names import llama4_modules
from arriero.shards.checkpoint.formats.modules import Axis, Kind, Module, Place, llama_modules
from arriero.shards.checkpoint.formats.scheme import FLOAT8, QuantScheme
from arriero.shards.errors import CheckpointError
from arriero.shards.layout.dense import Span
from arriero.shards.layout.parts import AnyModel, AnyPart
from arriero.shards.model_config.dense import ModelConfig
from arriero.shards.model_config.llama4 import Llama4Config

ITEMSIZE = {"BF16": 2, "F16": 2, "F32": 4, "F8_E4M3": 1, "I8": 1, "I32": 4, "I64": 8}
"""Bytes of the safetensors dtypes that occur here."""
FLOATS = ("BF16", "F16", "F32")
LABELS = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
NIBBLES = 8
"""Four-bit numbers in a word."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DimCut:
    """A dimension that ranks share: entries start * per // each .. ceil(stop * per / each).

    Attributes:
        dim: of the stored tensor.
        axis: whose span a rank holds.
        per, each: entries to every `each` indices of the axis.
        stacked: equal parts of the dimension, one after another, each cut so.
    """

    dim: int
    axis: Axis
    per: int = 1
    each: int = 1
    stacked: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorDue:
    """A tensor that the checkpoint must hold.

    Attributes:
        name: in full.
        dtypes: safetensors labels that it may have; the first is the usual one.
        shape: as stored.
        kind: what it counts as.
        scale: whether it is a quantization's scale, zero point or group index.
        layer, place: which stage reads it.
        cuts: how its ranks share it; none means that each reads it whole.
        expert: of which expert it is, where each has tensors of its own.
        optional: a checkpoint may leave it out.
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
        """Bytes of an element, in the usual dtype."""
        return ITEMSIZE[self.dtypes[0]]

    @property
    def nbytes(self) -> int:
        """Bytes stored, in the usual dtype."""
        return prod(self.shape) * self.itemsize


Box = tuple[Span, ...]
"""A range in each dimension of a tensor."""


def text_prefix(model: AnyModel) -> str:
    """What the names of the text model's tensors begin with."""
    sees = isinstance(model, Llama4Config) and model.vision is not None
    return "language_model." if sees else ""


def modules_of(model: AnyModel, scheme: QuantScheme | None) -> tuple[Module, ...]:
    """The model's matrices and vectors, experts fused or not as the format has them."""
    return _modules(model, scheme is None)


@lru_cache(maxsize=8)
def _modules(model: AnyModel, fused: bool) -> tuple[Module, ...]:
    if isinstance(model, ModelConfig):
        return tuple(llama_modules(model))
    return tuple(llama4_modules(model, fused=fused))


def tensors_due(model: AnyModel, scheme: QuantScheme | None) -> list[TensorDue]:
    """Every tensor that a checkpoint of `model` in the form `scheme` holds.

    Raises:
        CheckpointError: a matrix that the form cannot hold.
    """
    found: list[TensorDue] = []
    usual = LABELS[model.torch_dtype]
    plain = (usual, *(one for one in FLOATS if one != usual))
    for module in modules_of(model, scheme):
        if scheme is not None and module.product and scheme.covers(module.name, module.kind):
            found += _quantized(module, scheme, plain)
        else:
            found += _plain(module, plain)
    return found


def _plain(module: Module, dtypes: tuple[str, ...]) -> Iterator[TensorDue]:
    if module.experts:
        yield _fused(module, dtypes)
        return
    last = len(module.shape) - 1
    cuts = [(0, module.rows), (last, module.columns)]
    yield _due(
        module,
        module.suffix,
        dtypes,
        module.shape,
        tuple(DimCut(dim=dim, axis=cut.axis, per=cut.per) for dim, cut in cuts if cut is not None),
    )
    if module.bias:
        yield _bias(module, dtypes)


def _bias(module: Module, dtypes: tuple[str, ...]) -> TensorDue:
    return _due(module, ".bias", dtypes, module.shape[:1], _row_cut(module, 0))


def _row_cut(module: Module, dim: int, each: int = 1) -> tuple[DimCut, ...]:
    cut = module.rows
    return () if cut is None else (DimCut(dim=dim, axis=cut.axis, per=cut.per, each=each),)


def _column_cut(module: Module, dim: int, each: int = 1) -> tuple[DimCut, ...]:
    cut = module.columns
    return () if cut is None else (DimCut(dim=dim, axis=cut.axis, per=cut.per, each=each),)


def _fused(module: Module, dtypes: tuple[str, ...]) -> TensorDue:
    """All experts in one tensor [experts, in, out]."""
    rows, columns = module.shape
    cuts = [DimCut(dim=0, axis="experts")]
    if module.rows is not None:
        cuts.append(DimCut(dim=2, axis=module.rows.axis, stacked=module.stacked))
    if module.columns is not None:
        cuts.append(DimCut(dim=1, axis=module.columns.axis))
    return _due(module, module.suffix, dtypes, (module.experts, columns, rows), tuple(cuts))


def _quantized(module: Module, scheme: QuantScheme, plain: tuple[str, ...]) -> Iterator[TensorDue]:
    rows, columns = module.shape
    if module.experts:
        raise CheckpointError(f"{module.name}: {scheme.method} checkpoints keep experts apart")
    if scheme.method in FLOAT8 or scheme.method == "int-quantized":
        cuts = _row_cut(module, 0) + _column_cut(module, 1)
        numbers = "F8_E4M3" if scheme.method in FLOAT8 else "I8"
        yield _due(module, ".weight", (numbers,), (rows, columns), cuts)
        full = scheme.method in ("fbgemm_fp8", "fp8")
        scales = ("F32", "BF16", "F16") if full else ("BF16", "F32", "F16")
        if scheme.per_tensor:
            yield _due(module, ".weight_scale", scales, (1,), (), scale=True)
        else:
            yield _due(module, ".weight_scale", scales, (rows, 1), _row_cut(module, 0), scale=True)
    elif scheme.method == "pack-quantized":
        yield from _packed(module, scheme)
    else:
        yield from _four_bits(module, scheme)
    if module.bias:
        yield _bias(module, plain)


def _packed(module: Module, scheme: QuantScheme) -> Iterator[TensorDue]:
    """compressed-tensors' integers: as the matrix lies, words along its columns."""
    rows, columns = module.shape
    group, word = scheme.group_size or columns, 32 // scheme.bits
    if columns % word or (columns % group and scheme.bits == 4):
        raise CheckpointError(
            f"{module.name}: {columns} columns are no multiple of {word} and {group}, as "
            "pack-quantized needs"
        )
    groups, floats = columns // group, ("BF16", "F16", "F32")
    by_row = _row_cut(module, 0)
    grouped = () if scheme.act_order else _column_cut(module, 1, group)
    cuts = by_row + _column_cut(module, 1, word)
    yield _due(module, ".weight_packed", ("I32",), (rows, columns // word), cuts)
    cuts = by_row + (grouped if groups > 1 else ())
    yield _due(module, ".weight_scale", floats, (rows, groups), cuts, scale=True)
    if not scheme.symmetric:
        cuts = _row_cut(module, 0, NIBBLES) + (grouped if groups > 1 else ())
        shape = (-(-rows // NIBBLES), groups)
        yield _due(module, ".weight_zero_point", ("I32",), shape, cuts, scale=True)
    if scheme.act_order:
        cuts = _column_cut(module, 0)
        yield _due(module, ".weight_g_idx", ("I32",), (columns,), cuts, scale=True)
    yield _due(module, ".weight_shape", ("I64",), (2,), (), scale=True)


def _four_bits(module: Module, scheme: QuantScheme) -> Iterator[TensorDue]:
    """Transposed: dimension 0 is of the columns, dimension 1 of the rows."""
    rows, columns = module.shape
    group = scheme.group_size or columns
    for what, size, unit in (
        ("rows", rows, NIBBLES),
        ("columns", columns, NIBBLES),
        ("columns", columns, group),
    ):
        if size % unit:
            raise CheckpointError(
                f"{module.name}: {size} {what} are no multiple of {unit}, as {scheme.method} needs"
            )
    by_row, by_word = _row_cut(module, 1), _row_cut(module, 1, NIBBLES)
    half = ("F16", "BF16")
    grouped = () if scheme.act_order else _column_cut(module, 0, group)
    if scheme.method == "awq":
        cuts = _column_cut(module, 0) + by_word
        yield _due(module, ".qweight", ("I32",), (columns, rows // NIBBLES), cuts)
    else:
        cuts = _column_cut(module, 0, NIBBLES) + by_row
        yield _due(module, ".qweight", ("I32",), (columns // NIBBLES, rows), cuts)
        index = _due(module, ".g_idx", ("I32",), (columns,), _column_cut(module, 0), scale=True)
        yield replace(index, optional=not scheme.act_order)
    shape = (columns // group, rows // NIBBLES)
    yield _due(module, ".qzeros", ("I32",), shape, grouped + by_word, scale=True)
    shape = (columns // group, rows)
    yield _due(module, ".scales", half, shape, grouped + by_row, scale=True)


def _due(
    module: Module,
    suffix: str,
    dtypes: tuple[str, ...],
    shape: tuple[int, ...],
    cuts: tuple[DimCut, ...],
    *,
    scale: bool = False,
) -> TensorDue:
    return TensorDue(
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


def reads(tensor: TensorDue, part: AnyPart) -> list[Box]:
    """The parts of a tensor that a rank reads: none, one, or one for each stacked part."""
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
    """Columns that share a scale in a slice: where a cut falls inside a group, fewer than `group`.

    Args:
        columns: of the slice.
        num_columns: of the whole matrix.
        group: columns that share a scale there.
    """
    found = gcd(columns.start, group)
    if columns.stop != num_columns:
        found = gcd(columns.stop, found)
    return min(found, columns.size)


def span_of(part: AnyPart, axis: Axis) -> Span:
    """What a rank holds of an axis."""
    found: Span = getattr(part, axis)
    return found


def box_elements(box: Box) -> int:
    """Elements in a box."""
    return prod(span.size for span in box)


def bytes_read(tensors: Iterable[TensorDue], part: AnyPart) -> int:
    """Bytes that a rank reads of all tensors, each in its usual dtype."""
    return sum(
        box_elements(box) * tensor.itemsize for tensor in tensors for box in reads(tensor, part)
    )


def byte_ranges(
    shape: tuple[int, ...], itemsize: int, box: Box, start: int = 0
) -> Iterator[tuple[int, int]]:
    """The contiguous ranges of bytes that a box of a row-major tensor is made of, rising.

    Args:
        shape: of the tensor.
        itemsize: bytes of an element.
        box: a range in each dimension.
        start: byte at which the tensor begins.
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
    for one, stride in zip(outer, strides[:-1], strict=True):
        offsets = [at + i * stride for at in offsets for i in range(one.start, one.stop)]
    for at in offsets:
        yield at + span.start * strides[-1], at + span.stop * strides[-1]


def _on_stage(tensor: TensorDue, part: AnyPart) -> bool:
    if tensor.layer is not None:
        return _within(tensor.layer, part.layers)
    if tensor.place == "ends":
        return part.first_stage or part.last_stage
    return part.first_stage if tensor.place == "first" else part.last_stage


def _within(index: int, span: Span) -> bool:
    return span.start <= index < span.stop
