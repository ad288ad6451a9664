"""`/v1/moderations` in the shape of the OpenAI API.

Knows the JSON of the API; knows nothing of guards' prompts.
"""

from __future__ import annotations

import secrets
from typing import Any, ClassVar

from fastapi import FastAPI, Request
from pydantic import Field

from arriero.router.guards.categories import NAMES, OPENAI, openai_categories
from arriero.router.guards.guards import Guards
from arriero.router.http import fields
from arriero.router.http.fields import Body
from arriero.router.http.messages import ChatMessage, ContentPart
from arriero.router.http.stream import until_disconnect
from arriero.router.http.translate import message_of
from arriero.router.proto.arriero.v1 import inference_pb2 as pb

Json = dict[str, Any]


class ModerationBody(Body):
    """`/v1/moderations`."""

    others: ClassVar = {"user": fields.hint("the key names the tenant")}
    input: str | list[str | ContentPart] = Field(
        description="A text; texts, each with a result of its own; or parts (text and images) of "
        "one message."
    )
    model: str | None = Field(
        None, description="Id of a guard model; absent for the gateway's default guard."
    )
    categories: dict[str, str] | None = Field(
        None,
        description="Categories to check, as code and text; absent for the guard's own. S1 to S14 "
        "may leave the text empty.",
    )


def add_moderations(app: FastAPI, guards: Guards) -> None:
    """Add the path to `app`."""

    @app.post("/v1/moderations")
    async def moderations(body: ModerationBody, request: Request) -> Json:
        """Judge texts and images with a guard model."""
        call, types = moderate_request(body)
        answer = await until_disconnect(request, guards.moderate(call, request.state.caller))
        checked = list(call.categories) or list(NAMES)
        return {
            "id": f"modr-{secrets.token_hex(12)}",
            "model": answer.model,
            "results": [
                result(verdict, kinds, checked)
                for verdict, kinds in zip(answer.verdicts, types, strict=True)
            ],
        }


def moderate_request(body: ModerationBody) -> tuple[pb.ModerateRequest, list[list[str]]]:
    """The call for a body, and the types of content ("text", "image") of each input.

    Raises:
        InvalidRequest: a part is neither text nor an image in a data URL.
    """
    given = body.input
    contents: list[str | list[ContentPart]] = []
    if isinstance(given, str):
        contents = [given]
    else:
        contents = [entry for entry in given if isinstance(entry, str)]
        parts = [entry for entry in given if isinstance(entry, ContentPart)]
        contents += [parts] if parts else []
    call = pb.ModerateRequest(model=body.model or "", categories=body.categories or {})
    types = []
    for content in contents:
        message = message_of(
            "input", ChatMessage.model_validate({"role": "user", "content": content})
        )
        call.inputs.add(messages=[message])
        kinds = {part.WhichOneof("part") for part in message.parts} or {"text"}
        types.append(sorted(str(kind) for kind in kinds))
    return call, types


def result(verdict: pb.SafetyVerdict, types: list[str], checked: list[str]) -> Json:
    """The result for an input.

    Args:
        verdict: of the guard.
        types: types of content of the input.
        checked: codes of the categories that the guard checks.
    """
    names = list(OPENAI)
    names += [name for code in checked for name in openai_categories(code)]
    names = list(dict.fromkeys(names))
    violated = {name for code in verdict.categories for name in openai_categories(code)}
    return {
        "flagged": verdict.flagged,
        "categories": {name: name in violated for name in names},
        "category_scores": {name: verdict.score if name in violated else 0.0 for name in names},
        "category_applied_input_types": {name: types if name in violated else [] for name in names},
        "score": verdict.score,
        "violations": list(verdict.categories),
    }
