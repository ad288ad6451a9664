"""Work of the collectives of a step: sums over tp ranks, exchange of rows, hand-over of stages.

As `shards/collectives/mesh.py`, `shards/collectives/symmetric_sums.py` and
`shards/collectives/expert_parallel.py` do them. Knows bytes and messages; knows nothing of links
and time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

from arriero.cluster.planner.step_model.layers import RankStep
from arriero.cluster.planner.step_model.work import Work
from arriero.kernels.sizes import FLOAT
from arriero.shards.collectives.divided_sum import divides_sum
from arriero.shards.collectives.symmetric_sizes import divides_rows
from arriero.shards.families.registry import family_of

COUNT_BYTES = 4
"""Bytes of a rank's number of rows for an expert."""
_ORDERED_BYTES = 8
_WIRE_BYTES = 2
"""Bytes of a number of a row that travels to an expert: bfloat16 for bfloat16 weights."""
_BLOCK_LAUNCHES: Mapping[str, float] = {
    "_permute": 2,
    "aten::_to_copy": 2,
    "aten::index_select": 5,
    "aten::sub": 2,
    "aten::add": 2,
    "aten::clamp_": 1,
    "aten::clamp": 2,
    "aten::cumsum": 1,
    "aten::ge": 1,
    "aten::sum": 2,
    "aten::index_add_": 1,
}
"""Launches of an exchange in blocks, where not as by exact numbers; see `ExpertParallel`."""


def collectives(step: RankStep) -> Iterator[Work]:
    """Work of all collectives of a rank; of a step in halves without the sums of its layers."""
    layout, part = step.plan.layout, step.rank.part
    crosses = layout.stage_size > step.per_node
    if layout.tp > 1:
        sums = 0 if step.first_half else 2 * part.layers.size
        sums += part.first_stage  # the embedding's rows too
        if step.symmetric:
            yield _symmetric_sum(step, normed=True).times(step.normed_sums)
            yield _symmetric_sum(step, normed=False).times(sums - step.normed_sums)
        elif sums:
            yield tp_sum(step, crosses).times(sums)
    if step.exchanges and step.routed_layers:
        yield _exchange(step, crosses).times(step.routed_layers)
    if layout.pp > 1:
        yield _hand_over(step)
    if part.last_stage and layout.tp > 1:
        yield _logits(step, crosses)


def half_sums(step: RankStep) -> Work:
    """Work of the sums of the layers of half a step, beside products of the other half."""
    if step.symmetric:
        work = _symmetric_sum(step, normed=False)
    else:
        work = tp_sum(step, step.plan.layout.stage_size > step.per_node)
    return replace(work, beside=1.0).times(2 * step.rank.part.layers.size)


def tp_sum(step: RankStep, network: bool) -> Work:
    """A sum of all rows over the tp ranks by NCCL.

    Two ranks reduce; more gather all parts and add them, or from some size on exchange parts of the
    rows, add them, and gather the sums.
    """
    tp, size = step.plan.layout.tp, step.load.tokens * step.row
    launches: dict[str, float] = {"_add_parts": 1} if tp > 2 else {}
    nbytes, link_bytes, messages = 2.0 * size, float(size), {"all_reduce": 1.0}
    if divides_sum(tp, step.load.tokens, step.row):
        nbytes = (3.0 + (tp + 1) / tp) * size  # sent, received, added, gathered
        link_bytes = 2.0 * (tp - 1) / tp * size
        messages = {"all_to_all": 1.0, "all_gather": 1.0}
        if step.load.tokens % tp:
            launches["aten::cat"] = 1
    elif tp > 2:
        nbytes, link_bytes = (2 * tp + 1.0) * size, (tp - 1.0) * size
        messages = {"all_gather": 1.0}
    return Work(
        item="TP sums",
        nbytes=nbytes,
        launches=launches,
        link_bytes=link_bytes,
        network=network,
        messages=messages,
        captured=step.captured,
    )


def _symmetric_sum(step: RankStep, *, normed: bool) -> Work:
    """A sum of all rows over the tp ranks through memory that the ranks share, in one launch.

    The rank's part is read and stored, and then read by all ranks; with rows divided, once by the
    rank that sums a row, and the sums by all. A sum with a norm after is not stored.
    """
    tp, size = step.plan.layout.tp, float(step.load.tokens * step.row)
    divides = divides_rows(tp, step.load.tokens, step.row)
    passes = 4 + 1 / tp if divides else 2.0 + tp
    return Work(
        item="TP sums",
        nbytes=(passes + (not normed)) * size,
        launches={"_symmetric_sum": 1},
        link_bytes=(2 * (tp - 1) / tp if divides else tp - 1.0) * size,
        meetings=2.0 if divides else 1.0,
        captured=step.captured,
    )


def _exchange(step: RankStep, network: bool) -> Work:
    """A routed layer's rows to the ranks of their experts and back.

    In a graph the rows travel in blocks, each with room for all rows of a rank, and all numbers of
    rows stay on the device. Elsewhere the numbers go through the host, which waits for the device.
    Torch's ops by exact numbers: slots of experts (6), differences, numbers of rows and two orders
    to the device (3), the order of returned rows, the sum with the shared expert.
    """
    config, layout = step.plan.model.config, step.plan.layout
    sizes = family_of(config).experts(config)
    assert sizes is not None, "only models with experts exchange rows"
    ranks = layout.stage_size
    own = step.load.tokens / layout.tp * sizes.top_k  # rows sent; as many come, in the mean
    counts = ranks * sizes.num_experts * COUNT_BYTES
    launches = {"_permute": 1.0, "_pack": 2.0, "_unpack": 2.0, "_combine": 1.0}
    launches |= {"aten::index": 2, "aten::arange": 2, "aten::remainder": 1, "aten::_to_copy": 5}
    launches |= {"aten::sub": 1, "aten::add_": 1}
    places = own
    if step.captured:
        slots = -(-sizes.num_experts // ranks)
        places = ranks * math.ceil(step.load.tokens / layout.tp) * min(sizes.top_k, slots)
        launches |= _BLOCK_LAUNCHES
    wire = places * config.hidden_size * _WIRE_BYTES
    away = (ranks - 1) / ranks
    return Work(
        item="EP exchange",
        nbytes=12 * wire + counts + _ORDERED_BYTES * places,
        launches=launches,
        link_bytes=2 * away * wire + counts,
        network=network,
        messages={"all_gather": 1, "all_to_all": 2},
        host_waits=0 if step.captured else 1,
        captured=step.captured,
    )


def _hand_over(step: RankStep) -> Work:
    """Activations from the stage before and to the stage after, outside of graphs."""
    part, layout = step.rank.part, step.plan.layout
    size = step.load.tokens * step.row
    received, sent = not part.first_stage, not part.last_stage
    launches: dict[str, float] = {"aten::clone": 1} if sent and step.captured else {}
    return Work(
        item="PP hand-over",
        nbytes=size * (received + 3.0 * sent),
        launches=launches,
        link_bytes=float(size * received),
        network=layout.world_size > step.per_node,
        messages={"recv": received, "send": sent},
        captured=False,
    )


def _logits(step: RankStep, network: bool) -> Work:
    """Logits of all ranks on tp rank 0, and the drawn tokens back."""
    tp, rows = step.plan.layout.tp, step.load.sequences
    vocab = step.plan.model.config.vocab_size
    own = step.rank.part.vocab.size
    away = float(rows * (vocab - own) * FLOAT)
    messages = {"recv": tp - 1.0}
    if step.plan.layout.pp == 1:
        messages["broadcast"] = 1.0
    return Work(
        item="logits to rank 0",
        nbytes=away + 2.0 * rows * vocab * FLOAT,  # received, then joined
        launches={"aten::cat": 1},
        link_bytes=away,
        network=network,
        messages=messages,
        captured=step.captured,
    )
