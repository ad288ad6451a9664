"""Every error that arriero raises on purpose.

    ArrieroError
    ├── InvalidRequest      the caller's request breaks a limit: field, value, limit, remedy
    │   └── ContextTooLong      prompt and output exceed the model's context
    ├── NotFound            no such model, group or request
    ├── Unauthenticated     no API key, or one that is not known
    ├── PermissionDenied    the key's tenant may not do this
    ├── Overloaded          a bounded queue is full; `retry_after_s` says when to try again
    ├── Unavailable         no group can serve now (starting, draining, failed)
    ├── CheckpointError     a file of weights is not what its config says: file, tensor, shapes
    ├── SpecError           a deployment spec or a plan that cannot be: field, value, remedy
    ├── WireError           a message or a stored value is not of its type: the field
    └── GroupFailed         a slice or its leader is lost: the first cause
        └── CollectiveFailed    a wait for another rank broke off or took too long

A message gives the field, the limit, the value and the remedy, in words for the one concerned.
"""

from __future__ import annotations


class ArrieroError(Exception):
    """Base of all of them; its text may be shown to a client."""


class InvalidRequest(ArrieroError):
    """A request that breaks a limit.

    Attributes:
        field: the culprit.
        code: the kind of fault in one word, for programs; the words are the OpenAI API's.
    """

    def __init__(self, field: str, message: str, code: str = "invalid_value") -> None:
        super().__init__(message)
        self.field = field
        self.code = code


class ContextTooLong(InvalidRequest):
    """Prompt and output together exceed the model's context: clients shorten, and ask again."""

    CODE = "context_length_exceeded"

    def __init__(self, field: str, message: str) -> None:
        super().__init__(field, message, self.CODE)


class NotFound(ArrieroError):
    """No such model, group or request.

    Attributes:
        field: the field that names it.
        code: the kind of fault, for programs.
    """

    def __init__(
        self, message: str, *, field: str = "model", code: str = "model_not_found"
    ) -> None:
        super().__init__(message)
        self.field = field
        self.code = code


class Unauthenticated(ArrieroError):
    """The caller gave no API key, or one that is not known."""


class PermissionDenied(ArrieroError):
    """The caller is known and may not do this."""


class Overloaded(ArrieroError):
    """A bounded queue is full, or a tenant has used up what it may take."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Unavailable(ArrieroError):
    """No group can serve this now."""


class CheckpointError(ArrieroError):
    """A file of weights is not what its config says."""


class SpecError(ArrieroError):
    """A deployment spec, a mesh or a plan that cannot be."""


class WireError(ArrieroError):
    """A message, or a stored value, is not of the type that its reader expects."""


class GroupFailed(ArrieroError):
    """A slice or its leader is lost; the text is the first cause."""


class CollectiveFailed(GroupFailed):
    """A wait for another rank broke off or took too long: mostly that rank's fault."""

    def __init__(self, message: str, collective: str, step: int) -> None:
        super().__init__(message)
        self.collective = collective
        self.step = step
