"""The step of a rank on CUDA, without waits for the device; `HOST_WAITS` names the exceptions.

A step of plain decodes, with drafted tokens or without, replays a graph if the backend can be
captured; other steps run op by op.
Sampled tokens stay on the device for later steps and are copied to the host meanwhile: `launch`
gives a `Pending`, and the caller waits for the result after the launch of the next step.

A graph has a stage's collectives inside, except the hand-over of activations between stages, which
comes before and after the replay. NCCL asks that all ranks of a collective replay graphs of one
capture, or none does. So with data-parallel attention the leader says when all ranks decode, and
all replay the layers for the same batch size, ranks without tokens on padding; each rank then draws
as its requests ask. Rows travel to experts in blocks of a fixed size. In other steps each layer
with experts needs numbers of rows on the host. Knows graphs and copies; knows nothing of sockets
or scheduling.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from arriero.kernels.flat_batch import FlatBatch
from arriero.kernels.lora import AdapterRows
from arriero.kernels.sampling_rows import Sampled
from arriero.shards.checkpoint.reader import Checkpoint
from arriero.shards.config.group import GroupConfig
from arriero.shards.models.loader import Progress
from arriero.shards.protocol.step_plan import StepPlan, StepResult
from arriero.shards.worker.cuda.capability import check_capability
from arriero.shards.worker.cuda.copied import Copied, OnHost
from arriero.shards.worker.cuda.device import CudaDevice, Device, Event
from arriero.shards.worker.cuda.graphs import (
    DecodeInputs,
    GraphKey,
    GraphRunner,
    buckets_up_to,
    graph_rows,
)
from arriero.shards.worker.cuda.rehearsal import draw_all_ways, padding_prompt, prompt_sizes
from arriero.shards.worker.cuda.sequence_table import DeviceSequenceTable
from arriero.shards.worker.drawn_rows import has_drafts
from arriero.shards.worker.runner import Runner
from arriero.shards.worker.step_results import Drawn

_log = logging.getLogger(__name__)
HOST_WAITS = {
    "shards/collectives/expert_parallel.py:_counts_on_host": "once for each layer with experts and "
    "data-parallel attention in a step in which not all ranks decode: the all-to-all takes its "
    "numbers of rows from the host",
    "shards/models/llama4_vision.py:__call__": "once for each new image: its pixels come from "
    "pageable memory, and the tower takes far longer",
    "shards/worker/runner.py:_prompt_logprobs": "once for each step with log-probabilities of "
    "prompt tokens, which few requests ask for",
}
"""The only places of a step where the host waits for the device, and why."""
MOST_PADDED = 256
"""Most tokens of a data-parallel rank whose rows travel in blocks of a fixed size: a block has room
for all rows of a rank, so that R ranks send R times the rows that an exact exchange sends."""
_MEMORY_SLACK = 1.02
_MEMORY_SLACK_BYTES = 64 << 20


class CudaRunner(Runner):
    """A rank of a replica group on CUDA."""

    table_type = DeviceSequenceTable
    spare_slots = 1
    spare_blocks = 1  # the last block, the scratch block for the writes of padding rows

    def __init__(
        self,
        config: GroupConfig,
        rank: int,
        *,
        progress: Progress = lambda done, total: None,
        device: Device | None = None,
    ) -> None:
        """Load the weights.

        Args:
            config: resolved configuration of the group.
            rank: stage * tp + tp rank.
            progress: called while weights load.
            device: device for tests; None for the CUDA device.
        """
        super().__init__(config, rank, progress=progress)
        assert config.num_blocks is not None and config.max_model_len is not None, "unresolved"
        assert isinstance(self._table, DeviceSequenceTable), "of this runner's table type"
        where = self.mesh.device
        self._slots: DeviceSequenceTable = self._table
        self._max_context, self._block_size = config.max_model_len, config.block_size
        self._device = CudaDevice(where) if device is None else device
        self._check_memory()
        self._slots.keep_tables(config.num_blocks)
        most = graph_rows(config)
        self._inputs = DecodeInputs(
            self._device,
            where,
            most=most,
            block_size=config.block_size,
            scratch_block=config.num_blocks,
            scratch_slot=self._slots.scratch_slot,
            max_local_blocks=self._slots.max_local_blocks,
            local_scratch_block=config.num_local_blocks or 0,
        )
        self._drawn_S = torch.zeros(most, dtype=torch.int32, device=where)
        # activations of a graph's rows, from the stage before and for the stage after
        shape, dtype = (most, self._hidden_size), self._activation_dtype
        self._received_SH = torch.zeros(shape, dtype=dtype, device=where)
        self._passed_SH = torch.zeros(shape, dtype=dtype, device=where)
        self._graphs = self._new_graphs()

    def _new_graphs(self) -> GraphRunner | None:
        """Room for graphs; None where steps run op by op."""
        config = self._config
        # a drafter reads each step's tokens on the host, and activations outside of graphs
        if self._ops.capturable and not config.speculation.in_slices:
            most = len(self._drawn_S)
            most = most if config.dp == 1 else min(most, MOST_PADDED)
            return GraphRunner(self._device, buckets_up_to(most))
        return None

    def release(self, *, keep_on_host: bool = True) -> None:
        """Give memory back, that of the graphs included: graphs hold addresses of weights."""
        self._graphs = None
        super().release(keep_on_host=keep_on_host)

    def _check_device(self, checkpoint: Checkpoint) -> None:
        if self._config.device == "cuda":
            capability = torch.cuda.get_device_capability()
            check_capability(self._config, checkpoint.scheme, capability)

    def close(self) -> None:
        """Free the graphs, and stop background threads.

        NCCL does not end a communicator while a graph with one of its collectives exists.
        """
        self._graphs = None
        super().close()

    def fence(self) -> Event:
        """An event after all launched work."""
        return self._device.mark()

    def step(
        self, plan: StepPlan, *, at_layers: Callable[[], None] = lambda: None
    ) -> StepResult | None:
        """Run a plan and wait for the result; see `launch`."""
        pending = self.launch(plan, at_layers=at_layers)
        return None if pending is None else pending.wait()

    def launch(
        self, plan: StepPlan, *, at_layers: Callable[[], None] = lambda: None
    ) -> Copied | None:
        """Queue a plan; gives a pending result on the rank that samples, None on other ranks."""
        at_layers()
        started = time.perf_counter_ns()
        self.phase = "plan"
        self.mesh.watchdog.step = plan.step
        self._apply(plan)
        graphs, bucket = self._graphs, self._bucket(plan)
        if graphs is None or not bucket or not (self._exchanges or self._slots.is_plain(plan)):
            self._model.pad_exchange(0)
            drawn = self._compute(plan)
        elif not len(plan.slots):  # other data-parallel ranks have tokens, for experts here too
            self._capture(graphs, bucket, None)
            self._inputs.fill_padding(bucket)
            self._replay(graphs, (bucket, None))
            drawn = Drawn() if self.mesh.samples else None
        else:
            drawn = self._decode(plan, graphs, bucket)
        if drawn is None:
            return None
        copies = None if drawn.sampled is None else self._to_host(drawn.sampled)
        copied = Copied(
            plan, copies, drawn.prompt_logprobs, self._device.mark(), started, drawn.drafts
        )
        self._slots.advance_grammars(plan, lambda: copied.wait().tokens)
        return copied

    def _record(self, plan: StepPlan, tokens_R: Tensor) -> None:
        self._slots.record_on_device(plan, tokens_R)

    @property
    def _exchanges(self) -> bool:
        """Whether rows travel to experts on other data-parallel ranks."""
        return self._config.dp > 1

    def _bucket(self, plan: StepPlan) -> int:
        """Rows of the graph for a plan, the same on all data-parallel ranks; 0 for no graph."""
        graphs = self._graphs
        num_tokens = plan.decodes if self._exchanges else len(plan.tokens)
        if graphs is None or not num_tokens or num_tokens > graphs.buckets[-1]:
            return 0
        return graphs.bucket(num_tokens)

    def _replay(self, graphs: GraphRunner, key: GraphKey) -> None:
        """Replay a captured graph; see `GraphKey`."""
        self.phase = "layers"
        if self.mesh.tp == 1 and key[1] is not None:
            graphs.replay(key)
            return
        with self.mesh.watchdog.watch("collectives of a captured decode step"):
            graphs.replay(key)

    def _decode(self, plan: StepPlan, graphs: GraphRunner, bucket: int) -> Drawn | None:
        """Replay the graphs of a plan of decodes; None on a rank that does not sample."""
        batch = self._slots.decode_batch(plan)
        count, part = len(batch.tokens), self.mesh.part
        keys: list[GraphKey] = [(bucket, not batch.temperature.any())]
        if self._exchanges:
            plain = part.last_stage and self._slots.is_plain(plan)
            keys = [(bucket, None), *keys] if plain else [(bucket, None)]
        for key in keys:
            self._capture(graphs, *key)  # before `fill`, since a capture runs on padding
        self._inputs.fill(batch, bucket)
        if not part.first_stage:
            self.mesh.recv_hidden(self._received_SH[:count])
        for key in keys:
            self._replay(graphs, key)
        if part.last_stage and keys == [(bucket, None)]:
            self.phase = "sample"
            sampled, _ = self._sample(plan, self._passed_SH[:count], None)
            return Drawn(sampled) if self.mesh.samples else None
        if not part.last_stage:  # a copy, since the next replay may come before the send
            self.mesh.send_hidden(self._passed_SH[:count].clone())
        elif has_drafts(plan) and (self.mesh.samples or self.mesh.pp == 1):
            # a graph records each row as its slot's last token, in any order
            self._record(plan, self._drawn_S[:count])
        return Drawn(Sampled(tokens_R=self._drawn_S[:count])) if self.mesh.samples else None

    def warm_up(self) -> None:
        """Compile all kernels, and capture the graphs of all batch sizes: serving does neither.

        The largest graph comes first, since smaller graphs reuse its memory. Every rank of a stage
        does the same in the same order, as the collectives require.
        """
        if not self._ops.capturable:
            return  # plain torch: nothing is compiled
        if self._graphs is None:  # after `release`
            self._graphs = self._new_graphs()
        self.phase = "compile"
        self._model.pad_exchange(0)
        for num_tokens in prompt_sizes(self._config.max_batch_tokens):
            self._run_padding_prompt(num_tokens, num_tokens)
        self._run_padding_prompt(2, self._max_context)  # few queries over the longest context
        kinds: tuple[bool | None, ...] = (False, True)
        if self._exchanges:
            kinds = (None, False, True) if self.mesh.part.last_stage else (None,)
        for bucket in (1,) if self._graphs is None else reversed(self._graphs.buckets):
            for all_greedy in kinds:
                if self._graphs is not None:
                    self._capture(self._graphs, bucket, all_greedy)
                    continue
                self._inputs.fill_padding(bucket)
                self._graph_work(bucket, all_greedy)()
        if self.mesh.samples:
            plain = self._inputs.sampling_rows(1, all_greedy=False)
            draw_all_ways(self._ops, plain, sum(self._vocab_sizes))
        if self._drafts is not None:
            sizes = prompt_sizes(self._config.max_batch_tokens)
            self._drafts.drafter.warm_up(sizes, self._hidden_size, self._activation_dtype)
        self.phase = "loaded"

    def _run_padding_prompt(self, num_tokens: int, context_bound: int) -> None:
        """Run a prompt in the scratch blocks through this stage's layers."""
        inputs = self._inputs
        prompt = partial(
            padding_prompt,
            num_tokens,
            rope=self._slots.rope,
            max_context=self._max_context,
            context_bound=context_bound,
            block_size=self._block_size,
            device=self.mesh.device,
        )
        batch = prompt(scratch_block=inputs.scratch_block)
        if inputs.max_local_blocks:
            batch = replace(batch, local=prompt(scratch_block=inputs.local_scratch_block))
        x_TH = self._received_SH.new_zeros(num_tokens, self._hidden_size)
        if self.mesh.part.first_stage:
            x_TH = self._embed(torch.zeros_like(batch.positions_T))
        if self._model.adapters is not None:
            rows = AdapterRows.of(np.zeros(num_tokens, np.int32), self._slots.on_device)
            if self.mesh.part.first_stage:
                self._embed(torch.zeros_like(batch.positions_T), rows)
            if self.mesh.part.last_stage:
                self._model.logits(x_TH, rows)
            local = None if batch.local is None else replace(batch.local, adapters=rows)
            self._model.decoder(x_TH.clone(), replace(batch, adapters=rows, local=local))
        self._model.decoder(x_TH, batch)

    def _capture(self, graphs: GraphRunner, bucket: int, all_greedy: bool | None) -> None:
        """Capture a graph unless it exists; for `all_greedy` see `GraphKey`."""
        if graphs.has((bucket, all_greedy)):
            return
        self.phase = "capture"
        self._inputs.fill_padding(bucket)
        self._model.pad_exchange(bucket if self._exchanges else 0)
        watchdog = self.mesh.watchdog
        watchdog.marking = False
        try:
            graphs.capture((bucket, all_greedy), self._graph_work(bucket, all_greedy))
        finally:
            watchdog.marking = True

    def _graph_work(self, bucket: int, all_greedy: bool | None) -> Callable[[], None]:
        """Work of a graph, over tensors with fixed addresses; see `GraphKey`."""
        layers, passed_SH = self._layers_work(bucket), self._passed_SH[:bucket]

        def work() -> None:
            if all_greedy is None or not self.mesh.part.last_stage:
                passed_SH.copy_(layers())
            else:
                self._draw(passed_SH if self._exchanges else layers(), all_greedy)

        return work

    def _layers_work(self, bucket: int) -> Callable[[], Tensor]:
        """A stage's layers in a decode step of `_inputs`, or after stage 0 of `_received_SH`."""
        inputs, table, model, part = self._inputs, self._slots, self._model, self.mesh.part

        def work() -> Tensor:
            slot_S = inputs.ints("slots", bucket)
            positions_S = inputs.ints("positions", bucket)
            cos_SD, sin_SD = table.rope.at(positions_S)
            batch = FlatBatch(
                positions_T=positions_S,
                query_start_S1=inputs.starts_S1[: bucket + 1],
                context_S=inputs.ints("contexts", bucket),
                block_table_SB=table.tables.rows(slot_S),
                slots_T=inputs.ints("cache_slots", bucket),
                cos_TD=cos_SD,
                sin_TD=sin_SD,
                max_query=1,
                max_context=self._max_context,
            )
            if inputs.max_local_blocks:
                local = replace(
                    batch,
                    positions_T=inputs.ints("local_positions", bucket),
                    context_S=inputs.ints("local_contexts", bucket),
                    block_table_SB=inputs.local_table(bucket),
                    slots_T=inputs.ints("local_cache_slots", bucket),
                    max_context=inputs.max_local_blocks * self._block_size,
                )
                batch = replace(batch, local=local)
            x_SH = self._received_SH[:bucket]
            if part.first_stage:
                x_SH = self._embed(table.resolve(inputs.ints("tokens", bucket), slot_S))
            return model.decoder(x_SH, batch)

        return work

    def _draw(self, x_SH: Tensor, all_greedy: bool) -> None:
        """Draw a token for each row into `_drawn_S`, on all ranks of a single stage.

        Writes the last tokens of the slots too.
        """
        bucket = len(x_SH)
        drawn_S, slot_S = self._drawn_S[:bucket], self._inputs.ints("slots", bucket)
        rows = self._inputs.sampling_rows(bucket, all_greedy=all_greedy)
        logits_SV = self.mesh.gather_logits(self._model.logits(x_SH), self._vocab_sizes)
        if logits_SV is not None:
            drawn_S.copy_(self._ops.sample(logits_SV, rows).tokens_R)
        self.mesh.share_tokens(drawn_S)
        self._slots.last_S.index_copy_(0, slot_S.long(), drawn_S.clamp(min=0))

    def _to_host(self, sampled: Sampled) -> OnHost:
        def copy(tensor: Tensor) -> Tensor:
            host = self._device.host(tuple(tensor.shape), tensor.dtype)
            return host.copy_(tensor, non_blocking=True)

        def copy_some(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else copy(tensor)

        return OnHost(
            copy(sampled.tokens_R),
            copy_some(sampled.logprobs_R),
            copy_some(sampled.top_tokens_RN),
            copy_some(sampled.top_logprobs_RN),
        )

    def _check_memory(self) -> None:
        """Warn when the device holds more bytes than planned."""
        planned, allocated = self.weights_nbytes + self.kv_nbytes, self._device.allocated()
        if allocated > planned * _MEMORY_SLACK + _MEMORY_SLACK_BYTES:
            _log.warning(
                "the device holds %d bytes after loading; weights and KV cache have %d bytes",
                allocated,
                planned,
            )
