"""A guard's verdicts as JSON, for every API.

Knows the messages; knows nothing of policies.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from arriero.router.proto.arriero.v1 import inference_pb2 as pb


def verdicts(judged: Iterable[pb.SafetyVerdict]) -> dict[str, Any]:
    """The field `safety` of an answer; empty without verdicts."""
    entries = []
    for verdict in judged:
        entry: dict[str, Any] = {"subject": verdict.subject}
        if verdict.subject == "output":
            entry["index"] = verdict.index
        entry |= {
            "flagged": verdict.flagged,
            "categories": list(verdict.categories),
            "score": verdict.score,
        }
        entries.append(entry)
    return {"safety": entries} if entries else {}


def on_last(chunks: list[dict[str, Any]], message: pb.GenerateResponse) -> list[dict[str, Any]]:
    """The chunks of a message, the last with the message's verdicts."""
    if chunks and message.safety:
        chunks[-1] |= verdicts(message.safety)
    return chunks


def of_messages(messages: Sequence[tuple[int, pb.GenerateResponse]]) -> dict[str, Any]:
    """The field `safety` of a whole answer."""
    return verdicts(verdict for _, message in messages for verdict in message.safety)
