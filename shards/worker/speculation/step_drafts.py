"""A rank's drafter in its steps: what the target computed goes in, drafts for the leader come out.

Knows the order of calls; knows nothing of models. Shape legend: T tokens, H hidden size, R drawn
tokens, K most drafted tokens of the step.
"""

from __future__ import annotations

import time

import numpy as np
import torch
from torch import Tensor

from arriero.kernels.flat_batch import FlatBatch
from arriero.shards.collectives.mesh import Mesh
from arriero.shards.models.taps import Taps
from arriero.shards.protocol.step_plan import Int32, StepPlan
from arriero.shards.worker.drawn_rows import emitted_counts
from arriero.shards.worker.speculation.drafter import Drafter, DraftInputs


class StepDrafts:
    """Drafts after each step, on the ranks of the last stage.

    Args:
        drafter: the model that drafts.
        taps: activations that the slice keeps for the drafter.
        mesh: ranks of the group.

    Attributes:
        drafter: the model that drafts.
        elapsed_us: microseconds of the last drafts.
    """

    def __init__(self, drafter: Drafter, taps: Taps, mesh: Mesh) -> None:
        self.drafter = drafter
        self._taps, self._mesh = taps, mesh
        self.elapsed_us = 0

    def after(
        self,
        plan: StepPlan,
        tokens_T: Tensor,
        batch: FlatBatch,
        hidden_TH: Tensor,
        drawn_R: Tensor | None,
    ) -> Int32:
        """Draft after a step; see `Drafter.propose`.

        Args:
            plan: plan of the step.
            tokens_T: tokens of the step, a copy: the batch of the next step may use their memory.
            batch: positions and block tables.
            hidden_TH: output of the last layer.
            drawn_R: drawn tokens; None on ranks that do not know them, or without draws.
        """
        started_ns = time.perf_counter_ns()
        num_draws = int(plan.samples.sum())
        if drawn_R is None:
            drawn_R = torch.empty(num_draws, dtype=torch.int32, device=self._mesh.device)
        if self._mesh.pp > 1 and num_draws:  # with one stage, all ranks have them already
            self._mesh.share_drafts(drawn_R)
        drawn = drawn_R.cpu().numpy()
        drafts = self.drafter.propose(
            DraftInputs(
                plan=plan,
                tokens_T=tokens_T,
                batch=batch,
                hidden_TH=hidden_TH,
                taps=self._taps.kept(len(tokens_T)),
                drawn_R=drawn,
                emitted_S=emitted_counts(plan, drawn),
            )
        )
        self.elapsed_us = (time.perf_counter_ns() - started_ns) // 1000
        return np.ascontiguousarray(drafts, dtype=np.int32)
