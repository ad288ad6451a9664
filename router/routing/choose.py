"""Which group a request goes to, and whether there is room: pure functions over a snapshot."""

from __future__ import annotations

from collections.abc import Iterable

from arriero.router.backend import GroupView

_FULL = 0.9
"""A group that has requests waiting and so much of its KV pool in use has no room for more."""


DECODE_WEIGHT = 0.125
"""A token that a group has still to decode delays a first token by so many prefill tokens: most of
it is decoded later, and several sequences in one step."""
LOAD_WEIGHT = 0.05
"""Likewise of a prompt token that comes up from host memory or disk."""
NEAR_PULL_WEIGHT, FAR_PULL_WEIGHT = 0.1, 0.3
"""Likewise of one that is copied from another group's memory, on the same node or elsewhere."""


def order(groups: Iterable[GroupView], *, num_prompt: int, num_tokens: int) -> list[GroupView]:
    """Groups that can hold the request, the one whose first token is due soonest first.

    Ties go to the fewest sequences, then to the smallest id, so that the choice is the same
    wherever it is made.

    Args:
        groups: candidates, all of one model; their `reach` is of this prompt.
        num_prompt: tokens of the prompt.
        num_tokens: what the sequence must have room for: the prompt and at least one more.
    """
    able = [group for group in groups if group.card.max_model_len >= num_tokens]
    return sorted(
        able,
        key=lambda group: (
            first_token_work(group, num_prompt),
            group.load.num_waiting + group.load.num_running,
            group.group_id,
        ),
    )


def first_token_work(group: GroupView, num_prompt: int) -> float:
    """What a group does before a prompt's first token, in prefill tokens.

    The prompts before it, what is missing of its own, what comes up from lower tiers or over from
    a peer, and the decodes beside. Groups of a model are taken to be equally fast.
    """
    load, reach = group.load, group.reach
    pulled = max(0, group.peer_reach - reach.total)
    pull_weight = NEAR_PULL_WEIGHT if group.peer_near else FAR_PULL_WEIGHT
    decode = load.outstanding_tokens - load.prefill_tokens
    return (
        load.prefill_tokens
        + (num_prompt - reach.total - pulled)
        + LOAD_WEIGHT * (reach.total - reach.near)
        + pull_weight * pulled
        + DECODE_WEIGHT * decode
    )


def room(groups: Iterable[GroupView], *, num_gateways: int) -> int:
    """Sequences that one of `num_gateways` gateways may have in these groups at once.

    What is beyond it waits in the gateway, where turns are fair between tenants; the group itself
    serves by arrival. It is given a few sequences more than it can run, so that it never waits for
    the gateway. A group whose KV pool is full runs fewer than it has slots for.
    """
    total = 0
    for group in groups:
        load, most = group.load, group.card.max_sequences
        blocks = group.stats.get("blocks_total", 0)
        if load.num_waiting and group.stats.get("blocks_used", 0) >= _FULL * blocks > 0:
            most = min(most, max(1, load.num_running))
        total += most + max(1, most // 8)
    return -(-total // num_gateways)
