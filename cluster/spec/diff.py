"""The differences between two specs, and the command that applies each difference.

`arriero reload` applies a difference at once; `arriero rollout` replaces gateways or groups one
after another, and starts and ends models; the rest needs `arriero down` and `arriero up`. Knows
specs; knows nothing of the processes that apply a difference.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from typing import Any, Literal

from arriero.cluster.spec.deployment import DeploymentSpec, RaySpec
from arriero.cluster.spec.live_settings import LiveSettings
from arriero.cluster.spec.model import COUNTS
from arriero.router.tenants.tenant import QueueLimits
from arriero.shards.errors import SpecError

Command = Literal["reload", "rollout", "up"]

LIVE = (
    "log_level",
    "log_format",
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
_WHOLE = ("tenants", "autoscale", "tls", "http", "request_log", "queue", "kv_events", "batches")
"""Sections that are compared as a whole."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FieldChange:
    """A field with different values in two specs.

    Attributes:
        field: name of the field, such as `gateway.queue` or `models[demo].mesh.tp`.
        applied_by: command that applies the difference.
        before, after: both values, for people; a whole model is "none" where the spec lacks it.
    """

    field: str
    applied_by: Command
    before: Any = dataclass_field(default=None, compare=False)
    after: Any = dataclass_field(default=None, compare=False)

    @property
    def words(self) -> str:
        """The field with both values."""
        return f"{self.field}: {_words(self.before)} -> {_words(self.after)}"


def diff(old: DeploymentSpec, new: DeploymentSpec) -> list[FieldChange]:
    """The fields that differ between two specs."""
    changes = []
    before, after = (spec.model_dump(mode="json", exclude={"models"}) for spec in (old, new))
    for field in _differ(before, after, ""):
        if field.startswith("ray.") and _at(after, field) == _at(_DEFAULTS, field):
            continue  # perhaps a flag of `up`, which stands in no file
        applied_by: Command = "rollout"
        if _within(field, LIVE):
            applied_by = "reload"
        elif _within(field, FIXED):
            applied_by = "up"
        changes.append(_change(field, applied_by, before, after, field))
    models = [{model.name: model.model_dump(mode="json") for model in s.models} for s in (old, new)]
    for name in {**models[0], **models[1]}:
        if name not in models[0] or name not in models[1]:
            old_path, new_path = (model.get(name, {}).get("path", "none") for model in models)
            changes.append(
                FieldChange(
                    field=f"models[{name}]", applied_by="rollout", before=old_path, after=new_path
                )
            )
            continue
        for field in _differ(models[0][name], models[1][name], ""):
            applied_by = "reload" if _within(field, COUNTS) else "rollout"
            full_name = f"models[{name}].{field}"
            changes.append(_change(full_name, applied_by, models[0][name], models[1][name], field))
    return changes


def refuse(changes: Iterable[FieldChange], command: Command) -> None:
    """Raise unless `command` can apply all changes.

    Raises:
        SpecError: names the fields, and the command that can change the fields.
    """
    if command == "reload":
        rolled = [change.field for change in changes if change.applied_by == "rollout"]
        if rolled:
            raise SpecError(
                f"`{'`, `'.join(rolled)}` cannot be changed while everything runs;"
                " `arriero rollout SPEC` replaces what must be, one after the other"
            )
    fixed = [change.field for change in changes if change.applied_by == "up"]
    if fixed:
        raise SpecError(
            f"`{'`, `'.join(fixed)}` cannot be changed in a deployment that is up;"
            " `arriero down`, then `arriero up SPEC`"
        )


def live_settings(spec: DeploymentSpec, version: int) -> LiveSettings:
    """The settings of a spec that gateways and leaders accept while running."""
    return LiveSettings(
        version=version,
        log_level=spec.log_level,
        log_format=spec.log_format,
        tenants=spec.gateway.shares(),
        queue=QueueLimits(**dict(spec.gateway.queue)),
        lost_s=spec.gateway.lost_s,
        wake_s=spec.wake_s,
        models=tuple(model.name for model in spec.models),
        health=spec.health.limits(),
        canary_s=spec.health.canary_s,
    )


def _differ(old: Mapping[str, Any], new: Mapping[str, Any], at: str) -> list[str]:
    """Names of the fields that differ; goes down where both specs have the section."""
    names = []
    for name in {**old, **new}:
        a, b = old.get(name), new.get(name)
        if a == b:
            continue
        where = f"{at}.{name}" if at else name
        if isinstance(a, dict) and isinstance(b, dict) and name not in _WHOLE:
            names += _differ(a, b, where)
        else:
            names.append(where)
    return names


def _change(
    name: str, applied_by: Command, old: Mapping[str, Any], new: Mapping[str, Any], path: str
) -> FieldChange:
    """The change of the field at a path below two sections."""
    values = []
    for data in (old, new):
        value: Any = data
        for step in path.split("."):
            value = value.get(step) if isinstance(value, Mapping) else None
        values.append(value)
    return FieldChange(field=name, applied_by=applied_by, before=values[0], after=values[1])


def _words(value: Any) -> str:  # noqa: ANN401
    """A value as in a spec, on one line."""
    return value if isinstance(value, str) else json.dumps(value)


def _at(data: Mapping[str, Any], field: str) -> Any:  # noqa: ANN401
    section, _, name = field.partition(".")
    return data[section][name]


def _within(field: str, sections: Iterable[str]) -> bool:
    return any(field == section or field.startswith(f"{section}.") for section in sections)
