"""Options that several commands share, and groups of options.

A group of options is a dataclass whose fields are options. A command under `with_option_groups`
takes the whole group as a single parameter; the command line has each option of the group.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

StateDir = Annotated[
    Path | None,
    typer.Option(
        envvar="ARRIERO_STATE",
        help="Folder of the state file of `up`; by default ~/.local/state/arriero.",
        show_default=False,
    ),
]


def with_option_groups(command: Callable[..., None]) -> Callable[..., None]:
    """A command whose parameters may be groups of options, as a command that typer can read.

    The options of a group take the place of the group's parameter, in the order of the fields.
    """
    hints = get_type_hints(command, include_extras=True)
    groups = {name: kind for name, kind in hints.items() if is_dataclass(kind)}
    signature = inspect.signature(command)

    @functools.wraps(command)
    def run(**values: Any) -> None:  # noqa: ANN401
        for name, kind in groups.items():
            values[name] = kind(**{field.name: values.pop(field.name) for field in fields(kind)})
        command(**values)

    parameters = [
        option
        for name, parameter in signature.parameters.items()
        for option in (
            _options(groups[name])
            if name in groups
            else [parameter.replace(annotation=hints[name], kind=parameter.KEYWORD_ONLY)]
        )
    ]
    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return run


def set_options(*groups: DataclassInstance) -> dict[str, Any]:
    """The options of these groups that the command line gives, by name."""
    return {
        name: value
        for group in groups
        for name, value in asdict(group).items()
        if value is not None
    }


def _options(group: type) -> Iterator[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    for field in fields(group):
        yield inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=field.default,
            annotation=hints[field.name],
        )
