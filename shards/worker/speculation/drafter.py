"""What a runner asks of a model that drafts tokens.

The runner calls `apply` once for each plan, before anything is computed, and `propose` once for
each plan with rows, after the target has drawn its tokens. Both calls happen on every rank of the
last stage, in the same order, so a drafter may use the collectives of the tensor-parallel group.

A draft never changes the output: the target draws at each drafted position what it would have
drawn, and a drafted token counts only where it equals the draw of the position before.

Knows the shapes; knows nothing of a drafter's model. Shape legend: S rows of the plan, T tokens,
R drawn tokens, H hidden size, K most drafted tokens of the step.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from arriero.kernels.flat_batch import FlatBatch
from arriero.shards.protocol.step_plan import Int32, StepPlan


@dataclass(frozen=True, kw_only=True, slots=True)
class DraftInputs:
    """What the target computed in a step.

    Row i of the plan has `plan.counts[i]` tokens from position `plan.starts[i]`; its last
    `plan.samples[i]` positions were drawn. If `plan.samples[i]` is n + 1 with n > 0, the last n
    tokens of the row were drafted, and the first `emitted_S[i]` draws are the sequence's next
    tokens; the keys and values of later positions of the row are void and are overwritten later.

    Attributes:
        plan: the plan.
        tokens_T: int32, tokens of the step; every `LAST_SAMPLED` is replaced by the token.
        batch: positions and block tables of the step; the drafter's own KV cache may use the same
            block tables, since each block belongs to the same tokens.
        hidden_TH: output of the target's last layer, before the final norm.
        taps: outputs [T, H] of the layers that `Drafter.taps` names, in that order.
        drawn_R: drawn tokens, row by row.
        emitted_S: number of drawn tokens that count, for each row; 0 for a row without draws.
    """

    plan: StepPlan
    tokens_T: Tensor
    batch: FlatBatch
    hidden_TH: Tensor
    taps: tuple[Tensor, ...]
    drawn_R: Int32
    emitted_S: Int32


class Drafter(Protocol):
    """A model that drafts the tokens after the drawn tokens of a step.

    Attributes:
        taps: activations of the target that the drafter reads: k stands for residual + hidden as
            they enter layer k (the output of layer k - 1); the slice keeps them during a step.
    """

    taps: tuple[int, ...]

    @property
    def weights_nbytes(self) -> int:
        """Bytes of the drafter's weights on this rank."""

    @property
    def kv_nbytes(self) -> int:
        """Bytes of the drafter's KV cache on this rank."""

    def warm_up(self, sizes: Many[int], hidden_size: int, dtype: torch.dtype) -> None:
        """Compile all kernels, before the first plan: rows of padding, and draws of each form.

        Args:
            sizes: numbers of rows, at least one.
            hidden_size: hidden size of the target.
            dtype: dtype of the target's activations.
        """

    def apply(self, plan: StepPlan) -> None:
        """Apply the changes of a plan: freed slots, new sequences."""

    def propose(self, step: DraftInputs) -> Int32:
        """Draft the tokens after the step's last emitted token of each drawn row.

        Must also be called for rows without a draft, so that the drafter's KV cache has every
        token of the sequence.

        Returns:
            [S', K] drafted tokens, a row for each plan row with draws, in order; row i has at most
            `plan.draft_lengths[i]` tokens and -1 after them. Read on the rank that samples.
        """
