"""What headers cannot tell of a quantized folder, and loading would find: indices, shapes, stacks.

Reads the small tensors of a form (indices of groups, stated shapes) and no weights. Whatever is
refused here is refused alike by verifying and by loading. Knows forms; knows no slices.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from arriero.shards.checkpoint.formats.modules import Module
from arriero.shards.checkpoint.formats.scheme import QuantScheme
from arriero.shards.checkpoint.formats.stored import modules_of
from arriero.shards.layout.parts import AnyModel

if TYPE_CHECKING:
    from arriero.shards.checkpoint.tensor_folder import TensorFolder

_STACKED = re.compile(r"(.*\.)(?:([qkv])|(gate|up))_proj$")
_SCALES = (".weight_scale", ".scales")


def form_problems(folder: TensorFolder, model: AnyModel, scheme: QuantScheme) -> list[str]:
    """All that keeps products of this form from being loaded; the headers are known to fit."""
    problems: list[str] = []
    stacks: dict[str, list[Module]] = {}
    orders: dict[str, Tensor | None] = {}
    for module in modules_of(model, scheme):
        if not module.product or module.experts:
            continue
        stacked = _STACKED.match(module.name)
        if stacked is not None and module.kind != "vision":
            stacks.setdefault(f"{stacked[1]}{'qkv' if stacked[2] else 'gate_up'}", []).append(
                module
            )
        if not scheme.covers(module.name, module.kind):
            continue
        found, orders[module.name] = _of_one(folder, module, scheme)
        problems += found
        sorts = orders[module.name] is not None
        if module.kind == "head" and (sorts or scheme.activation_bound is not None):
            problems.append(
                f"{module.name}: a head whose inputs are rounded or sorted is not computed; ignore "
                "it when quantizing"
            )
    for stack in stacks.values():
        problems += _stack_problems(stack, scheme, orders)
    return problems


def _of_one(
    folder: TensorFolder, module: Module, scheme: QuantScheme
) -> tuple[list[str], Tensor | None]:
    """What is wrong with one product, and the groups of its columns where they are sorted."""
    name, problems = module.name, []
    rows, columns = module.shape
    if scheme.method == "pack-quantized":
        stated = folder.tensor(f"{name}.weight_shape").tolist()
        if stated != [rows, columns]:
            problems.append(
                f"tensor {name + '.weight_shape'!r} says {stated}, but {[rows, columns]} are packed"
            )
    if scheme.kind != "int4":
        return problems, None
    group = scheme.group_size or columns
    if group % 2 and group < columns:
        problems.append(f"{name}: groups of {group} columns are not computed; an even number is")
    index = f"{name}.{'g_idx' if scheme.method == 'gptq' else 'weight_g_idx'}"
    if scheme.method == "awq" or index not in folder.stored:
        return problems, None
    if scheme.method == "pack-quantized" and not scheme.act_order:
        return problems, None
    group_of_I = folder.tensor(index).long()
    if in_order(group_of_I, group):
        return problems, None
    wrong = index_problem(index, group_of_I, columns // group)
    if wrong is None and module.expert is not None:
        most = int(torch.bincount(group_of_I).max())
        if most > group:
            wrong = f"tensor {index!r} gives a group {most} columns; the group size is {group}"
    return [*problems, *([] if wrong is None else [wrong])], group_of_I


def _stack_problems(
    stack: list[Module], scheme: QuantScheme, orders: dict[str, Tensor | None]
) -> list[str]:
    """Matrices that make one product must be of one form and sort their inputs alike."""
    names = " and ".join(one.name for one in stack)
    covered = {scheme.covers(one.name, one.kind) for one in stack}
    if len(covered) > 1:
        return [
            f"{names} make one product, but some of them are quantized and some are not; quantize "
            "all of them or none"
        ]
    found = [orders.get(one.name) for one in stack]
    first = found[0]
    same = all(
        (one is None) == (first is None)
        and (one is None or first is None or torch.equal(one, first))
        for one in found
    )
    return [] if same else [f"{names} make one product, but sort or round their inputs differently"]


def in_order(group_of_I: Tensor, group_size: int) -> bool:
    """Whether an index says no more than that groups are runs of columns (or nothing: all -1)."""
    ordered = torch.arange(len(group_of_I)) // group_size
    return torch.equal(group_of_I.long(), ordered) or bool((group_of_I == -1).all())


def index_problem(name: str, group_of_I: Tensor, num_groups: int) -> str | None:
    """What is wrong with an index of groups, if anything."""
    if int(group_of_I.min()) < 0 or int(group_of_I.max()) >= num_groups:
        return f"tensor {name!r} names groups beyond its scales"
    return None


def unfit_scales(folder: TensorFolder, most_bytes: int) -> tuple[list[str], bool]:
    """Scales that are infinite or not a number, which loading refuses.

    Args:
        folder: of any form.
        most_bytes: read no more than that.

    Returns:
        One sentence a tensor; whether all scales were read.
    """
    scales = [one for one in folder.stored.values() if one.name.endswith(_SCALES)]
    if sum(one.nbytes for one in scales) > most_bytes:
        return [], False
    problems = []
    for one in scales:
        values = folder.tensor(one.name).float()
        num_unfit = int(values.numel() - torch.isfinite(values).sum())
        if num_unfit:
            problems.append(
                f"{one.file.name}: tensor {one.name!r} holds {num_unfit} scales that are infinite "
                "or not a number; fetch the file again"
            )
    return problems, True
