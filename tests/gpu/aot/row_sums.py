"""The order in which a compiled kernel sums the columns of a row, from Triton's GPU dialect.

A row is summed within a thread, then over lanes, then over warps; the layout says which columns lie
where. Two kernels give a row the same bits only if these orders are equal. Knows layouts; knows
nothing of kernels.
"""

from __future__ import annotations

import re

_SUM = re.compile(
    r'"tt\.reduce"\([^)]*\) <\{axis = 1 : i32\}> \(\{(?P<body>.*?)\}\) : '
    r"\(tensor<\d+x(?P<columns>\d+)xf32, #(?P<layout>\w+)>\)",
    re.DOTALL,
)
_LAYOUT = re.compile(r"^#(?P<name>\w+) = #ttg\.(?P<kind>\w+)<\{(?P<fields>.*)\}>", re.MULTILINE)
_BASES = re.compile(r"(register|lane|warp) = (\[\[.*?\]\]|\[\])")
_LIST = re.compile(r"(\w+) = \[([\d, ]*)\]")


def row_sums(ttgir: str) -> list[str]:
    """The orders of a kernel's sums over rows of float32 matrices, each once, in text form."""
    layouts = {match["name"]: (match["kind"], match["fields"]) for match in _LAYOUT.finditer(ttgir)}
    orders = set()
    for match in _SUM.finditer(ttgir):
        if "arith.addf" in match["body"]:
            kind, fields = layouts[match["layout"]]
            orders.add(f"{match['columns']} columns: {_order(kind, fields)}")
    return sorted(orders)


def _order(kind: str, fields: str) -> str:
    """The columns' places of a layout; the rows' places do not matter."""
    if kind == "linear":
        steps = {}
        for place, bases in _BASES.findall(fields):
            columns = [int(column) for _, column in re.findall(r"\[(\d+), (\d+)\]", bases)]
            steps[place] = [column for column in columns if column]
        return ", ".join(f"{place} {columns}" for place, columns in steps.items())
    sizes = {name: values.split(", ")[1:] for name, values in _LIST.findall(fields)}
    version = re.search(r"versionMajor = (\d+)", fields)
    sizes.pop("order", None)
    return f"{kind} {version[1] if version else ''} {sizes}"
