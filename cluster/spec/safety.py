"""The sections of `arriero.yaml` about safety: policies of tenants, and Prompt Guard.

Knows settings and their limits; knows nothing of models and gateways.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from arriero.cluster.spec.fields import Count, Name, Seconds, SpecSection
from arriero.router.guards.categories import with_names
from arriero.router.tenants.safety import (
    InputAction,
    LossAction,
    OutputAction,
    PromptGuardPolicy,
    SafetyPolicy,
)
from arriero.shards.errors import InvalidRequest


class PromptGuardSpec(SpecSection):
    """Prompt Guard 2 of the deployment; needs `arriero[guard]` on the nodes of its processes.

    Attributes:
        path: folder of the classifier, the same on every node.
        replicas: processes with the classifier, on any nodes; requests are shared among them.
        cpus: Ray's logical CPUs of a process; it computes with as many threads, at least one.
    """

    path: Path
    replicas: Count = 1
    cpus: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0

    @property
    def all_cpus(self) -> float:
        """Logical CPUs of all processes."""
        return self.replicas * self.cpus

    @property
    def threads(self) -> int:
        """Threads of a process."""
        return max(1, int(self.cpus))


class PromptGuardPolicySpec(SpecSection):
    """What Prompt Guard checks for a tenant; for the fields see `PromptGuardPolicy`."""

    input: InputAction
    threshold: Annotated[float, Field(gt=0, le=1)] = 0.5


class SafetySpec(SpecSection):
    """What guards check for a tenant; for the fields see `SafetyPolicy`.

    `categories` may be a list of codes of Meta's taxonomy, or a mapping from codes to texts.
    """

    guard: Name | None = None
    input: InputAction = "off"
    output: OutputAction = "off"
    categories: dict[str, str] = Field(default_factory=dict)
    window: Annotated[int, Field(ge=1, le=4096)] = 32
    overlap: Annotated[int, Field(ge=0, le=4096)] = 64
    prompt_guard: PromptGuardPolicySpec | None = None
    on_loss: LossAction = "closed"
    timeout_s: Seconds = 10

    @field_validator("categories", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:  # noqa: ANN401
        return dict.fromkeys(value, "") if isinstance(value, list | tuple) else value

    @field_validator("categories")
    @classmethod
    def _known(cls, value: dict[str, str]) -> dict[str, str]:
        try:
            return with_names(value)
        except InvalidRequest as error:
            raise ValueError(str(error)) from None

    @model_validator(mode="after")
    def _has_guard(self) -> SafetySpec:
        if self.guard is None and (self.input != "off" or self.output != "off"):
            raise ValueError(
                "`input` and `output` need `guard`, a guard model of the spec; name one, or set "
                "both to off"
            )
        return self

    def policy(self) -> SafetyPolicy:
        """Policy for the router."""
        injections = self.prompt_guard
        policy = None if injections is None else PromptGuardPolicy(**dict(injections))
        return SafetyPolicy(**dict(self) | {"guard": self.guard or "", "prompt_guard": policy})
