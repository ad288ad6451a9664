"""The model families that arriero serves: a line for each.

Families are named by their modules and loaded at the first question. A family's record uses layout
and checkpoint formats, which themselves ask for families: with names instead of imports, the
records may stand above both and the registry below. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

from arriero.shards.errors import CheckpointError
from arriero.shards.families.family import ModelFamily

if TYPE_CHECKING:
    from arriero.shards.layout.parts import AnyModel

FAMILIES = (
    "arriero.shards.models.llama.family",
    "arriero.shards.models.llama4.family",
    "arriero.shards.models.qwen3.family",
)
"""Modules with a record `FAMILY`; the order is that of lists for users."""


@cache
def families() -> tuple[ModelFamily[Any], ...]:
    """All records."""
    return tuple(import_module(module).FAMILY for module in FAMILIES)


@cache
def _by_architecture() -> dict[str, ModelFamily[Any]]:
    return {name: family for family in families() for name in family.architectures}


def family_of(model: AnyModel) -> ModelFamily[Any]:
    """The family of a model."""
    return _by_architecture()[model.architecture]


def find_family(settings: Mapping[str, Any], source: str) -> ModelFamily[Any]:
    """The family of the object of a config.json.

    Args:
        settings: object of config.json.
        source: file name for errors.

    Raises:
        CheckpointError: no family has the architecture.
    """
    names = settings.get("architectures")
    if names is None:
        for family in families():
            if settings.get("model_type") in family.model_types:
                return family
    architecture = names[0] if isinstance(names, list) and len(names) == 1 else names
    known = _by_architecture()
    if not isinstance(architecture, str) or architecture not in known:
        raise CheckpointError(
            f"{source}: architecture {str(architecture)[:200]!r} is not supported; supported: "
            f"{', '.join(known)}"
        )
    return known[architecture]
