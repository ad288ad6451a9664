"""A tokenizer made on the spot, a policy in the engine's place, a gateway over real sockets."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from arriero.router.client.client import AsyncClient
from arriero.router.gateway import Gateway, GatewayConfig, GroupAddress
from arriero.router.http.console.routes import ReadCluster
from arriero.router.link.server import LinkServer
from arriero.router.text.model_card import ModelCard
from arriero.shards.engine.stats import EngineStats
from arriero.shards.engine.types import EngineRequest, SequenceOutput, TokenLogprobs
from arriero.shards.errors import Overloaded
from support.eventually import eventually_async

LLAMA_SPECIALS = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|python_tag|>",
]
CHATML_SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]

CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
    "{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)

CORPUS = [
    "the quick brown fox jumps over the lazy dog and runs away from the other foxes",
    "llamas carry packs over the mountains; el arriero los guía — así es la vida ñandú",
    "def main() -> None:\n    print('hello, world')\n",
    "数字 1234567890 と 日本語 🦙🦙 emoji 👩‍👩‍👧",
] * 4


def make_tokenizer(specials: list[str], *, bos: str | None = None) -> Tokenizer:
    """A tiny byte-level BPE in the manner of Llama 3's."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=specials,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    if bos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return tokenizer


def make_card(tokenizer: Tokenizer, template: str | None, **changes: object) -> ModelCard:
    specials = [t["content"] for t in json.loads(tokenizer.to_str())["added_tokens"]]
    values: dict[str, object] = {
        "model": "tiny",
        "group": "g0",
        "layout": "tp1",
        "digest": "d",
        "max_model_len": 512,
        "vocab_size": tokenizer.get_vocab_size(),
        "bos_token_id": 0,
        "eos_token_ids": (1,),
        "tokenizer_json": tokenizer.to_str().encode(),
        "chat_template": template,
        "bos_token": specials[0],
        "eos_token": specials[1],
    }
    return ModelCard(**(values | changes))  # type: ignore[arg-type]


Policy = Callable[[EngineRequest, int, int], int]


class FakeEngine:
    """The engine's methods over a policy: token `i` of sample `k` is `policy(request, k, i)`.

    Steps run in a thread of their own, as the real engine's do.
    """

    def __init__(self, policy: Policy, *, eos: int = 1, step_s: float = 0.0) -> None:
        self.policy = policy
        self.eos = eos
        self.step_s = step_s
        self.max_queued = 1000
        self.max_running: int | None = None
        self.running: dict[str, EngineRequest] = {}
        self.cancelled: list[str] = []
        self.submitted: list[EngineRequest] = []
        self.released: list[tuple[str, str]] = []
        self.steps = 0
        self.on_outputs: Callable[[list[SequenceOutput]], None] = lambda outputs: None
        self._positions: dict[tuple[str, int], int] = {}
        self._lock = threading.Condition()
        self._stopped = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def submit(self, request: EngineRequest) -> None:
        with self._lock:
            if len(self.running) >= self.max_queued:
                raise Overloaded(f"{self.max_queued} requests wait already", 3.2)
            self.submitted.append(request)
            self.running[request.request_id] = request
            for index in range(request.params.n):
                self._positions[request.request_id, index] = len(request.resumed)
            self._lock.notify()

    def cancel(self, request_id: str) -> None:
        with self._lock:
            if self.running.pop(request_id, None) is not None:
                self.cancelled.append(request_id)
                for key in [key for key in self._positions if key[0] == request_id]:
                    del self._positions[key]

    def release(self, tenant: str, session: str) -> None:
        self.released.append((tenant, session))

    def stats(self) -> EngineStats:
        return EngineStats(num_running=len(self.running), steps=self.steps)

    def close(self) -> None:
        with self._lock:
            self._stopped = True
            self._lock.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._lock:
                while not self.running and not self._stopped:
                    self._lock.wait()
                if self._stopped:
                    return
                outputs = [self._step(*key) for key in list(self._positions)[: self.max_running]]
                self.steps += 1
            self.on_outputs(outputs)
            time.sleep(self.step_s)

    def _step(self, request_id: str, index: int) -> SequenceOutput:
        request = self.running[request_id]
        params = request.params
        position = self._positions[request_id, index]
        token = self.policy(request, index, position)
        reason = None
        if token in params.stop_token_ids or (token == self.eos and not params.ignore_eos):
            reason = "stop"
        elif position + 1 >= (params.max_tokens or 0):
            reason = "length"
        self._positions[request_id, index] += 1
        if reason is not None:
            del self._positions[request_id, index]
            if not any(key[0] == request_id for key in self._positions):
                del self.running[request_id]
        row = TokenLogprobs(token=token, logprob=-0.5, top=((token, -0.5), (2, -1.5)))
        first = position == 0
        return SequenceOutput(
            request_id=request_id,
            index=index,
            tokens=(token,),
            logprobs=(row,) if params.logprobs is not None else None,
            prompt_logprobs=(row,) * (len(request.prompt) - 1)
            if first and index == 0 and params.prompt_logprobs is not None
            else None,
            finish_reason=reason,
            stop_token=token if reason == "stop" else None,
            num_cached=16 if first and len(request.prompt) > 16 else 0,
        )


@dataclass
class Stack:
    """A gateway, one group behind it, and a client."""

    gateway: Gateway
    port: int
    engine: FakeEngine
    link: LinkServer
    link_address: str
    client: AsyncClient

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"


@asynccontextmanager
async def serve(
    card: ModelCard,
    policy: Policy,
    *,
    step_s: float = 0.0,
    config: GatewayConfig | None = None,
    read_cluster: ReadCluster | None = None,
) -> AsyncIterator[Stack]:
    engine = FakeEngine(policy, eos=card.eos_token_ids[0], step_s=step_s)
    link = LinkServer(engine, card)
    engine.on_outputs = link.on_outputs
    link_address = await link.start()
    gateway = Gateway(config or GatewayConfig(lost_s=0.5), read_cluster=read_cluster)
    port = await gateway.start()
    await gateway.set_groups([GroupAddress(card.group, card.model, link_address)])
    client = AsyncClient(f"127.0.0.1:{port}", timeout_s=60)
    await eventually_async(lambda: gateway.ready, 20)
    try:
        yield Stack(gateway, port, engine, link, link_address, client)
    finally:
        await client.close()
        await gateway.stop(0.5)
        await link.stop(0.5)
        engine.close()


def echo(request: EngineRequest, index: int, position: int) -> int:
    """Says the prompt again, then ends."""
    return request.prompt[position] if position < len(request.prompt) else 1


def endless(request: EngineRequest, index: int, position: int) -> int:
    """Never ends by itself."""
    return 50 + (position * 7 + index * 3 + len(request.prompt)) % 200
