"""Checks of a quantized folder beyond the headers: group indices, stated shapes, stacked matrices.

Reads the small tensors of a form (group indices, stated shapes) and no weights. Verification and
loading share these checks. Knows forms; knows nothing of slices.
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
_SCALES = ("weight_scale", "weight_scale_2", "input_scale", ".scales")


def form_problems(folder: TensorFolder, model: AnyModel, scheme: QuantScheme) -> list[str]:
    """All defects that prevent loading of quantized matrices; the headers are checked before."""
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
        module_problems, orders[module.name] = _module_problems(folder, module, scheme)
        problems += module_problems
        sorts = orders[module.name] is not None
        if module.kind == "head" and (sorts or scheme.rounds_inputs):
            problems.append(
                f"{module.name}: a quantized head with rounded or sorted inputs is not supported; "
                "leave the head out when you quantize"
            )
    for stack in stacks.values():
        problems += _stack_problems(stack, scheme, orders)
    return problems


def _module_problems(
    folder: TensorFolder, module: Module, scheme: QuantScheme
) -> tuple[list[str], Tensor | None]:
    """Problems of a matrix, and the group of each column if columns are sorted."""
    name, problems = module.name, []
    rows, columns = module.shape
    if scheme.method == "pack-quantized":
        stated = folder.tensor(f"{name}.weight_shape").tolist()
        if stated != [rows, columns]:
            problems.append(
                f"tensor {name + '.weight_shape'!r} says {stated}, but {[rows, columns]} is "
                "stored; fetch the checkpoint again"
            )
    if scheme.kind != "int4":
        return problems, None
    group = scheme.group_size or columns
    if group % 2 and group < columns:
        problems.append(
            f"{name}: group size {group} is odd, which is not supported; quantize with an even one"
        )
    index = f"{name}.{'g_idx' if scheme.method == 'gptq' else 'weight_g_idx'}"
    if scheme.method == "awq" or index not in folder.stored:
        return problems, None
    if scheme.method == "pack-quantized" and not scheme.act_order:
        return problems, None
    group_of_I = folder.tensor(index).long()
    if in_order(group_of_I, group):
        return problems, None
    problem = index_problem(index, group_of_I, columns // group)
    if problem is None and module.expert is not None:
        most = int(torch.bincount(group_of_I).max())
        if most > group:
            problem = (
                f"tensor {index!r} gives a group {most} columns, but the group "
                f"size is {group}; quantize again without act-order"
            )
    return [*problems, *([] if problem is None else [problem])], group_of_I


def _stack_problems(
    stack: list[Module], scheme: QuantScheme, orders: dict[str, Tensor | None]
) -> list[str]:
    """Problems of stacked matrices, which must have equal forms and equal input orders."""
    names = " and ".join(module.name for module in stack)
    covered = {scheme.covers(module.name, module.kind) for module in stack}
    if len(covered) > 1:
        return [
            f"{names} are stacked to one matrix, but only some are quantized; quantize all of them "
            "or none"
        ]
    stack_orders = [orders.get(module.name) for module in stack]
    first = stack_orders[0]
    same = all(
        (order is None) == (first is None)
        and (order is None or first is None or torch.equal(order, first))
        for order in stack_orders
    )
    if same:
        return []
    return [
        f"{names} are stacked to one matrix, but sort or round inputs differently; quantize again "
        "without act-order"
    ]


def in_order(group_of_I: Tensor, group_size: int) -> bool:
    """Whether an index only describes consecutive columns (or nothing: all -1)."""
    ordered = torch.arange(len(group_of_I)) // group_size
    return torch.equal(group_of_I.long(), ordered) or bool((group_of_I == -1).all())


def index_problem(name: str, group_of_I: Tensor, num_groups: int) -> str | None:
    """Problem of a group index; None for a valid index."""
    if int(group_of_I.min()) < 0 or int(group_of_I.max()) >= num_groups:
        return f"tensor {name!r} names groups beyond its scales; fetch the checkpoint again"
    return None


def non_finite_scales(folder: TensorFolder, max_bytes: int) -> tuple[list[str], bool]:
    """Find scales that are infinite or not a number; loading refuses such scales.

    Args:
        folder: folder of any form.
        max_bytes: read nothing if the scales have more bytes.

    Returns:
        One sentence for each bad tensor; whether the scales were read.
    """
    scales = [tensor for tensor in folder.stored.values() if tensor.name.endswith(_SCALES)]
    if sum(tensor.nbytes for tensor in scales) > max_bytes:
        return [], False
    problems = []
    for tensor in scales:
        values = folder.copy(tensor.name).float()
        num_bad = int(values.numel() - torch.isfinite(values).sum())
        if num_bad:
            problems.append(
                f"{tensor.file.name}: tensor {tensor.name!r} holds {num_bad} scales that are "
                "infinite or not a number; fetch the file again"
            )
    return problems, True
