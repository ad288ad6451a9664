"""The message that describes a served model to clients.

Knows model cards and views of groups; knows nothing of requests.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from arriero.router.backend import GroupView
from arriero.router.proto.arriero.v1 import inference_pb2 as pb
from arriero.router.text.guard_template import guard_kind
from arriero.router.text.model_card import ModelCard


def model_message(name: str, views: Sequence[GroupView]) -> pb.Model:
    """Describe a model by the cards and loads of its groups."""
    card: ModelCard = views[0].card
    adapter = views[0].adapter
    return pb.Model(
        id=name,
        digest=card.digest if adapter is None else adapter.digest,
        parent="" if adapter is None else views[0].model,
        max_model_len=max(view.card.max_model_len for view in views),
        vocab_size=card.vocab_size,
        eos_token_ids=card.eos_token_ids,
        has_chat_template=card.chat_template is not None,
        reads_images=card.image_tile > 0,
        guard=guard_kind(card.guard, card.chat_template),
        created=card.created,
        groups=[
            pb.Group(
                id=view.group_id,
                layout=view.card.layout,
                running=view.load.num_running,
                waiting=view.load.num_waiting,
            )
            for view in views
        ],
        generation_defaults=_sampling_message(card.generation_defaults),
    )


def _sampling_message(defaults: Mapping[str, float]) -> pb.SamplingParams:
    """Generation defaults of a checkpoint as a message."""
    message = pb.SamplingParams()
    for name, value in defaults.items():
        setattr(message, name, int(value) if name == "top_k" else float(value))
    return message
