"""Which group a request goes to: a pure function over a snapshot."""

from __future__ import annotations

from collections.abc import Iterable

from arriero.router.backend import GroupView


def order(groups: Iterable[GroupView], *, num_tokens: int) -> list[GroupView]:
    """Groups that can hold the request, the best first.

    The best has the fewest outstanding tokens; ties go to the fewest sequences, then to the
    smallest id, so that the choice is the same wherever it is made.

    Args:
        groups: candidates, all of one model.
        num_tokens: what the sequence must have room for: the prompt and at least one more.
    """
    able = [group for group in groups if group.card.max_model_len >= num_tokens]
    return sorted(
        able,
        key=lambda group: (
            group.load.outstanding_tokens,
            group.load.num_waiting + group.load.num_running,
            group.group_id,
        ),
    )
