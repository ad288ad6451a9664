"""Real groups for tests: engine and slices, in process or in processes of their own."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from arriero.shards.checkpoint.reader import Checkpoint
from arriero.shards.config.group import GroupConfig
from arriero.shards.config.sampling_params import SamplingParams
from arriero.shards.engine.config import engine_config
from arriero.shards.engine.engine import Engine
from arriero.shards.engine.speculation.proposer import ProposerFactory
from arriero.shards.engine.types import EngineRequest, SequenceOutput, TokenLogprobs
from arriero.shards.images.request import RequestImage
from arriero.shards.kv.blocks import CacheListener
from arriero.shards.kv.limits import PeerBlocks
from arriero.shards.kv.transfers import Pool
from arriero.shards.layout.resolve import resolve
from arriero.shards.leader.local_executor import LocalExecutor

if TYPE_CHECKING:
    from arriero.shards.leader.remote_executor import RemoteExecutor


@dataclass
class Answer:
    """All that came for one sample of a request."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: str | None = None
    num_cached: int = 0
    error: str | None = None
    steps: list[tuple[int, ...]] = field(default_factory=list, compare=False)
    """The tokens of each output: a step with right drafts gives several."""


class Group:
    """A running engine that gathers outputs by request."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.answers: dict[tuple[str, int], Answer] = {}
        self._due: dict[str, int] = {}
        self._changed = threading.Condition()
        self._count = 0

    def take(self, outputs: list[SequenceOutput]) -> None:
        with self._changed:
            for out in outputs:
                answer = self.answers.setdefault((out.request_id, out.index), Answer())
                answer.tokens += out.tokens
                answer.steps.append(out.tokens)
                answer.logprobs += out.logprobs or ()
                answer.prompt_logprobs = answer.prompt_logprobs or out.prompt_logprobs or ()
                answer.num_cached = answer.num_cached or out.num_cached
                answer.error = answer.error or out.error
                if out.finish_reason is not None:
                    assert answer.finish_reason is None, f"{out.request_id} ended twice"
                    answer.finish_reason = out.finish_reason
                    self._due[out.request_id] -= 1
            self._changed.notify_all()

    def submit(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        priority: int = 0,
        images: tuple[RequestImage, ...] = (),
        peer: Mapping[Pool, PeerBlocks] | None = None,
        adapter: str = "",
    ) -> str:
        with self._changed:
            self._count += 1
            name = f"r{self._count}"
            self._due[name] = params.n
        self.engine.submit(
            EngineRequest(
                request_id=name,
                prompt=tuple(prompt),
                params=params,
                priority=priority,
                images=images,
                peer=peer or {},
                adapter=adapter,
            )
        )
        return name

    def wait(self, names: Sequence[str], timeout_s: float = 240) -> list[Answer]:
        """Answers (sample 0) of the requests, once all samples are done."""
        with self._changed:
            done = self._changed.wait_for(
                lambda: all(self._due[name] == 0 for name in names), timeout_s
            )
        late = [name for name in names if self._due[name]]
        assert done, f"requests {late} did not end; stats {self.engine.stats()}"
        return [self.answers[name, 0] for name in names]

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams]
    ) -> list[Answer]:
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else params
        return self.wait([self.submit(p, one) for p, one in zip(prompts, each, strict=True)])


@contextmanager
def running(
    config: GroupConfig,
    *,
    spawn: bool | None = None,
    on_event: CacheListener | None = None,
    proposers: ProposerFactory | None = None,
) -> Iterator[Group]:
    """A group's engine over its slices; one slice runs in process unless `spawn`."""
    checkpoint = Checkpoint.open(config.model_path)
    config = resolve(config, checkpoint.config)
    spawned = config.world_size > 1 if spawn is None else spawn
    executor: RemoteExecutor | LocalExecutor
    if spawned:  # a bare GPU machine lacks ZeroMQ, and has one slice
        from support.processes import spawn_group

        executor = spawn_group(config)
    else:
        executor = LocalExecutor(config)
    try:
        if not isinstance(executor, LocalExecutor):
            executor.wait_ready(120)
        limits = engine_config(config, checkpoint.config, checkpoint.digest)
        group: Group | None = None
        engine = Engine(
            limits,
            executor,
            lambda outputs: group.take(outputs),
            on_event=on_event,
            proposers=proposers,
        )
        group = Group(engine)
        engine.start()
        try:
            yield group
        finally:
            engine.stop()
    finally:
        executor.close()
