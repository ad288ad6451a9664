"""YAML text as plain data, with the line of each field.

Knows YAML; knows nothing of the fields of a spec.
"""

from __future__ import annotations

from typing import Any

import yaml

from arriero.shards.errors import SpecError

MOST_VALUES = 100_000
"""Largest number of values of a text, aliases counted as often as the text repeats them."""
Lines = dict[tuple[int | str, ...], int]
"""Line number of each field, by path."""


def parse(text: str, source: str) -> tuple[dict[str, Any], Lines]:
    """The mapping in a YAML text, and the line of each field.

    Args:
        text: the YAML text.
        source: name of the text for errors, such as the path of the file.

    Raises:
        SpecError: the text is not YAML or no mapping, an alias contains itself, or aliases repeat
            the values too often.
    """
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        lines: Lines = {}
        _note_lines(root, (), lines, [], source)
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise SpecError(f"{source}: not YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise SpecError(
            f"{source}: values are nested too deeply; a spec has at most ten levels"
        ) from None
    if not isinstance(data, dict):
        raise SpecError(f"{source}: a spec is a mapping with `models:`, not {type(data).__name__}")
    return data, lines


def _note_lines(
    node: yaml.Node | None,
    path: tuple[int | str, ...],
    lines: Lines,
    parents: list[yaml.Node],
    source: str,
) -> None:
    """Record the line of each field below a node of the text.

    Raises:
        SpecError: an alias contains itself, or there are too many values.
    """
    if any(node is parent for parent in parents):
        field = ".".join(map(str, path))
        raise SpecError(
            f"{source}:{lines.get(path, 1)}: `{field}` is an alias of a value that contains the"
            " alias; write the value out"
        )
    children: list[tuple[int | str, yaml.Node, int]] = []
    if isinstance(node, yaml.MappingNode):
        children = [(key.value, value, key.start_mark.line) for key, value in node.value]
    elif isinstance(node, yaml.SequenceNode):
        children = [(index, value, value.start_mark.line) for index, value in enumerate(node.value)]
    if node is None or not children:
        return
    parents.append(node)
    for name, value, line in children:
        lines[(*path, name)] = line + 1
        if len(lines) > MOST_VALUES:
            raise SpecError(
                f"{source}: aliases repeat values to more than {MOST_VALUES}; write fewer aliases"
            )
        _note_lines(value, (*path, name), lines, parents, source)
    parents.pop()
