"""What differs between two specs, and what it takes to apply that.

Each difference between two specs has one of three prices: it is applied at once by `arriero
reload`; it is applied by `arriero rollout`, which replaces gateways or groups one after the other;
or it takes `arriero down` and `up`. Knows specs; knows nothing of who applies what.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from arriero.cluster.spec.deployment import DeploymentSpec, RaySpec
from arriero.cluster.spec.live_settings import LiveSettings
from arriero.cluster.spec.model import COUNTS
from arriero.router.tenants.tenant import QueueLimits
from arriero.shards.errors import SpecError

Price = Literal["reload", "rollout", "up"]

LIVE = (
    "log_level",
    "gateway.tenants",
    "gateway.queue",
    "gateway.lost_s",
    "health.silence_s",
    "health.hang_s",
    "health.step_s",
    "health.canary_s",
)
FIXED = ("ray", "admin", "link_tls")
_DEFAULTS = {"ray": RaySpec().model_dump(mode="json")}
_WHOLE = ("tenants", "autoscale", "tls", "http", "request_log", "queue")
"""Sections whose difference is told as one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FieldChange:
    """A field that differs.

    Attributes:
        field: its name, such as `gateway.queue` or `models[demo].mesh.tp`.
        price: what it takes to apply it.
    """

    field: str
    applied_by: Price


def diff(old: DeploymentSpec, new: DeploymentSpec) -> list[FieldChange]:
    """What differs between two specs, and what each difference takes."""
    found = []
    before, after = (one.model_dump(mode="json", exclude={"models"}) for one in (old, new))
    for field in _differ(before, after, ""):
        if field.startswith("ray.") and _at(after, field) == _at(_DEFAULTS, field):
            continue  # it may have been a flag of `up`, which no file holds
        applied_by: Price = "rollout"
        if _within(field, LIVE):
            applied_by = "reload"
        elif _within(field, FIXED):
            applied_by = "up"
        found.append(FieldChange(field=field, applied_by=applied_by))
    models = [{model.name: model.model_dump(mode="json") for model in s.models} for s in (old, new)]
    for name in {**models[0], **models[1]}:
        if name not in models[0] or name not in models[1]:
            found.append(FieldChange(field=f"models[{name}]", applied_by="up"))
            continue
        for field in _differ(models[0][name], models[1][name], ""):
            applied_by = "reload" if _within(field, COUNTS) else "rollout"
            found.append(FieldChange(field=f"models[{name}].{field}", applied_by=applied_by))
    return found


def refuse(found: Iterable[FieldChange], most: Price) -> None:
    """Raise unless each change costs no more than `most`.

    Raises:
        SpecError: names the fields, and the commands that change them.
    """
    if most == "reload":
        dear = [one.field for one in found if one.applied_by == "rollout"]
        if dear:
            raise SpecError(
                f"`{'`, `'.join(dear)}` cannot be changed while everything runs;"
                " `arriero rollout SPEC` replaces what must be, one after the other"
            )
    fixed = [one.field for one in found if one.applied_by == "up"]
    if fixed:
        raise SpecError(
            f"`{'`, `'.join(fixed)}` cannot be changed in a deployment that is up;"
            " `arriero down`, then `arriero up SPEC`"
        )


def live_settings(spec: DeploymentSpec, version: int) -> LiveSettings:
    """What of a spec gateways and leaders take while they run."""
    return LiveSettings(
        version=version,
        log_level=spec.log_level,
        tenants=spec.gateway.shares(),
        queue=QueueLimits(**dict(spec.gateway.queue)),
        lost_s=spec.gateway.lost_s,
        wake_s=spec.wake_s,
        health=spec.health.limits(),
        canary_s=spec.health.canary_s,
    )


def _differ(old: Mapping[str, Any], new: Mapping[str, Any], at: str) -> list[str]:
    """Names of the fields that differ, as deep as both have sections."""
    found = []
    for name in {**old, **new}:
        a, b = old.get(name), new.get(name)
        if a == b:
            continue
        where = f"{at}.{name}" if at else name
        if isinstance(a, dict) and isinstance(b, dict) and name not in _WHOLE:
            found += _differ(a, b, where)
        else:
            found.append(where)
    return found


def _at(data: Mapping[str, Any], field: str) -> Any:  # noqa: ANN401
    section, _, name = field.partition(".")
    return data[section][name]


def _within(field: str, sections: Iterable[str]) -> bool:
    return any(field == one or field.startswith(f"{one}.") for one in sections)
