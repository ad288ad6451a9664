"""Facts about model, gateway and load, as messages of VllmEngine. Sans-I/O.

A gateway counts as one worker: numbers are sums over the groups of the model. Knows views of
groups; knows nothing of connections.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from smg_grpc_proto import vllm_engine_pb2 as vllm
from smg_grpc_proto.generated import common_pb2 as common

from arriero.router.backend import GroupView
from arriero.router.text.text_model import TextModel

_INT32 = 2**31 - 1
SERVER_TYPE = "vllm-grpc"
"""The name by which callers know the protocol."""


def model_info(text: TextModel, views: Sequence[GroupView]) -> vllm.GetModelInfoResponse:
    """The model of a worker. The paths are the model's id: callers fetch the tokenizer by rpc."""
    card = views[0].card
    longest = max(view.card.max_model_len for view in views)
    pad = text.tokenizer.token_id(card.special_tokens.get("pad_token", ""))
    return vllm.GetModelInfoResponse(
        model_path=views[0].model,
        is_generation=True,
        max_context_length=longest,
        vocab_size=card.vocab_size,
        supports_vision=False,
        served_model_name=views[0].model,
        tokenizer_path=views[0].model,
        model_type="llama",
        eos_token_ids=card.eos_token_ids,
        pad_token_id=pad if pad is not None else card.eos_token_ids[0],
        bos_token_id=-1 if card.bos_token_id is None else card.bos_token_id,
        max_req_input_len=longest - 1,
        default_sampling_params_json=json.dumps(dict(card.generation_defaults)),
    )


def server_info(
    views: Sequence[GroupView], active: int, started_s: float, last_request_s: float
) -> vllm.GetServerInfoResponse:
    """The worker.

    Args:
        views: groups of the model.
        active: requests that run or wait in the gateway.
        started_s: start of the gateway, seconds since 1970.
        last_request_s: last request, seconds since 1970; 0 before the first.
    """
    card = views[0].card
    return vllm.GetServerInfoResponse(
        active_requests=active,
        last_receive_timestamp=last_request_s,
        uptime_seconds=time.time() - started_s,
        server_type=SERVER_TYPE,
        data_parallel_size=1,
        kv_cache_dtype="auto",
        block_size=card.block_size,
        model_dtype=f"torch.{card.numerics.partition(' ')[0] or 'bfloat16'}",
        max_num_seqs=sum(view.card.max_sequences for view in views),
        constrained_decoding_start="first_token",
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerLoad:
    """Load of a worker: sums over the groups of the model.

    Attributes:
        running, waiting: requests; `waiting` counts those that wait in the gateway too.
        waiting_tokens: prompt tokens of requests that have not begun.
        used_blocks, total_blocks: KV blocks.
        block_size: tokens in a block.
        throughput: output tokens per second.
        hit_rate: share of prompt tokens that came from the prefix cache.
        max_running: most sequences at once.
        silence_s: longest time that a group with work has finished no step; None without work.
    """

    running: int = 0
    waiting: int = 0
    waiting_tokens: int = 0
    used_blocks: int = 0
    total_blocks: int = 0
    block_size: int = 0
    throughput: float = 0.0
    hit_rate: float = 0.0
    max_running: int = 0
    silence_s: float | None = None

    @property
    def usage(self) -> float:
        """Share of the KV blocks in use, 0 to 1."""
        return self.used_blocks / self.total_blocks if self.total_blocks else 0.0


class LoadMeter:
    """Measures the load; holds the last number of output tokens for the rate."""

    def __init__(self) -> None:
        self._tokens = 0
        self._at_s = 0.0
        self._throughput = 0.0

    def measure(self, views: Sequence[GroupView], waiting: int, now_s: float) -> WorkerLoad:
        """The load now.

        Args:
            views: groups of the model.
            waiting: requests that wait in the gateway.
            now_s: monotonic time.
        """
        tokens = sum(view.stats.output_tokens for view in views)
        elapsed_s = now_s - self._at_s
        if elapsed_s >= 1.0:
            new = tokens - self._tokens
            # the number falls when a group is lost
            self._throughput = new / elapsed_s if self._at_s and new >= 0 else 0.0
            self._tokens, self._at_s = tokens, now_s
        prompt_tokens = sum(view.stats.prompt_tokens for view in views)
        cached_tokens = sum(view.stats.cached_tokens for view in views)
        silent = [view.load.stalled_s for view in views if view.load.num_running]
        return WorkerLoad(
            running=sum(view.load.num_running for view in views),
            waiting=waiting + sum(view.load.num_waiting for view in views),
            waiting_tokens=sum(view.load.prefill_tokens for view in views),
            used_blocks=sum(view.stats.blocks_used for view in views),
            total_blocks=sum(view.stats.blocks_total for view in views),
            block_size=max((view.card.block_size for view in views), default=0),
            throughput=self._throughput,
            hit_rate=cached_tokens / prompt_tokens if prompt_tokens else 0.0,
            max_running=sum(view.card.max_sequences for view in views),
            silence_s=max(silent, default=None),
        )


def loads_message(load: WorkerLoad, version: str) -> vllm.GetLoadsResponse:
    """The answer to GetLoads."""
    scheduler = vllm.SchedulerLoad(
        dp_rank=0,
        num_running_reqs=load.running,
        num_waiting_reqs=load.waiting,
        num_total_reqs=load.running + load.waiting,
        num_used_tokens=min(_INT32, load.used_blocks * load.block_size),
        max_total_num_tokens=min(_INT32, load.total_blocks * load.block_size),
        token_usage=load.usage,
        gen_throughput=load.throughput,
        cache_hit_rate=load.hit_rate,
        utilization=load.running / load.max_running if load.max_running else 0.0,
        max_running_requests=load.max_running,
        num_waiting_uncached_tokens=min(_INT32, load.waiting_tokens),
    )
    now = datetime.now(UTC).isoformat()
    return vllm.GetLoadsResponse(timestamp=now, version=version, dp_rank_count=1, loads=[scheduler])


def load_record(load: WorkerLoad, sample: int, *, load_only: bool) -> common.EngineLoad:
    """The load beside a batch of KV events.

    Args:
        load: the load.
        sample: number of the record in its stream.
        load_only: the batch has no events.
    """
    record = common.EngineLoad(
        running_requests=load.running,
        waiting_requests=load.waiting,
        waiting_uncached_tokens=load.waiting_tokens,
        token_usage=load.usage,
        active_token_usage=load.usage,
        gen_throughput=load.throughput,
        max_running_requests=load.max_running,
        sample=sample,
        load_only=load_only,
        engine_reports_steps=True,
        prefill_pending_tokens=load.waiting_tokens,
    )
    if load.silence_s is not None:
        record.engine_silence_ms = round(load.silence_s * 1000)
    if load_only:
        record.cache_hit_rate = load.hit_rate
        record.num_used_tokens = min(_INT32, load.used_blocks * load.block_size)
        record.max_total_num_tokens = min(_INT32, load.total_blocks * load.block_size)
    return record
