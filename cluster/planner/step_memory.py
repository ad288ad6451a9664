"""Bytes of a step beside weights and KV cache: activations, CUDA graphs, communication buffers.

Upper estimates by the formulas here. Knows the part of a rank and the load; knows nothing of the
memory of devices. Needs no torch.

Names in formulas: rows are sequences with sampled logits, d is the size of a head.
"""

from __future__ import annotations

from arriero.cluster.planner.catalog import Device
from arriero.cluster.planner.demand import KvDemand
from arriero.shards.collectives.symmetric_sizes import symmetric_nbytes
from arriero.shards.config.parallel import ParallelConfig
from arriero.shards.families.registry import family_of
from arriero.shards.layout.moe import MoEPart
from arriero.shards.layout.parts import AnyModel, AnyPart

GRAPH_BYTES_PER_LAYER = 64 << 10
"""Bytes of a CUDA graph for the kernels of a layer."""
CHANNEL_BYTES = 128 << 20
"""Bytes of the channel buffers of an NCCL communicator."""
PAIR_BYTES = 32 << 20
"""Bytes of a communicator between two ranks for sends: NCCL gives it fewer channels."""
MOST_SPLITS = 64
"""Splits of a context in a decode's attention on a GPU; `most_splits` of kernels/triton."""
PROMPT_SPLITS_BYTES = 128 << 20
"""Most bytes of the splits of a prompt's rows; `PARTS_NBYTES` of kernels/triton/prefill.py."""
DRAFT_ROWS = 64
"""Rows of the largest graph of a group with drafts and fewer sequences; `graph_rows` of CUDA."""
_MOST_TILES = 17  # tiles of an image: 16, and the whole image
SAMPLING_COPIES = 3
"""Copies of the sampled rows' logits at once: raw, sorted, probabilities."""


def num_graphs(max_sequences: int) -> int:
    """Number of CUDA graphs of a rank: a graph for each batch size, in steps of 8, 16 and 64."""
    sizes = [1, 2, 4, 8]
    while sizes[-1] < max_sequences:
        last = sizes[-1]
        sizes.append(last + (8 if last < 64 else 16 if last < 256 else 64))
    return sum(size < max_sequences for size in sizes) + 1


def activation_bytes(
    config: AnyModel, part: AnyPart, layout: ParallelConfig, demand: KvDemand, itemsize: int
) -> int:
    """Largest number of bytes of a step's tensors at once: the tensors of a layer, the logits."""
    tokens, hidden, d = demand.max_batch_tokens, config.hidden_size, config.head_dim
    q, kv = part.q_heads.size * d, part.kv_heads.size * d
    attention = 2 * q + 2 * kv + q  # qkv, rotated q, output
    mlp = 3 * part.columns.size
    family = family_of(config)
    experts, tower = family.experts(config), family.vision(config)
    if experts is not None and isinstance(part, MoEPart):
        # Worst case: the router sends every token of the stage to the experts of this rank.
        routed = layout.dp * experts.top_k * (3 * part.expert_columns.size + 2 * hidden)
        mlp = max(mlp, 3 * part.shared_columns.size + routed)
    layer = tokens * (3 * hidden + max(attention, mlp)) * itemsize  # residual, normed, partial sum
    logits = 0
    if part.last_stage:
        rows = demand.max_sequences
        logits = rows * part.vocab.size * 4 + rows * hidden * itemsize
        if part.tp_rank == 0:
            logits += SAMPLING_COPIES * rows * config.vocab_size * 4
    tables = demand.max_sequences * -(-demand.context // demand.block_size) * 4
    angles = 2 * tokens * d * 4
    vision = 0
    if tower is not None and isinstance(part, MoEPart) and part.first_stage:
        tile = 4 * tower.hidden_size + 3 * part.vision_columns.size
        vision = _MOST_TILES * tower.num_positions * tile * itemsize
    return max(layer + logits, vision) + tables + angles


def split_bytes(config: AnyModel, part: AnyPart, demand: KvDemand) -> int:
    """Bytes of the partial results of attention on a GPU: float32, for each split.

    Of a decode of all sequences, or of a prompt's last tokens.
    """
    head = part.q_heads.size * MOST_SPLITS * (config.head_dim + 2) * 4
    prompt = min(demand.max_batch_tokens * head, PROMPT_SPLITS_BYTES)
    return max(demand.max_sequences * head, prompt)


def communicators(part: AnyPart, layout: ParallelConfig) -> tuple[int, int]:
    """Communicators of a rank: groups of ranks, and pairs of ranks for sends.

    Groups are the whole group, the tensor-parallel ranks and the stage with its machine's ranks
    and its rails (`shards/collectives/mesh.py`). Pairs carry logits and activations.
    """
    if layout.world_size == 1:
        return 0, 0
    groups = 1 + (1 < layout.tp < layout.world_size) + (3 if layout.dp > 1 else 0)
    pairs = 0
    if layout.tp > 1 and part.last_stage:
        pairs += 1 if part.tp_rank else layout.tp - 1
    if layout.pp > 1:
        pairs += (not part.first_stage) + (not part.last_stage)
    return groups, pairs


def communication_bytes(
    config: AnyModel,
    part: AnyPart,
    layout: ParallelConfig,
    demand: KvDemand,
    itemsize: int,
    device: Device,
) -> int:
    """Bytes of the buffers for sums, hand-over and all-to-all, and of NCCL's channels.

    Sums have both: memory that the ranks share, and buffers of the large sums that NCCL does.
    """
    row = demand.max_batch_tokens * config.hidden_size * itemsize
    total = 0
    if layout.tp > 1:
        # More than two ranks gather all partial sums and add them in rank order.
        total += row * layout.tp if layout.tp > 2 else 0
        if part.last_stage and part.tp_rank == 0:
            total += demand.max_sequences * config.vocab_size * 4
    if layout.pp > 1:
        total += row * (1 + layout.pp)  # one is received, and one is sent for each micro-batch
    experts = family_of(config).experts(config)
    if experts is not None and layout.tp * layout.dp > 1:
        total += 2 * row * layout.dp * experts.top_k  # dispatch and combine
    if device.cuda:
        total += symmetric_nbytes() if layout.tp > 1 else 0
        groups, pairs = communicators(part, layout)
        total += groups * CHANNEL_BYTES + pairs * PAIR_BYTES
    return total
