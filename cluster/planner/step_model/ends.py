"""Work at both ends of a step: inputs, embedding, vocabulary product, sampling.

As `shards/worker/cuda/runner.py` and `kernels/triton/sampling.py` do them. Knows rows and the
vocabulary; knows nothing of layers.
"""

from __future__ import annotations

from collections.abc import Iterator

from arriero.cluster.planner.step_model.layers import RankStep
from arriero.cluster.planner.step_model.work import Work
from arriero.kernels.sizes import FLOAT

FILTER_PASSES = 9
"""Passes of a filter over the weights of a row; `PASSES` of `kernels/triton/filters.py`."""
_WEIGHT_BYTES = 8
_EAGER_COPIES = 8
"""Copies to the device for the batch of a step that is no graph."""


def ends(step: RankStep) -> Iterator[Work]:
    """Work of a rank before and after the layers, without collectives."""
    part = step.rank.part
    yield from _inputs(step)
    if part.first_stage:
        row = 2.0 * step.load.tokens * step.row
        yield step.rows("embedding", {"_embed": 1}, row)
    if part.last_stage:
        yield from _vocabulary(step)
        if part.tp_rank == 0:
            yield from _sampling(step)


def _inputs(step: RankStep) -> Iterator[Work]:
    """Copies of a step's inputs and result, and the lookups that begin a graph."""
    part, load = step.rank.part, step.load
    new_blocks = min(1.0, load.tokens / step.plan.demand.block_size)
    outside = {"host to device": 1.0, "replay": 1.0} if step.captured else {}
    apart = step.captured and step.exchanges  # layers and draws are two graphs
    if apart and part.last_stage and part.tp_rank == 0:
        outside["replay"] = 2.0
    if not step.captured:
        outside["host to device"] = float(_EAGER_COPIES)
    outside["block tables"] = 3 * new_blocks
    if part.last_stage and part.tp_rank == 0:
        outside["device to host"] = 1.0
    yield Work(item="step inputs", launches=outside, captured=False)
    lookups = {"aten::index_select": 2.0}  # cosines and sines, block tables
    if part.first_stage and step.captured:
        lookups["aten::index_select"] += 1  # last tokens of the slots
        lookups |= {"aten::eq": 1.0, "aten::where": 1.0}
    if step.captured and (apart or not part.last_stage):
        lookups["aten::copy_"] = 1.0
    angles = 2.0 * load.tokens * step.plan.model.config.head_dim * FLOAT
    yield step.rows("step inputs", lookups, angles)


def _vocabulary(step: RankStep) -> Iterator[Work]:
    """Final norm and product of each sequence's last row, with float32 sums."""
    rows = step.load.sequences
    launches: dict[str, float] = {"_rms_norm": 1}
    if not step.load.decodes:
        launches["aten::index_select"] = 1
    yield step.rows("vocabulary product", launches, 4.0 * rows * step.row)
    tied = step.plan.model.config.tie_word_embeddings
    for stack in step.of("embeddings" if tied else "head"):
        yield step.products.linear(
            "vocabulary product", stack, rows, captured=step.captured, out=FLOAT
        )


def _sampling(step: RankStep) -> Iterator[Work]:
    rows = step.load.sequences
    numbers = float(rows * step.plan.model.config.vocab_size)
    launches: dict[str, float] = {"_adjust": 1, "_pick": 1}
    nbytes = numbers * FLOAT
    if step.load.draws:
        passes = 2 * (FILTER_PASSES + 1)
        launches |= {"_weigh": 1, "_narrow": passes, "_race": 1, "aten::zeros": 1}
        nbytes += numbers * (FLOAT + _WEIGHT_BYTES * (2 + 2 * FILTER_PASSES))
    yield Work(
        item="sampling",
        kind="sampling",
        nbytes=nbytes,
        launches=launches,
        captured=step.captured,
    )
    launches = {"aten::clamp": 1, "aten::_to_copy": 1, "aten::index_copy_": 1}
    if step.captured:
        launches["aten::copy_"] = 1
    yield step.rows("sampling", launches, 8.0 * rows * FLOAT)
