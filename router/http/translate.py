"""Translates the API's JSON to calls of `arriero.v1.Inference`.

Knows the names of fields on both sides; knows nothing of limits, which the calls check.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from google.protobuf.message import Message

from arriero.router.http import cache_hints
from arriero.router.http.messages import (
    THOUGHT_PARTS,
    AllowedTools,
    ChatMessage,
    ContentPart,
    FunctionCall,
    NamedTool,
    Tool,
)
from arriero.router.http.request_schemas import ChatBody, CompletionBody, Sampling, TokenizeBody
from arriero.router.proto.arriero.v1 import inference_pb2 as pb
from arriero.shards.errors import InvalidRequest

_SAMPLING = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "banned_token_ids",
    "n",
    "min_tokens",
    "stop_token_ids",
    "ignore_eos",
)
_TOOL_CHOICES = {
    "auto": pb.TOOL_CHOICE_UNSPECIFIED,
    "none": pb.TOOL_CHOICE_NONE,
    "required": pb.TOOL_CHOICE_REQUIRED,
}
_OPTIONS = ("include_stop", "skip_special_tokens", "priority", "cache_salt")
_MAX_INT32 = 2**31 - 1
"""Largest `max_tokens` and `top_k` of the messages; above every context and vocabulary."""


def chat_request(body: ChatBody) -> pb.ChatRequest:
    """The call for a chat body.

    Raises:
        InvalidRequest: a message cannot hold a value, or a content part is not supported.
    """
    request = pb.ChatRequest(model=_text("model", body.model), messages=_messages(body.messages))
    tools = body.own_tools
    choice = body.tool_choice
    if isinstance(choice, AllowedTools):
        tools = _allowed(tools, choice)
        choice = choice.allowed_tools.mode
    request.tools.extend(_tools(tools))
    if isinstance(choice, NamedTool):
        request.tool_choice = pb.TOOL_CHOICE_NAMED
        request.tool_name = _text("tool_choice", choice.function.name)
    elif choice is not None:
        request.tool_choice = _TOOL_CHOICES[choice]
    for name in ("parallel_tool_calls", "add_generation_prompt", "continue_final_message"):
        _set(request, name, getattr(body, name))
    _fill_template(request, body)
    _fill(request, body)
    if body.logprobs:
        request.sampling.logprobs = body.top_logprobs or 0
    return request


def generate_requests(body: CompletionBody) -> list[pb.GenerateRequest]:
    """The calls for a completion body, a call for each prompt.

    Raises:
        InvalidRequest: a message cannot hold a value, or there is no prompt.
    """
    prompts: Sequence[str | list[int]]
    given = body.prompt
    if isinstance(given, str):
        prompts = [given]
    elif given and isinstance(given[0], int):
        prompts = [given]
    else:
        prompts = given  # type: ignore[assignment]
    if not prompts:
        raise InvalidRequest("prompt", "`prompt` is empty; give at least one")
    requests = []
    for prompt in prompts:
        request = pb.GenerateRequest(model=_text("model", body.model))
        if isinstance(prompt, str):
            request.text = _text("prompt", prompt)
        else:
            request.token_ids.SetInParent()
            _extend(request.token_ids, "ids", prompt, "prompt")
        _set(request, "add_special_tokens", body.add_special_tokens)
        _fill(request, body)
        _set(request.sampling, "logprobs", body.logprobs)
        if body.echo:
            request.options.include_prompt_token_ids = True
            _set(request.sampling, "prompt_logprobs", body.logprobs)
        requests.append(request)
    return requests


def tokenize_request(body: TokenizeBody) -> pb.TokenizeRequest:
    """The call for a tokenize body.

    Raises:
        InvalidRequest: a text is not Unicode, or a content part is not supported.
    """
    request = pb.TokenizeRequest(model=_text("model", body.model))
    if body.messages is None:
        request.text = _text("prompt", body.prompt or "")
        _set(request, "add_special_tokens", body.add_special_tokens)
        return request
    conversation = request.conversation
    conversation.messages.extend(_messages(body.messages))
    conversation.tools.extend(_tools(body.own_tools))
    for name in ("add_generation_prompt", "continue_final_message"):
        _set(conversation, name, getattr(body, name))
    _fill_template(conversation, body)
    return request


def conversation_request(body: ChatBody) -> pb.TokenizeRequest:
    """The call that counts the prompt tokens of a chat body.

    Raises:
        InvalidRequest: as `chat_request`.
    """
    chat = chat_request(body)
    request = pb.TokenizeRequest(model=chat.model)
    conversation = request.conversation
    conversation.messages.extend(chat.messages)
    if chat.tool_choice != pb.TOOL_CHOICE_NONE:
        conversation.tools.extend(chat.tools)
    for name in ("add_generation_prompt", "continue_final_message"):
        if chat.HasField(name):
            setattr(conversation, name, getattr(chat, name))
    return request


def detokenize_request(model: str, tokens: list[int], skip_special: bool) -> pb.DetokenizeRequest:
    """The call for a detokenize body.

    Raises:
        InvalidRequest: the message cannot hold an id.
    """
    request = pb.DetokenizeRequest(model=_text("model", model), skip_special_tokens=skip_special)
    _extend(request, "token_ids", tokens, "tokens")
    return request


def _fill(request: pb.ChatRequest | pb.GenerateRequest, body: Sampling) -> None:
    request.options.include_token_ids = body.return_token_ids
    if body.return_token_ids:
        request.options.include_prompt_token_ids = True
    for name in _SAMPLING:
        value = getattr(body, name)
        _set(request.sampling, name, min(value, _MAX_INT32) if name == "top_k" and value else value)
    most = body.max_tokens
    if most is None and isinstance(body, ChatBody):
        most = body.max_completion_tokens
    if isinstance(body, CompletionBody) and body.prompt_only:
        most = 1  # an engine computes at least one token; the answer leaves it out
    _set(request.sampling, "max_tokens", None if most is None else min(most, _MAX_INT32))
    if body.seed is not None:
        request.sampling.seed = body.seed if body.seed == -1 else body.seed % 2**63
    for name in _OPTIONS:
        _set(request.options, name, getattr(body, name))
    if body.speculation is not None:
        request.options.speculation = body.speculation.kind
    if body.prediction is not None:
        request.options.prediction = _text("prediction", body.prediction.text)
    if body.include_stop is None:
        _set(request.options, "include_stop", body.include_stop_str_in_output)
    if body.allowed_token_ids is not None:
        request.sampling.allowed_token_ids.SetInParent()
        allowed = request.sampling.allowed_token_ids
        _extend(allowed, "ids", body.allowed_token_ids, "allowed_token_ids")
    for token, value in (body.logit_bias or {}).items():
        try:
            request.sampling.logit_bias[int(token)] = value
        except ValueError as error:
            raise InvalidRequest("logit_bias", f"`logit_bias`: {error}") from None
    _fill_form(request.sampling, body)
    cache_hints.fill(request.options.cache, body)
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    request.options.stop.extend(_text("stop", text) for text in stop if text)


def _fill_template(
    request: pb.ChatRequest | pb.Conversation, body: ChatBody | TokenizeBody
) -> None:
    request.documents.extend(
        pb.Document(
            title=_text(f"documents[{number}].title", document.title),
            text=_text(f"documents[{number}].text", document.text),
        )
        for number, document in enumerate(body.documents or ())
    )
    if body.chat_template_kwargs is not None:
        field = "chat_template_kwargs"
        request.template_variables = _json(field, body.chat_template_kwargs)


def _fill_form(sampling: pb.SamplingParams, body: Sampling) -> None:
    """Set the form of the output from the single field that names it."""
    forms: dict[str, Any] = {
        name: given
        for name in ("guided_json", "guided_regex", "guided_choice", "guided_grammar")
        if (given := getattr(body, name)) is not None
    }
    if body.structured_outputs is not None:
        (name,) = body.structured_outputs.model_fields_set
        key = f"structured_outputs.{name.removesuffix('_')}"
        forms[key] = getattr(body.structured_outputs, name)
    wanted = body.response_format
    if wanted is not None and wanted.type != "text":
        schema = wanted.json_schema
        key = f"response_format.{wanted.type}"
        forms[key] = True if schema is None else schema.json_schema
    if not forms:
        return
    if len(forms) > 1:
        first, second, *_ = forms
        raise InvalidRequest(second, f"`{first}` and `{second}` exclude each other; give one")
    ((name, form),) = forms.items()
    kind = name.rpartition(".")[2].removeprefix("guided_")
    structured = sampling.structured
    if kind in ("json", "json_schema"):
        structured.json_schema = form if isinstance(form, str) else _json(name, form)
    elif kind == "json_object":
        structured.json_object = True
    elif kind == "regex":
        structured.regex = _text(name, form)
    elif kind == "choice":
        structured.choice.SetInParent()
        structured.choice.texts.extend(_text(name, choice) for choice in form)
    else:
        structured.lark = _text(name, form)


def _json(field: str, value: Any) -> str:  # noqa: ANN401
    try:
        return json.dumps(value)
    except RecursionError:
        raise InvalidRequest(field, f"`{field}` is nested too deep; make it flatter") from None


def _set(message: Message, name: str, value: Any) -> None:  # noqa: ANN401
    if value is None:
        return
    if isinstance(value, list):
        _extend(message, name, value, name)
        return
    if isinstance(value, str):
        value = _text(name, value)
    try:
        setattr(message, name, value)
    except ValueError as error:
        raise InvalidRequest(name, f"`{name}`={value}: {error}") from None


def _extend(message: Message, name: str, values: list[int], field: str) -> None:
    try:
        getattr(message, name).extend(values)
    except ValueError as error:
        raise InvalidRequest(field, f"`{field}`: {error}") from None


def _text(field: str, text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidRequest(
            field,
            f"`{field}` holds half of a surrogate pair, which is no character; send valid Unicode",
        ) from None
    return text


def _messages(messages: Sequence[ChatMessage]) -> list[pb.Message]:
    return [message_of(f"messages[{number}]", message) for number, message in enumerate(messages)]


def message_of(where: str, message: ChatMessage) -> pb.Message:
    """A message of a conversation; `where` names it in errors."""
    content = message.content or message.refusal or ""
    calls = [(call.id, call.function) for call in message.tool_calls or ()]
    if message.function_call is not None and not calls:
        calls = [("", message.function_call)]
    # in the API's older form, the result of a call has only the function's name
    role = "tool" if message.role == "function" else message.role
    return pb.Message(
        role=_text(f"{where}.role", role),
        content=_text(f"{where}.content", content) if isinstance(content, str) else "",
        parts=() if isinstance(content, str) else _parts(where, content),
        name=_text(f"{where}.name", message.name or ""),
        tool_call_id=_text(f"{where}.tool_call_id", message.tool_call_id or ""),
        tool_calls=[
            _call(f"{where}.tool_calls[{number}]", call_id, function)
            for number, (call_id, function) in enumerate(calls)
        ],
    )


def _call(where: str, call_id: str, function: FunctionCall) -> pb.ToolCall:
    given, field = function.arguments, f"{where}.function.arguments"
    return pb.ToolCall(
        id=_text(f"{where}.id", call_id),
        name=_text(f"{where}.function.name", function.name),
        arguments=_text(field, given if isinstance(given, str) else _json(field, given)),
    )


def _parts(where: str, content: Sequence[ContentPart]) -> list[pb.ContentPart]:
    parts = []
    for number, part in enumerate(content):
        if part.type in THOUGHT_PARTS:
            continue
        field = f"{where}.content[{number}]"
        given = {name for name in ("text", "image_url") if getattr(part, name) is not None}
        if part.type not in ("text", "image_url") or given != {part.type} or part.model_extra:
            raise InvalidRequest(
                field,
                f'`{field}` of type "{part.type[:64]}" is not supported; give '
                '{"type": "text", "text": …} or {"type": "image_url", "image_url": {"url": …}}',
                "unsupported_parameter",
            )
        if part.image_url is not None:
            image = pb.Image(url=_text(f"{field}.image_url.url", part.image_url.url))
            parts.append(pb.ContentPart(image=image))
        else:
            parts.append(pb.ContentPart(text=_text(field, part.text or "")))
    return parts


def _allowed(tools: Sequence[Tool], choice: AllowedTools) -> list[Tool]:
    """The tools that a choice allows; the model does not see the others."""
    names = {tool.function.name for tool in choice.allowed_tools.tools}
    unknown = sorted(names - {tool.function.name for tool in tools})
    if unknown or not names:
        words = f"names {unknown[0][:128]!r}, which is not among `tools`" if unknown else "is empty"
        field = "tool_choice.allowed_tools.tools"
        raise InvalidRequest(field, f"`{field}` {words}")
    return [tool for tool in tools if tool.function.name in names]


def _tools(tools: Sequence[Tool]) -> list[pb.Tool]:
    return [
        pb.Tool(
            name=_text(f"tools[{number}].function.name", tool.function.name),
            description=_text(f"tools[{number}].function.description", tool.function.description),
            parameters=_schema(number, tool.function.parameters),
            strict=tool.function.strict,
        )
        for number, tool in enumerate(tools)
    ]


def _schema(number: int, parameters: Mapping[str, Any] | None) -> str:
    return "" if parameters is None else _json(f"tools[{number}].function.parameters", parameters)
