"""The groups that serve an adapter: pure functions over views of groups."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from arriero.router.backend import GroupView
from arriero.router.text.model_card import ModelCard


def with_adapter(groups: Iterable[GroupView], name: str) -> list[GroupView]:
    """The groups with an adapter of this name; of several contents, those with the newest."""
    served = [
        (adapter, replace(view, adapter=adapter))
        for view in groups
        for adapter in view.card.adapters
        if adapter.name == name
    ]
    if not served:
        return []
    newest, _ = max(
        served, key=lambda pair: (pair[0].version, pair[1].card.created, pair[1].group_id)
    )
    return [view for adapter, view in served if adapter.digest == newest.digest]


def serves(card: ModelCard, digest: str) -> bool:
    """Whether a group serves the adapter of a digest; true of "", the base model."""
    return not digest or any(adapter.digest == digest for adapter in card.adapters)
