"""A request that passed all checks, and what follows from its fields.

Knows the texts and limits of a request; knows nothing of admission, groups and streams.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from arriero.router.backend import GroupView
from arriero.router.calls.conversation import ToolOffer
from arriero.router.calls.request_notes import RequestNotes
from arriero.router.proto.arriero.v1 import inference_pb2 as pb
from arriero.router.requests import OutputOptions, read_resumed
from arriero.router.tenants.admission_controller import Caller
from arriero.router.text.model_card import ModelCard
from arriero.router.text.text_model import TextModel
from arriero.shards.config.sampling_params import SamplingParams
from arriero.shards.images.request import RequestImage
from arriero.shards.kv.retention import CacheHint


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckedRequest:
    """A checked request.

    Attributes:
        caller: sender of the request.
        text: texts and tokens of the model.
        views: connected groups of the model or adapter, at least one.
        prompt: token ids.
        params: sampling parameters, with the seed set.
        options: form of the output.
        priority: wish of the caller; lower goes first.
        offer: tools on offer; None for none.
        messages: messages of a conversation; empty for a prompt.
        prompt_field: field of the message with the prompt, for errors.
        weights: digest of the weights that gave `received`; "" for any.
        received: tokens that the caller already has, by sample, and whether the sample ended.
        images: image files of the prompt.
        notes: facts that the messages do not carry.
        hint: tokens that will be needed again; None for no hint.
    """

    caller: Caller
    text: TextModel
    views: Sequence[GroupView]
    prompt: list[int]
    params: SamplingParams
    options: OutputOptions
    priority: int
    offer: ToolOffer | None = None
    messages: Sequence[pb.Message] = ()
    prompt_field: str = "prompt"
    weights: str = ""
    received: Mapping[int, tuple[list[int], bool]] = field(default_factory=dict)
    images: tuple[RequestImage, ...] = ()
    notes: RequestNotes
    hint: CacheHint | None = None

    @property
    def widest(self) -> GroupView:
        """The group with the longest context."""
        return max(self.views, key=lambda view: view.card.max_model_len)

    @property
    def adapter(self) -> str:
        """Digest of the adapter; "" for the base model."""
        adapter = self.views[0].adapter
        return "" if adapter is None else adapter.digest

    @property
    def cache_salt(self) -> bytes:
        """Salt of the keys of KV blocks, from the tenant and the request's `cache_salt`."""
        tenant, salt = self.caller.tenant, self.options.cache_salt
        if not salt:
            return tenant.cache_salt
        return hashlib.sha256(tenant.cache_salt + b"\0" + salt.encode()).digest()

    def prompt_text(self) -> str:
        """The prompt as text, special tokens included."""
        return self.text.tokenizer.decode(self.prompt, skip_special=False)


def received_before(
    request: pb.GenerateRequest | pb.ChatRequest, params: SamplingParams, card: ModelCard
) -> tuple[str, Mapping[int, tuple[list[int], bool]]]:
    """Digest and tokens of a request that goes on after tokens from elsewhere.

    Raises:
        InvalidRequest: the tokens do not fit the request.
    """
    if not request.HasField("resumed"):
        return "", {}
    return read_resumed(request.resumed, request.sampling, params, card)
