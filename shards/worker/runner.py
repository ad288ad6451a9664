"""One rank's step: plan in, activations through, tokens out.

The main loop of a slice reads here: take the plan in, run the stage, hand on or sample.
Knows the slice's model, table and mesh; knows nothing of sockets or of how plans are made.

Shape legend: T tokens, H hidden size, R rows, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from arriero.kernels.ops import Sampled
from arriero.kernels.select import ops_for
from arriero.shards.checkpoint.reader import Checkpoint
from arriero.shards.collectives.expert_parallel import Loads
from arriero.shards.collectives.mesh import Mesh
from arriero.shards.config.group import GroupConfig
from arriero.shards.kv.block_shards import BlockShard
from arriero.shards.kv.transfer_worker import Fence, TierSettings, TransferWorker, TransferWorkers
from arriero.shards.kv.transfers import Pool, TransferResult
from arriero.shards.layout.families import (
    attention_chunk,
    dp_rank_of,
    parts_of,
    pool_layers,
    visible_keys,
)
from arriero.shards.layout.parts import AnyModel
from arriero.shards.layout.resolve import cache_salt, first_placement, tier_limits
from arriero.shards.models.families import load_slice
from arriero.shards.models.loader import Progress
from arriero.shards.protocol.step_plan import Logprobs, StepPlan, StepResult
from arriero.shards.worker.grammar_masks import GrammarRows
from arriero.shards.worker.malloc import returning_large_buffers
from arriero.shards.worker.rope_table import Rope
from arriero.shards.worker.sequence_table import LocalTable, SequenceTable

PROMPT_LOGPROB_ROWS = 128
"""Prompt rows whose logits are held at once: bounds their memory to a few MB a thousand tokens."""


class Pending(Protocol):
    """A step's result, which the device may still be working on."""

    @property
    def done(self) -> bool:
        """Whether `wait` would return at once."""

    def wait(self) -> StepResult:
        """The result."""


@dataclass(frozen=True, slots=True)
class Done:
    """A result that is there."""

    result: StepResult
    done: bool = True

    def wait(self) -> StepResult:
        """The result."""
        return self.result


class Runner:
    """One rank of a replica group; `config` is resolved by `arriero.shards.layout.resolve`."""

    table_type: type[SequenceTable] = SequenceTable
    spare_blocks = 0
    """KV blocks beyond the configured ones, for the runner's own use."""
    spare_slots = 0
    """Slots beyond the configured ones, likewise."""

    def __init__(
        self,
        config: GroupConfig,
        rank: int,
        *,
        progress: Progress = lambda done, total: None,
    ) -> None:
        torch.set_grad_enabled(False)
        started = time.perf_counter()
        self._config = config
        checkpoint = Checkpoint.open(config.model_path)
        model = checkpoint.config
        checkpoint.check_whole()
        device = torch.device(config.device)
        parts = parts_of(model, config)
        part = parts[rank]
        self.mesh = Mesh(part, tp=config.tp, pp=config.pp, dp=config.dp, device=device)
        self._ops = ops_for(
            device,
            config.kernels,
            config.threads,
            batch_independent=config.batch_independent,
        )
        assert config.num_blocks is not None and config.max_model_len is not None, "unresolved"
        with returning_large_buffers():
            self._model = load_slice(
                checkpoint,
                part,
                self.mesh,
                self._ops,
                dtype=getattr(torch, config.dtype),
                quantization=config.quantization,
                num_blocks=config.num_blocks + self.spare_blocks,
                num_local_blocks=(config.num_local_blocks or 0) + self.spare_blocks,
                block_size=config.block_size,
                offload_layers=config.offload_layers,
                offload_folder=Path(config.offload_folder) if config.offload_folder else None,
                wire=config.expert_wire,
                placement=first_placement(config, parts),
                visible=visible_keys(model, config),
                progress=progress,
            )
        self._hidden_size = model.hidden_size
        self._table = self.table_type(
            max_sequences=config.max_sequences,
            max_blocks=-(-config.max_model_len // config.block_size),
            block_size=config.block_size,
            vocab_size=model.vocab_size,
            rope=Rope(model.inv_freq(), config.max_model_len, device),
            device=device,
            grammars=self._grammars(str(checkpoint.path), model) if self.mesh.samples else None,
            local=self._local_table(config, attention_chunk(model)),
        )
        self._table.check_ready()
        first = rank - part.tp_rank
        self._vocab_sizes = [one.vocab.size for one in parts[first : first + config.tp]]
        self.phase = "loaded"
        self.load_s = time.perf_counter() - started
        self.weights_nbytes, self.kv_nbytes = self._model.weights_nbytes, self._model.kv_nbytes
        self.kernels = self._ops.name

    @staticmethod
    def _grammars(model_path: str, model: AnyModel) -> GrammarRows:
        grammars = GrammarRows(
            model_path, vocab_size=model.vocab_size, eos_token_ids=model.eos_token_ids
        )
        grammars.warm()
        return grammars

    def warm_up(self) -> None:
        """Do what would hold up a step, before the first and before tiers open; on a CPU nothing.

        All ranks have joined by then.
        """

    def close(self) -> None:
        """Stop what runs beside the steps; no step may follow."""
        self._table.close()

    def _local_table(self, config: GroupConfig, chunk: int) -> LocalTable | None:
        if not chunk:
            return None
        return LocalTable(
            max_sequences=config.max_sequences + self.spare_slots,
            chunk=chunk,
            max_batch_tokens=config.max_batch_tokens,
            block_size=config.block_size,
        )

    def take_loads(self) -> dict[int, Loads]:
        """Tokens that each expert of this stage was sent since the last call, by layer.

        Empty on all ranks of a stage but the first, since all count the same.
        """
        return {} if self.mesh.stage_rank else self._model.take_loads()

    def open_tiers(
        self, on_moved: Callable[[TransferResult], None], host: str = "127.0.0.1"
    ) -> TransferWorkers:
        """Open the tiers below the device, none if there are none; whoever runs the steps closes.

        Args:
            on_moved: told what came of copies, from threads of the tiers' own.
            host: this node's address, where other nodes' ranks may read host memory.
        """
        config, part = self._config, self.mesh.part
        if not config.tiers.enabled:
            return TransferWorkers({})
        checkpoint = Checkpoint.open(config.model_path)
        model = checkpoint.config
        limits = tier_limits(config, model)
        movers = {}
        dp_rank, parts = dp_rank_of(config, part.rank), parts_of(model, config)
        before = [one for one in parts[: part.rank] if dp_rank_of(config, one.rank) == dp_rank]
        for pool, kv in self._model.kv_pools.items():
            shard, *others = (
                BlockShard(pool_layers(model, one, pool), (one.kv_heads.start, one.kv_heads.stop))
                for one in (part, *before)
            )
            settings = TierSettings(
                config=config.tiers,
                salt=cache_salt(config, checkpoint.digest),
                host_slots=(limits.all if pool is Pool.ALL else limits.local).host_blocks,
                rank=part.rank,
                pool=pool,
                dp_rank=dp_rank,
                shard=shard,
                host=host,
                writes=shard not in others,
            )
            movers[pool] = TransferWorker(kv, settings, on_moved, self.fence)
        return TransferWorkers(movers)

    def fence(self) -> Fence | None:
        """When the device will have run what was launched; None where it has."""
        return None

    def launch(
        self, plan: StepPlan, *, at_layers: Callable[[], None] = lambda: None
    ) -> Pending | None:
        """Begin one plan; the rank that samples gives what to wait for, the others None.

        Args:
            plan: the plan.
            at_layers: called once, when what is left needs little of the interpreter.
        """
        result = self.step(plan, at_layers=at_layers)
        return None if result is None else Done(result)

    def step(
        self, plan: StepPlan, *, at_layers: Callable[[], None] = lambda: None
    ) -> StepResult | None:
        """Run one plan; the rank that samples gives the result, the others None. See `launch`."""
        started = time.perf_counter_ns()
        self.phase = "plan"
        self.mesh.watchdog.step = plan.step
        self._take(plan)
        drawn = self._compute(plan, at_layers)
        if drawn is None:
            return None
        sampled, prompt_logprobs = drawn
        tokens = sampled.tokens_R.cpu().numpy() if sampled is not None else np.empty(0, np.int32)
        return StepResult(
            step=plan.step,
            tokens=tokens,
            logprobs=_logprobs(sampled),
            prompt_logprobs=prompt_logprobs,
            elapsed_us=(time.perf_counter_ns() - started) // 1000,
            dp_rank=plan.dp_rank,
        )

    def _take(self, plan: StepPlan) -> None:
        """Take in what a plan changes."""
        self._table.apply(plan)
        if self._model.images is not None:
            self._model.images.apply(plan)

    def _compute(
        self, plan: StepPlan, at_layers: Callable[[], None] = lambda: None
    ) -> tuple[Sampled | None, Logprobs | None] | None:
        """What an applied plan's step gives, where this rank samples; else None."""
        if plan.placement_layer >= 0:
            self.phase = "placement of experts"
            self._model.place_experts(plan.placement_layer, plan.placement)
        if not len(plan.slots):
            self.phase = "layers"
            at_layers()
            self._model.run_dummy_step()
            return (None, None) if self.mesh.samples else None
        tokens_T, batch = self._table.batch(plan)
        self.phase = "layers"
        part = self.mesh.part
        if part.first_stage:
            x_TH = self._model.embed(tokens_T)
            if self._model.images is not None:
                self._model.images.fill(plan, x_TH)
        else:
            x_TH = torch.empty(
                (len(tokens_T), self._hidden_size),
                dtype=self._activation_dtype,
                device=self.mesh.device,
            )
            self.mesh.recv_hidden(x_TH)
        at_layers()
        x_TH = self._model.decoder(x_TH, batch)
        if not part.last_stage:
            self.mesh.send_hidden(x_TH)
            return None
        self.phase = "sample"
        prompt_logprobs = self._prompt_logprobs(plan, x_TH)
        sampled = self._sample(plan, x_TH)
        return (sampled, prompt_logprobs) if self.mesh.samples else None

    @property
    def _activation_dtype(self) -> torch.dtype:
        on_cpu = self.mesh.device.type == "cpu"
        return torch.float32 if on_cpu else self._model.dtype

    def _sample(self, plan: StepPlan, x_TH: Tensor) -> Sampled | None:
        """Draw the step's tokens, and tell every rank that will embed them."""
        x_RH, num_rows = x_TH, len(x_TH)
        if not plan.same_rows:
            drawn = plan.samples.astype(bool)
            num_rows = int(drawn.sum())
            if not num_rows:
                return None
            if num_rows < len(x_TH):  # chosen on the host: a mask on the device is waited for
                last_R = np.cumsum(plan.counts, dtype=np.int32)[drawn] - 1
                x_RH = x_TH.index_select(0, self._table.on_device(last_R))
        logits_RV = self.mesh.gather_logits(self._model.logits(x_RH), self._vocab_sizes)
        sampled = None
        if logits_RV is not None:
            sampled = self._ops.sample(logits_RV, self._table.sampling_rows(plan))
            tokens_R = sampled.tokens_R
        elif self.mesh.pp > 1:  # the leader sends the tokens to the first stage
            return None
        else:
            tokens_R = torch.empty(num_rows, dtype=torch.int32, device=self.mesh.device)
        self.mesh.share_tokens(tokens_R)
        self._record(plan, tokens_R)
        return sampled

    def _record(self, plan: StepPlan, tokens_R: Tensor) -> None:
        """Keep the drawn tokens for the steps to come."""
        self._table.record(plan, tokens_R.cpu().numpy())

    def _prompt_logprobs(self, plan: StepPlan, x_TH: Tensor) -> Logprobs | None:
        """Log-probabilities of the prompt tokens that follow this step's prompt rows."""
        if not plan.prompt_rows.any():
            return None
        wanted_R = np.flatnonzero(np.repeat(plan.prompt_rows.astype(bool), plan.counts))
        x_RH = x_TH.index_select(0, self._table.on_device(wanted_R))
        next_R = self._table.on_device(plan.prompt_next.clip(min=0)).long()
        top = self._table.num_prompt_logprobs(plan)
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        for start in range(0, len(x_RH), PROMPT_LOGPROB_ROWS):
            x, after = (a[start : start + PROMPT_LOGPROB_ROWS] for a in (x_RH, next_R))
            logits_RV = self.mesh.gather_logits(self._model.logits(x), self._vocab_sizes)
            if logits_RV is not None:
                logprobs_RV = logits_RV.log_softmax(dim=-1)
                best = logprobs_RV.topk(top, dim=-1)
                chosen = logprobs_RV.gather(1, after[:, None])[:, 0]
                found.append((chosen, best.indices.int(), best.values))
        if not found:
            return None
        columns = [torch.cat(part).cpu().numpy() for part in zip(*found, strict=True)]
        return Logprobs(chosen=columns[0], top_tokens=columns[1], top=columns[2])


def _logprobs(sampled: Sampled | None) -> Logprobs | None:
    if sampled is None or sampled.logprobs_R is None:
        return None
    chosen = sampled.logprobs_R.cpu().numpy()
    if sampled.top_tokens_RN is None or sampled.top_logprobs_RN is None:
        none = np.empty((len(chosen), 0))
        return Logprobs(
            chosen=chosen, top_tokens=none.astype(np.int32), top=none.astype(np.float32)
        )
    return Logprobs(
        chosen=chosen,
        top_tokens=sampled.top_tokens_RN.cpu().numpy(),
        top=sampled.top_logprobs_RN.cpu().numpy(),
    )
