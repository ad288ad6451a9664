"""Facts about a request that the messages of its answer do not carry.

Knows admission and the limits of schemas; knows nothing of groups or protocols.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from arriero.router.text.constraints import Form
from arriero.shards.errors import InvalidRequest


@dataclass(slots=True)
class RequestNotes:
    """Notes on a request; the calls of an HTTP request with several prompts share their notes.

    Attributes:
        num_calls: calls that still wait for admission.
        accepted: set once every call is admitted and a group computes it.
        not_enforced: keywords of a JSON Schema that no mask can enforce, each with its path.
    """

    num_calls: int = 1
    accepted: asyncio.Event = field(default_factory=asyncio.Event)
    not_enforced: list[str] = field(default_factory=list)

    def admitted(self) -> None:
        """Count a call as admitted."""
        self.num_calls -= 1
        if self.num_calls <= 0:
            self.accepted.set()

    def add_form(self, form: Form | None, *, strict: bool) -> None:
        """Note the keywords of a schema that are not enforced.

        Args:
            form: of the output; None for none.
            strict: the caller wants the complete schema enforced.

        Raises:
            InvalidRequest: `strict`, and the form has such keywords.
        """
        if form is None or not form.not_enforced:
            return
        if strict:
            raise InvalidRequest(
                form.field,
                f"`{form.field}` cannot be enforced at {'; '.join(form.not_enforced)[:1000]}; "
                "leave out these keywords, or the header `x-strict-schema`",
            )
        self.not_enforced += form.not_enforced
