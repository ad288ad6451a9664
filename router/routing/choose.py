"""The group for a request, and the room in the groups: pure functions over a snapshot.

Knows loads and prefix lengths; knows nothing of links or time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from arriero.router.backend import GroupView

_FULL = 0.9
"""Used share of the KV pool from which a group with waiting requests has no room for more."""
DECODE_WEIGHT = 0.125
"""Delay of a first token by a token that the group must still decode, in prefill tokens: most are
decoded later, and several sequences in one step."""
LOAD_WEIGHT = 0.05
"""Delay by a prompt token that is loaded from host memory or disk, in prefill tokens."""
NEAR_PULL_WEIGHT, FAR_PULL_WEIGHT = 0.1, 0.3
"""Delay by a prompt token copied from another group, same node or other node, in prefill tokens."""

ADAPTER_WORK = 256.0
"""Delay by an adapter that is not on the device of the group, in prefill tokens."""

LEAVE_WEIGHT = 1.0
"""Work of a session that leaves its group, by prompt token: its next requests find their blocks in
the group that they left, or have them computed once more."""


def order(groups: Iterable[GroupView], *, num_prompt: int, num_tokens: int) -> list[GroupView]:
    """Groups that can hold the request, soonest first token first; groups that hold requests last.

    Ties go to the group with the fewest sequences, then to the smallest id, so that every gateway
    makes the same choice.

    Args:
        groups: candidates of one model, with their `reach` of this prompt.
        num_prompt: tokens of the prompt.
        num_tokens: tokens that the context must hold: the prompt and at least one more.
    """
    able = [group for group in groups if group.card.max_model_len >= num_tokens]
    return sorted(
        able,
        key=lambda group: (
            group.stats.holding,
            first_token_work(group, num_prompt) + leaving_work(able, group, num_prompt),
            group.load.num_waiting + group.load.num_running,
            group.group_id,
        ),
    )


def first_token_work(group: GroupView, num_prompt: int) -> float:
    """Work of a group before a prompt's first token, in prefill tokens.

    The sum of: earlier prompts, the uncached part of the prompt, blocks loaded from lower tiers or
    copied from a peer, decodes, and an adapter that is not on the device. Assumes that all groups
    of a model are equally fast.
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
        + (0.0 if group.adapter_in_slot else ADAPTER_WORK)
    )


def leaving_work(able: Sequence[GroupView], group: GroupView, num_prompt: int) -> float:
    """Work for later requests of a session if a group other than its own takes this request."""
    has_home = any(other.home for other in able)
    return LEAVE_WEIGHT * num_prompt if has_home and not group.home else 0.0


def room(groups: Iterable[GroupView], *, num_gateways: int) -> int:
    """Sequences that each of `num_gateways` gateways may have in these groups at once.

    Further requests wait in the gateway, whose queue is fair between tenants; a group serves in
    order of arrival. Each group gets an eighth more sequences than slots, so that the group never
    waits for the gateway. A group whose KV pool is full runs fewer sequences than it has slots.
    """
    total = 0
    for group in groups:
        load, most = group.load, group.card.max_sequences
        stats = group.stats
        if load.num_waiting and stats.blocks_used >= _FULL * stats.blocks_total > 0:
            most = min(most, max(1, load.num_running))
        total += most + max(1, most // 8)
    return -(-total // num_gateways)
