"""The prompt of a request as token ids.

Knows the request messages and a model's tokenizer; knows nothing of streams or groups.
"""

from __future__ import annotations

from arriero.router.calls.conversation import (
    ToolOffer,
    read_documents,
    read_messages,
    read_variables,
)
from arriero.router.proto.arriero.v1 import inference_pb2 as pb
from arriero.router.text.images import PromptImage
from arriero.router.text.text_model import TextModel
from arriero.shards.errors import InvalidRequest


async def encode_text(
    text: TextModel, request: pb.GenerateRequest | pb.TokenizeRequest
) -> list[int]:
    """Token ids of the text in a request.

    Raises:
        InvalidRequest: the text is empty.
    """
    if not request.text:
        raise InvalidRequest("prompt", "the prompt is empty; give `text` or `token_ids`")
    add = request.add_special_tokens if request.HasField("add_special_tokens") else True
    return await text.encode(request.text, add_special_tokens=add, trusted=request.parse_special)


async def encode_conversation(
    text: TextModel, request: pb.ChatRequest | pb.Conversation, offer: ToolOffer | None
) -> tuple[list[int], list[PromptImage]]:
    """Token ids of a conversation in the model's chat template, and its images in order.

    Raises:
        InvalidRequest: a message, image, tool, document or variable breaks a limit.
    """
    messages, image_files = read_messages(request.messages)
    images = await text.images.lay_out(image_files)
    continues = request.continue_final_message
    is_set = request.HasField("add_generation_prompt")
    tokens = await text.encode_chat(
        messages,
        add_generation_prompt=request.add_generation_prompt if is_set else not continues,
        continue_final_message=continues,
        tools=() if offer is None else offer.tools,
        documents=read_documents(request.documents),
        variables=read_variables(request.template_variables),
        images=images,
    )
    return tokens, images
