"""Which models can draft for a target. Needs no torch, so that planners and `up` check it fast.

Knows sizes of models; knows nothing of folders and of steps.
"""

from __future__ import annotations

from arriero.shards.errors import CheckpointError, SpecError
from arriero.shards.families.registry import family_of
from arriero.shards.layout.parts import AnyModel


def check_draft_model(model: AnyModel, target: AnyModel, source: str) -> None:
    """Check that a model can draft for a target.

    Args:
        model: the smaller model.
        target: the model for which the smaller model drafts.
        source: folder of the smaller model, for errors.

    Raises:
        CheckpointError: the vocabularies differ; both sizes are named.
        SpecError: the model has experts.
    """
    if model.vocab_size != target.vocab_size:
        raise CheckpointError(
            f"{source}: `vocab_size`={model.vocab_size} of the draft model, but the target has "
            f"{target.vocab_size}; a draft model needs the target's tokens"
        )
    if family_of(model).experts(model) is not None:
        raise SpecError(f"{source}: a draft model with experts is not supported; use a dense model")
