"""Work of a stage's layers on a rank, by launches as `kernels/triton/decoder.py` has them.

Knows packed weights, heads and rows; collectives are in `collectives`. Knows nothing of time.

Names in formulas: tokens are the rank's rows, d is the size of a head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from arriero.cluster.planner.group_plan import GroupPlan, RankPlan
from arriero.cluster.planner.packed_stack import PackedStack
from arriero.cluster.planner.step_memory import MOST_SPLITS, PROMPT_SPLITS_BYTES
from arriero.cluster.planner.step_model.products import FLOAT8, Products
from arriero.cluster.planner.step_model.work import Item, StepLoad, Work
from arriero.kernels.sizes import FLOAT
from arriero.shards.collectives.half_steps import first_half
from arriero.shards.collectives.symmetric_sizes import in_symmetric_memory
from arriero.shards.families.registry import family_of
from arriero.shards.layout.families import local_layers

SPLIT_TOKENS = 256
"""Least keys of a split of a decode's attention; `split` of `kernels/triton/tuned.json`."""
PROMPT_TILE_ROWS = 128
"""Rows of a prefill's tile: tokens times heads; `prefill_block_m` of kernels/triton/tuned.json."""
PROMPT_PROGRAMS = 132
"""From half as many tiles on, programs share no tile; `FULL_GPU` of `kernels/triton/prefill.py`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RankStep:
    """A rank in a step.

    Attributes:
        plan: plan of the group.
        rank: plan of the rank.
        stacks: the rank's packed matrices and vectors.
        products: products of the rank.
        load: sequences of the step.
        captured: the step is a CUDA graph.
        per_node: ranks on a machine.
        halved: the load is half of a step, whose sums run beside products of the other half.
    """

    plan: GroupPlan
    rank: RankPlan
    stacks: Sequence[PackedStack]
    products: Products
    load: StepLoad
    captured: bool
    per_node: int
    halved: bool = False

    @property
    def first_half(self) -> int:
        """Rows of the first half of the step; 0 for a step that stays whole."""
        if self.captured or self.exchanges:
            return 0
        routed = bool(self.routed_layers)
        return first_half(self.plan.layout.tp, self.load.tokens, self.row, routed=routed)

    @property
    def row(self) -> int:
        """Bytes of a token's row of activations."""
        return self.plan.model.config.hidden_size * self.products.itemsize

    @property
    def symmetric(self) -> bool:
        """Whether sums over tp ranks go through memory that the ranks share."""
        in_a_machine = 1 < self.plan.layout.tp <= self.per_node
        return in_a_machine and in_symmetric_memory(self.load.tokens, self.row)

    @property
    def normed_sums(self) -> int:
        """Sums over tp ranks that share a launch with the residual sum and the norm after."""
        if not self.symmetric or self.halved:
            return 0
        alone = 1 + (self.routed_layers if self.exchanges else 0)
        return 2 * self.rank.part.layers.size - alone

    @property
    def routed_layers(self) -> int:
        """Layers of the stage with experts."""
        return sum(stack.times for stack in self.of("router"))

    @property
    def exchanges(self) -> bool:
        """Rows travel to the ranks of their experts; else each rank sums its own experts."""
        return self.plan.layout.dp > 1

    def of(self, kind: str) -> list[PackedStack]:
        """The matrices of a kind."""
        return [stack for stack in self.stacks if stack.kind == kind and stack.columns]

    def rows(
        self, item: Item, launches: dict[str, float], nbytes: float, *, host_waits: float = 0.0
    ) -> Work:
        """Work of kernels that read and write rows."""
        return Work(
            item=item,
            nbytes=nbytes,
            launches=launches,
            host_waits=host_waits,
            captured=self.captured,
        )


def layers(step: RankStep) -> Iterator[Work]:
    """Work of all layers of the stage, without collectives."""
    yield from _attention_blocks(step)
    yield from _norms(step)
    yield from _gated_mlps(step, "mlp", "MLP")
    yield from _gated_mlps(step, "shared_expert", "shared expert")
    if step.routed_layers:
        yield from _routers(step)
        yield from _experts(step)


def _attention_blocks(step: RankStep) -> Iterator[Work]:
    tokens, captured = step.load.tokens, step.captured
    for stack in step.of("attention"):
        normed = stack.num_modules > 1
        item: Item = "q, k, v product" if normed else "o product"
        work = step.products.linear(item, stack, tokens, captured=captured, rounded=normed)
        yield work.times(stack.times)
    num_layers = step.rank.part.layers.size
    heads = step.rank.part.q_heads.size + 2 * step.rank.part.kv_heads.size
    head_bytes = step.plan.model.config.head_dim * step.products.itemsize
    rope_bytes = 2.0 * tokens * heads * head_bytes  # q, k and v are read; q and the cache written
    yield step.rows("RoPE, cache write", {"_rope_write_kv": 1}, rope_bytes).times(num_layers)
    yield _attention(step)


def _attention(step: RankStep) -> Work:
    plan, rank, load = step.plan, step.rank, step.load
    config, part, block_size = plan.model.config, rank.part, plan.demand.block_size
    local = local_layers(config, part)
    full = part.layers.size - local
    window, sinks = plan.demand.sliding_window or 0, plan.demand.attention_sinks
    keys = _keys_read(load, 0, window, sinks)
    local_keys = _keys_read(load, plan.chunk, 0, 0)
    pairs, local_pairs = _pairs(load, 0, window + sinks), _pairs(load, plan.chunk, 0)
    read = load.sequences * (keys * rank.kv_global_block + local_keys * rank.kv_local_block)
    q = part.q_heads.size * config.head_dim
    nbytes = read / block_size + 2.0 * load.tokens * q * step.products.itemsize * part.layers.size
    launches: dict[str, float] = {}
    num_layers, splits = part.layers.size, 0
    if load.decodes or load.sequences > 1:
        launches |= {"_decode_splits": num_layers, "_decode_fold": num_layers}
    if load.decodes:
        splits = full * _splits(keys) + local * _splits(local_keys)
    else:
        launches["_prefill"] = num_layers
        if full and not window and _tiles_are_shared(step):
            launches["_prefill_fold"] = full
            splits = full * _splits(keys)
    head = (config.head_dim + 2) * FLOAT
    nbytes += 2.0 * splits * load.tokens * part.q_heads.size * head  # written, then folded
    return Work(
        item="attention",
        kind="attention",
        nbytes=nbytes,
        operations=4.0 * q * load.sequences * (full * pairs + local * local_pairs),
        launches=launches,
        captured=step.captured,
    )


def _tiles_are_shared(step: RankStep) -> bool:
    """Whether programs share the tiles of a prompt; `programs_per_tile` of kernels/triton."""
    load, part = step.load, step.rank.part
    group = part.q_heads.size // part.kv_heads.size
    tiles = load.tokens // max(1, PROMPT_TILE_ROWS // group) + load.sequences
    head = part.q_heads.size * MOST_SPLITS * (step.plan.model.config.head_dim + 2) * FLOAT
    return (
        2 * tiles * part.kv_heads.size <= PROMPT_PROGRAMS
        and load.tokens * head <= PROMPT_SPLITS_BYTES
        and load.context > SPLIT_TOKENS
    )


def _splits(keys: int) -> int:
    return min(MOST_SPLITS, -(-keys // SPLIT_TOKENS))


def _keys_read(load: StepLoad, chunk: int, window: int, sinks: int) -> int:
    """Keys of a sequence that a step reads at least once."""
    if chunk:
        return load.new_tokens + (load.context - load.new_tokens) % chunk
    if window:
        return min(load.context, load.new_tokens + window - 1 + sinks)
    return load.context


def _pairs(load: StepLoad, chunk: int, window: int) -> int:
    """(query, visible key) pairs of a sequence in a step."""

    def pairs_until(position: int) -> int:
        if chunk:
            whole, rest = divmod(position, chunk)
            return whole * (chunk * (chunk + 1) // 2) + rest * (rest + 1) // 2
        growing = min(position, window) if window else position
        return growing * (growing + 1) // 2 + (position - growing) * window

    return pairs_until(load.context) - pairs_until(load.context - load.new_tokens)


def _norms(step: RankStep) -> Iterator[Work]:
    """Two norms of a layer, each fused with the residual sum before; the last sum is alone."""
    num_layers, tokens = step.rank.part.layers.size, step.load.tokens
    fused = 2 * num_layers - 1  # the first norm adds nothing
    with_sum = step.normed_sums  # launches of "TP sums", which read no sum from memory
    nbytes = tokens * (step.row * (3.0 * fused + 1 - with_sum) + _normed_nbytes(step))
    yield step.rows("norms, residual", {"_rms_norm": 2 * num_layers - with_sum}, nbytes)
    sums = 1.0 + (step.routed_layers if step.exchanges else 0)
    yield step.rows("norms, residual", {"aten::add_": 1}, 3.0 * tokens * step.row).times(sums)


def _normed_nbytes(step: RankStep) -> float:
    """Bytes of a token's outputs of all norms.

    Float8 rows where the next product rounds its inputs; unrounded rows for other products, and for
    the router and the routed experts.
    """
    products, total = step.products, 0.0
    for kind in ("attention", "mlp", "shared_expert"):
        for stack in step.of(kind):
            if stack.num_modules > 1:
                rounds = products.rounds(stack)
                keeps = not rounds or kind == "shared_expert"
                number = products.itemsize * keeps + FLOAT8 * rounds
                total += stack.times * stack.columns * number
    return total


def _gated_mlps(step: RankStep, kind: str, item: Item) -> Iterator[Work]:
    """Gate and up product, SwiGLU, down product; norm and SwiGLU round rows for the products."""
    tokens = step.load.tokens
    for stack in step.of(kind):
        work = step.products.linear(item, stack, tokens, captured=step.captured, rounded=True)
        yield work.times(stack.times)
        if stack.num_modules == 1:
            yield _silu_mul(step, item, stack, tokens, step.products.rounds(stack))


def _silu_mul(step: RankStep, item: Item, down: PackedStack, rows: float, rounds: bool) -> Work:
    """SwiGLU before a down product, in all layers; `rounds`: it writes float8 rows."""
    itemsize = step.products.itemsize
    nbytes = rows * down.columns * (2.0 * itemsize + (FLOAT8 if rounds else itemsize))
    name = "_silu_mul_rounded" if rounds else "_silu_mul"
    return step.rows(item, {name: 1}, nbytes).times(down.times)


def _routers(step: RankStep) -> Iterator[Work]:
    """Logits of all experts and the choice; of ranks with the same tokens, each routes a share."""
    tokens = step.load.tokens / (step.plan.layout.tp if step.exchanges else 1)
    for stack in step.of("router"):
        work = step.products.linear("router", stack, tokens, captured=step.captured)
        yield work.times(stack.times)
        launches: dict[str, float] = {"_route": 1}
        if step.products.itemsize != FLOAT:
            launches["aten::_to_copy"] = 1
        nbytes = 3.0 * tokens * stack.rows * FLOAT
        yield step.rows("router", launches, nbytes).times(stack.times)


def _experts(step: RankStep) -> Iterator[Work]:
    """Order of the rows, products of the rank's experts, sum of each token's outputs."""
    plan, load = step.plan, step.load
    sizes = family_of(plan.model.config).experts(plan.model.config)
    assert sizes is not None, "only models with experts have routers"
    stage_tokens = load.tokens * plan.layout.dp
    parts = plan.layout.num_expert_parts
    local = stage_tokens * sizes.top_k / parts  # expected pairs with an expert of this rank
    pairs = local if step.exchanges else load.tokens * sizes.top_k
    experts = step.of("experts")
    copies = experts[0].copies
    # The step waits for the rank with most work: a rank with at least one expert.
    hit = max(1.0, copies * (1 - (1 - sizes.top_k / sizes.num_experts) ** stage_tokens))
    rows = max(1.0, local)
    scaled = all(step.products.scaled(stack) for stack in experts)
    for stack in experts:
        down = stack.num_modules == 1
        work = step.products.grouped(
            "experts", stack, pairs, rows, hit, captured=step.captured, rounded=down and scaled
        )
        yield work.times(stack.times)
        if down:
            yield _silu_mul(step, "experts", stack, rows if scaled else pairs, scaled)
    if step.exchanges:
        return  # `collectives` has the order of rows that travel
    launches: dict[str, float] = {"_permute": 1, "_combine": 1}
    nbytes = step.row * (rows + 2.0 * load.tokens)  # outputs, the shared expert's, the sum
    rounds = any(step.products.rounds(stack) for stack in experts)
    if rounds and not scaled:
        launches |= {"aten::_to_copy": 1, "aten::clamp_": 1, "aten::index": 1, "aten::mul": 1}
        launches["aten::_to_copy"] += step.products.itemsize != FLOAT
        nbytes += 4.0 * pairs * step.row  # rows of tokens are gathered, then scaled
    yield step.rows("dispatch, combine", launches, nbytes).times(step.routed_layers)
