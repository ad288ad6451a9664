"""The step of a rank: apply the plan, run the stage, then send activations on or sample.

Knows the slice's model, sequence table and mesh; knows nothing of sockets or scheduling.

Shape legend: T tokens, H hidden size, R rows, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from arriero.kernels.lora import AdapterRows
from arriero.kernels.sampling_rows import Sampled
from arriero.kernels.select import ops_for
from arriero.shards.adapters.adapter import open_adapters
from arriero.shards.checkpoint.overlay import open_weights
from arriero.shards.checkpoint.page_cache import drop_pages
from arriero.shards.checkpoint.reader import Checkpoint
from arriero.shards.collectives.expert_parallel import Loads
from arriero.shards.collectives.mesh import Mesh
from arriero.shards.config.group import GroupConfig
from arriero.shards.kv.transfer_worker import Fence, TransferWorker, TransferWorkers
from arriero.shards.kv.transfers import TransferResult
from arriero.shards.layout.families import attention_chunk, parts_of
from arriero.shards.layout.parts import AnyModel
from arriero.shards.models.loader import Progress
from arriero.shards.protocol.step_plan import Logprobs, StepPlan, StepResult
from arriero.shards.protocol.verification import drawn_rows
from arriero.shards.worker.adapter_store import store_of
from arriero.shards.worker.grammar_masks import GrammarRows
from arriero.shards.worker.resident_model import ResidentModel, give_memory_back, load_resident
from arriero.shards.worker.rope_table import Rope
from arriero.shards.worker.sequence_table import LocalTable, SequenceTable
from arriero.shards.worker.step_results import Done, Drawn, Pending, logprobs_of
from arriero.shards.worker.tier_settings import tier_settings
from arriero.shards.worker.weight_checker import WeightChecker

PROMPT_LOGPROB_ROWS = 128
"""Prompt rows with logits in memory at a time; limits the logits to a few MB per 1,000 tokens."""


class Runner:
    """A rank of a replica group; `arriero.shards.layout.resolve` must have resolved `config`."""

    table_type: type[SequenceTable] = SequenceTable
    spare_blocks = 0
    """KV blocks for the runner's own use, beside the configured blocks."""
    spare_slots = 0
    """Slots for the runner's own use, beside the configured slots."""

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
        checkpoint = open_weights(config.model_path, config.weights)
        model = checkpoint.config
        self._check_device(checkpoint)
        checkpoint.check_whole()
        device = torch.device(config.device)
        parts = self._parts = parts_of(model, config)
        part = parts[rank]
        self.mesh = Mesh(part, config, device=device)
        self._ops = ops_for(
            device,
            config.kernels,
            config.threads,
            batch_independent=config.batch_independent,
            activation_dtype=config.activation_dtype,
        )
        self.mesh.use(self._ops)
        assert config.num_blocks is not None and config.max_model_len is not None, "unresolved"
        self.weight_checker = WeightChecker(config, part, config.world_size)
        self._tiers = TransferWorkers({})
        self._hold(self._load_resident(checkpoint, progress))
        self.weight_checker.note(checkpoint, config.weights)
        self.adapter_store = store_of(
            config, model, open_adapters(config, model), self._model.adapters, rank
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
        self._vocab_sizes = [tp_part.vocab.size for tp_part in parts[first : first + config.tp]]
        self.phase = "loaded"
        self.load_s = time.perf_counter() - started
        self.kernels = self._ops.name

    @staticmethod
    def _grammars(model_path: str, model: AnyModel) -> GrammarRows:
        grammars = GrammarRows(
            model_path, vocab_size=model.vocab_size, eos_token_ids=model.eos_token_ids
        )
        grammars.warm()
        return grammars

    def _check_device(self, checkpoint: Checkpoint) -> None:
        """Raise a `SpecError` where the device cannot run the checkpoint; a CPU runs all."""

    def warm_up(self) -> None:
        """Prepare work that would delay the first steps; does nothing on a CPU.

        Called after all ranks have joined and before `open_tiers`.
        """

    def _load_resident(
        self, checkpoint: Checkpoint, progress: Progress = lambda done, total: None
    ) -> ResidentModel:
        return load_resident(
            self._config,
            checkpoint,
            self._parts,
            self.mesh,
            self._ops,
            spare_blocks=self.spare_blocks,
            progress=progress,
        )

    def _hold(self, resident: ResidentModel) -> None:
        """Use this model from now on."""
        self._model, self._drafts = resident.model, resident.drafts
        self.weights_nbytes = resident.weights_nbytes
        self.kv_nbytes = resident.kv_nbytes

    def release(self, *, keep_on_host: bool = True) -> None:
        """Give the memory of weights and KV cache back; only `load` may follow.

        Args:
            keep_on_host: whether the files of the weights stay in the page cache.
        """
        self.phase = "release of weights"
        self._tiers.rebind(None)
        if self.adapter_store is not None:
            self.adapter_store.rebind(None)
        if not keep_on_host:
            drop_pages(open_weights(self._config.model_path, self._config.weights).files)
        if not self.weights_nbytes:
            return
        self._drafts = None
        del self._model
        self._ops.drop_tables()
        self.weights_nbytes = self.kv_nbytes = 0
        give_memory_back(self.mesh.device)

    def load(self, sources: tuple[str, ...]) -> None:
        """Load weights and an empty KV cache in place of those before, if any.

        Args:
            sources: what replaces tensors of the model folder; see `open_weights`.

        Raises:
            CheckpointError: files have changed since they were checked; the rank is as before.
        """
        checkpoint = open_weights(self._config.model_path, sources)
        self.weight_checker.require_unchanged(checkpoint, sources)
        checkpoint.check_whole()
        if self.weights_nbytes:
            self.release()
        self.phase = "load of weights"
        self._config = replace(self._config, weights=sources)
        self._hold(self._load_resident(checkpoint))
        self.weight_checker.note(checkpoint, sources)
        self._tiers.rebind(self._model.kv_pools)
        if self.adapter_store is not None:
            self.adapter_store.rebind(self._model.adapters)
        self.warm_up()
        self.phase = "loaded"

    def close(self) -> None:
        """Stop background threads; no step may follow."""
        self._table.close()
        self.weight_checker.close()
        if self.adapter_store is not None:
            self.adapter_store.close()

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
        """Tokens routed to each expert of this stage since the last call, by layer.

        Empty except on the first rank of a stage, since all ranks of a stage count the same.
        """
        released = not self.weights_nbytes
        return {} if self.mesh.stage_rank or released else self._model.take_loads()

    def open_tiers(
        self, on_result: Callable[[TransferResult], None], host: str = "127.0.0.1"
    ) -> TransferWorkers:
        """Open the tiers below the device; the caller closes the workers. Empty without tiers.

        Args:
            on_result: called with results of copies, in the threads of the workers.
            host: address of this node, where ranks of other nodes may read host memory.
        """
        if self._config.tiers.enabled:
            kv_pools, part = self._model.kv_pools, self.mesh.part
            settings = tier_settings(self._config, self._parts, part, kv_pools, host)
            self._tiers = TransferWorkers(
                {
                    pool: TransferWorker(kv_pools[pool], of_pool, on_result, self.fence)
                    for pool, of_pool in settings.items()
                }
            )
        return self._tiers

    def fence(self) -> Fence | None:
        """An event after all launched work; None when the work is finished already."""
        return None

    def launch(
        self, plan: StepPlan, *, at_layers: Callable[[], None] = lambda: None
    ) -> Pending | None:
        """Start a plan; gives a pending result on the rank that samples, None on other ranks.

        Args:
            plan: the plan.
            at_layers: called once before the layers, whose run needs little of the interpreter.
        """
        result = self.step(plan, at_layers=at_layers)
        return None if result is None else Done(result)

    def step(
        self, plan: StepPlan, *, at_layers: Callable[[], None] = lambda: None
    ) -> StepResult | None:
        """Run a plan; gives the result on the rank that samples, None on others. See `launch`."""
        started = time.perf_counter_ns()
        self.phase = "plan"
        self.mesh.watchdog.step = plan.step
        self._apply(plan)
        drawn = self._compute(plan, at_layers)
        if drawn is None:
            return None
        sampled = drawn.sampled
        tokens = sampled.tokens_R.cpu().numpy() if sampled is not None else np.empty(0, np.int32)
        return StepResult(
            step=plan.step,
            tokens=tokens,
            logprobs=logprobs_of(sampled),
            prompt_logprobs=drawn.prompt_logprobs,
            elapsed_us=(time.perf_counter_ns() - started) // 1000,
            dp_rank=plan.dp_rank,
            drafts=drawn.drafts,
            draft_us=self._drafts.elapsed_us if self._drafts is not None else 0,
        )

    def _apply(self, plan: StepPlan) -> None:
        """Apply the changes of a plan to sequences, images, experts and adapters."""
        self._table.apply(plan)
        if self._model.images is not None:
            self._model.images.apply(plan)
        if self._drafts is not None:
            self._drafts.drafter.apply(plan)
        if plan.placement_layer >= 0:
            self.phase = "placement of experts"
            self._model.place_experts(plan.placement_layer, plan.placement)
        if plan.adapters:
            assert self.adapter_store is not None, "only a group with slots changes adapters"
            self.adapter_store.apply(plan.adapters)

    def _compute(
        self, plan: StepPlan, at_layers: Callable[[], None] = lambda: None
    ) -> Drawn | None:
        """Run an applied plan; gives samples on the rank that samples, None on other ranks."""
        if not len(plan.slots):
            self.phase = "layers"
            at_layers()
            self._model.run_dummy_step()
            return Drawn() if self.mesh.samples else None
        tokens_T, batch = self._table.batch(plan)
        self.phase = "layers"
        part = self.mesh.part
        if part.first_stage:
            x_TH = self._embed(tokens_T, batch.adapters)
            if self._model.images is not None:
                self._model.images.fill(plan, x_TH)
        else:
            x_TW = torch.empty(
                (len(tokens_T), self._model.taps.width(self._hidden_size)),
                dtype=self._activation_dtype,
                device=self.mesh.device,
            )
            self.mesh.recv_hidden(x_TW)
            x_TH = self._model.taps.receive(x_TW)
        at_layers()
        x_TH = self._model.decoder(x_TH, batch)
        if not part.last_stage:
            self.mesh.send_hidden(self._model.taps.send(x_TH))
            return None
        self.phase = "sample"
        prompt_logprobs = self._prompt_logprobs(plan, x_TH, batch.adapters)
        step_T = tokens_T if self._drafts is None else tokens_T.clone()
        sampled, tokens_R = self._sample(plan, x_TH, batch.adapters)
        drafts = None
        if self._drafts is not None:
            self.phase = "draft"
            drafts = self._drafts.after(plan, step_T, batch, x_TH, tokens_R)
        return Drawn(sampled, prompt_logprobs, drafts) if self.mesh.samples else None

    def _embed(self, tokens_T: Tensor, adapters: AdapterRows | None = None) -> Tensor:
        """Embeddings in the activations' dtype, which the next stage expects to receive."""
        return self._model.embed(tokens_T, adapters).to(self._activation_dtype)

    @property
    def _activation_dtype(self) -> torch.dtype:
        on_cpu = self.mesh.device.type == "cpu"
        return torch.float32 if on_cpu else self._model.dtype

    def _sample(
        self, plan: StepPlan, x_TH: Tensor, adapters: AdapterRows | None
    ) -> tuple[Sampled | None, Tensor | None]:
        """Draw the step's tokens, and send the tokens to all ranks that embed.

        Returns the draws, on the rank that samples, and the tokens, on ranks that know them.
        """
        x_RH, num_rows = x_TH, len(x_TH)
        if not plan.same_rows:
            drawn_R = drawn_rows(plan)
            num_rows = len(drawn_R)
            if not num_rows:
                return None, None
            if num_rows < len(x_TH):  # selected on the host: a device mask would need a wait
                x_RH = x_TH.index_select(0, self._table.on_device(drawn_R))
                adapters = (
                    None if adapters is None else adapters.of_rows(drawn_R, self._table.on_device)
                )
        part_RV = self._model.logits(x_RH, adapters)
        logits_RV = self.mesh.gather_logits(part_RV, self._vocab_sizes)
        sampled = None
        if logits_RV is not None:
            sampled = self._ops.sample(logits_RV, self._table.sampling_rows(plan))
            tokens_R = sampled.tokens_R
        elif self.mesh.pp > 1:  # the leader sends tokens to the first stage
            return None, None
        else:
            tokens_R = torch.empty(num_rows, dtype=torch.int32, device=self.mesh.device)
        self.mesh.share_tokens(tokens_R)
        self._record(plan, tokens_R)
        return sampled, tokens_R

    def _record(self, plan: StepPlan, tokens_R: Tensor) -> None:
        """Record the drawn tokens for later steps."""
        self._table.record(plan, tokens_R.cpu().numpy())

    def _prompt_logprobs(
        self, plan: StepPlan, x_TH: Tensor, adapters: AdapterRows | None
    ) -> Logprobs | None:
        """Log-probabilities of the prompt tokens after the prompt rows of this step."""
        if not plan.prompt_rows.any():
            return None
        wanted_R = np.flatnonzero(np.repeat(plan.prompt_rows.astype(bool), plan.counts))
        x_RH = x_TH.index_select(0, self._table.on_device(wanted_R))
        next_R = self._table.on_device(plan.prompt_next.clip(min=0)).long()
        top = self._table.num_prompt_logprobs(plan)
        pages: list[tuple[Tensor, Tensor, Tensor]] = []
        for start in range(0, len(x_RH), PROMPT_LOGPROB_ROWS):
            page = slice(start, start + PROMPT_LOGPROB_ROWS)
            x, after = x_RH[page], next_R[page]
            rows = (
                None
                if adapters is None
                else adapters.of_rows(wanted_R[page], self._table.on_device)
            )
            logits_RV = self.mesh.gather_logits(self._model.logits(x, rows), self._vocab_sizes)
            if logits_RV is not None:
                logprobs_RV = logits_RV.log_softmax(dim=-1)
                best = logprobs_RV.topk(top, dim=-1)
                chosen = logprobs_RV.gather(1, after[:, None])[:, 0]
                pages.append((chosen, best.indices.int(), best.values))
        if not pages:
            return None
        columns = [torch.cat(column).cpu().numpy() for column in zip(*pages, strict=True)]
        return Logprobs(chosen=columns[0], top_tokens=columns[1], top=columns[2])
