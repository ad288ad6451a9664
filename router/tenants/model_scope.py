"""The models that the caller of the current task may use.

Set wherever a caller is identified (`AdmissionController.tenant`), read wherever a model is looked
up (`Inference`), so that every protocol has the same limits. Knows names of models; knows nothing
of keys and calls.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from contextvars import ContextVar

from arriero.shards.errors import InvalidRequest, NotFound

_scope: ContextVar[frozenset[str] | None] = ContextVar("model_scope", default=None)


def enter(models: Collection[str]) -> None:
    """Limit the current task, and the tasks that it starts, to `models`; empty for no limit."""
    _scope.set(frozenset(models) or None)


def models() -> tuple[str, ...]:
    """The models that the caller may use, sorted; empty for no limit."""
    return tuple(sorted(_scope.get() or ()))


def allows(model: str) -> bool:
    """Whether the caller may use a model."""
    scope = _scope.get()
    return scope is None or model in scope


def resolve(model: str, served: Iterable[str]) -> str:
    """The id of the model that a request names.

    A model outside the scope does not exist for its caller, so the error is that of an unknown
    model, and lists the caller's own models.

    Args:
        model: id of the request; "" for the caller's only model.
        served: ids of all models.

    Returns:
        The id; "" when the request names none and there is not exactly one.

    Raises:
        NotFound: the caller may not use the model.
        InvalidRequest: `model` is "" and the caller may use several models.
    """
    visible = sorted(filter(allows, served))
    if not model and len(visible) == 1:
        return visible[0]
    if _scope.get() is None:
        return model
    if not model and visible:
        raise InvalidRequest(
            "model", f"`model` is empty; set it to one of: {', '.join(visible)[:500]}"
        )
    if not allows(model):
        raise NotFound(
            f"`model`={model[:128]!r} is not served; available models: "
            f"{', '.join(visible)[:500] or 'none yet'}"
        )
    return model
