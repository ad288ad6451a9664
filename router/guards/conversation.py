"""A conversation as a guard reads it: turns of User and Agent, the last of which is judged.

Guards' templates accept turns that alternate and begin with the user. Knows the request messages;
knows nothing of templates and verdicts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from arriero.router.proto.arriero.v1 import inference_pb2 as pb

Role = Literal["user", "assistant"]
_SYSTEM = frozenset({"system", "developer"})


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """A turn of a conversation.

    Attributes:
        role: "user" or "assistant" (the agent).
        text: text of the turn.
        images: images of the turn, in order; shown before the text.
    """

    role: Role
    text: str
    images: tuple[pb.Image, ...] = ()


def read_turns(messages: Iterable[pb.Message]) -> tuple[Turn, ...]:
    """The turns of a request's messages.

    System messages are the operator's and are left out; results of tools count as the user's words,
    since they come from outside the model.
    """
    turns = []
    for message in messages:
        if message.role in _SYSTEM:
            continue
        role: Role = "assistant" if message.role == "assistant" else "user"
        texts = [_text(message)]
        texts += [f"{call.name}({call.arguments})" for call in message.tool_calls]
        images = tuple(part.image for part in message.parts if part.HasField("image"))
        turns.append(Turn(role=role, text="\n".join(filter(None, texts)), images=images))
    return alternating(turns)


def outside_texts(messages: Iterable[pb.Message]) -> tuple[str, ...]:
    """The texts that come from outside, one for each message: of users and results of tools.

    System messages are the operator's and an assistant's messages the model's own; both are left
    out, and messages without text.
    """
    inside = _SYSTEM | {"assistant"}
    texts = (_text(message) for message in messages if message.role not in inside)
    return tuple(text for text in texts if text.strip())


def _text(message: pb.Message) -> str:
    """The text of a message, its parts on lines of their own."""
    texts = [message.content, *(part.text for part in message.parts)]
    return "\n".join(filter(None, texts))


def alternating(turns: Sequence[Turn]) -> tuple[Turn, ...]:
    """Turns that alternate and begin with the user: neighbours of one role become one turn.

    Agent turns before the first user turn follow an empty user turn.
    """
    joined: list[Turn] = []
    for turn in turns:
        if not joined and turn.role == "assistant":
            joined.append(Turn(role="user", text=""))
        if joined and joined[-1].role == turn.role:
            last = joined[-1]
            text = "\n\n".join(filter(None, (last.text, turn.text)))
            joined[-1] = replace(last, text=text, images=(*last.images, *turn.images))
        else:
            joined.append(turn)
    return tuple(joined)


def with_output(turns: Sequence[Turn], text: str) -> tuple[Turn, ...]:
    """The conversation with the agent's output at the end.

    Output that continues the last turn of the agent belongs to this turn.
    """
    if turns and turns[-1].role == "assistant":
        return (*turns[:-1], replace(turns[-1], text=turns[-1].text + text))
    return alternating((*turns, Turn(role="assistant", text=text)))
