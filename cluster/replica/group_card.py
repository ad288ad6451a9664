"""The description of a group for gateways, from checkpoint, settings and limits of the engine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from arriero.cluster.replica.group_settings import GroupSettings
from arriero.cluster.replica.registration import Registration
from arriero.shards.config.group import GroupConfig

if TYPE_CHECKING:
    from arriero.router.text.model_card import ModelCard
    from arriero.shards.engine.types import EngineConfig
    from arriero.shards.layout.parts import AnyModel


def group_card(
    folder: Path,
    *,
    settings: GroupSettings,
    registration: Registration,
    config: GroupConfig,
    model: AnyModel,
    limits: EngineConfig,
    digest: str,
) -> ModelCard:
    """The card of a group.

    Args:
        folder: checkpoint folder, for tokenizer and chat template.
        settings: of the group.
        registration: id and epoch of the group.
        config: resolved config of the group.
        model: config of the model.
        limits: of the engine.
        digest: of the weights.
    """
    from arriero.router.text.model_card import ModelCard, ServedAdapter
    from arriero.shards.families.registry import family_of
    from arriero.shards.kv.blocks import model_root
    from arriero.shards.kv.host_id import host_name

    vision = family_of(model).vision(model)
    return ModelCard.from_folder(
        folder,
        model=settings.model,
        group=registration.group_id,
        layout=settings.layout,
        digest=digest,
        max_model_len=limits.max_model_len,
        vocab_size=limits.vocab_size,
        bos_token_id=model.bos_token_id,
        eos_token_ids=limits.eos_token_ids,
        max_sequences=limits.max_sequences,
        numerics=settings.numerics,
        epoch=registration.epoch,
        cache_root=model_root(limits.cache_salt) if limits.prefix_cache else b"",
        block_size=limits.block_size,
        memory=host_name() if config.tiers.host_bytes else "",
        guard=settings.guard,
        image_tile=0 if vision is None else vision.image_size,
        image_features=0 if vision is None else vision.features_per_tile,
        adapters=tuple(
            ServedAdapter(name=file.name, digest=adapter)
            for file, adapter in zip(config.adapters, limits.adapters, strict=True)
        ),
    )
