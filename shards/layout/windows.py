"""The attention window of a dense model: of its training, and of a group's settings.

Knows the numbers of model and group; knows nothing of caches and kernels.
"""

from __future__ import annotations

from arriero.kernels.attention_mask import FULL_ATTENTION, AttentionMaskSpec
from arriero.shards.config.group import GroupConfig
from arriero.shards.errors import SpecError
from arriero.shards.model_config.dense import ModelConfig


def window_mask(model: ModelConfig, config: GroupConfig) -> AttentionMaskSpec:
    """Attention mask of all layers: full attention, or the window of the config.

    Raises:
        SpecError: the window is out of range; or the window would change the answers without
            `changes_answers`; or the model was trained with a window and the config has none.
    """
    window, sinks = config.sliding_window, config.attention_sinks
    trained, limit = model.sliding_window, model.max_position_embeddings
    if window is None:
        if sinks:
            raise SpecError(
                f"`attention_sinks`={sinks} needs `sliding_window`; without a window all tokens "
                "are kept; leave the sinks out"
            )
        if trained is not None:
            raise SpecError(
                f"`sliding_window` is not set, and the model's config.json says {trained}: every "
                f"layer was trained with that window; set `sliding_window` to {trained}"
            )
        return FULL_ATTENTION
    if not 1 <= window <= limit:
        raise SpecError(
            f"`sliding_window`={window} must be 1 to {limit}, the model's position limit"
        )
    if not 0 <= sinks <= limit:
        raise SpecError(
            f"`attention_sinks`={sinks} must be 0 to {limit}, the model's position limit"
        )
    if (window, sinks) != (trained, 0) and not config.changes_answers:
        was = "full attention" if trained is None else f"a window of {trained} and no sinks"
        raise SpecError(
            f"`sliding_window`={window} with `attention_sinks`={sinks} changes this model's "
            f"answers: it was trained with {was}, and tokens outside the window are forgotten; "
            "set `changes_answers` to true if that is meant, or leave the window out"
        )
    return AttentionMaskSpec(window=window, sinks=sinks)
