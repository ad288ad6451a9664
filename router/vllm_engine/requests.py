"""Requests of VllmEngine as requests of `arriero.v1.Inference`. Sans-I/O.

A number that the message cannot leave out has its default at 0 (`top_p`, `n`,
`repetition_penalty`); the checkpoint's own defaults do not apply, since the caller knows and sends
them. Knows both messages; knows nothing of connections.
"""

from __future__ import annotations

import numpy as np
from smg_grpc_proto import vllm_engine_pb2 as vllm

from arriero.router.proto.arriero.v1 import inference_pb2 as pb
from arriero.router.text.constraints import MAX_FORM_BYTES
from arriero.shards.errors import InvalidRequest

_REFUSED = {
    "mm_inputs": "send the images to the HTTP or gRPC API of arriero",
    "extra_mm_inputs": "send the images to the HTTP or gRPC API of arriero",
    "media_refs": "send the images to the HTTP or gRPC API of arriero",
    "kv_transfer_params": "arriero moves KV blocks between its groups itself (`prefill_groups`)",
    "kv_transfer_params_json": "arriero moves KV blocks between its groups itself "
    "(`prefill_groups`)",
}


def inference_request(
    request: vllm.GenerateRequest, model: str, max_model_len: int
) -> pb.GenerateRequest:
    """The request for the inference path.

    Args:
        request: as the caller sent it.
        model: id of the model; "" for the only model.
        max_model_len: most tokens of prompt and output, for `truncate_prompt_tokens` of -1.

    Raises:
        InvalidRequest: the request has a field that arriero cannot honour, or no prompt.
    """
    sent = {field.name for field, _ in request.ListFields()}
    for name, remedy in _REFUSED.items():
        if name in sent:
            raise InvalidRequest(
                name,
                f"`{name}` is not supported; leave it out: {remedy}",
                code="unsupported_parameter",
            )
    params = request.sampling_params
    ours = pb.GenerateRequest(model=model, request_id=request.request_id)
    if request.WhichOneof("input") == "text":
        ours.text = request.text
    else:
        ours.token_ids.ids.extend(request.tokenized.input_ids)
    _truncate(ours, params, max_model_len)
    ours.sampling.CopyFrom(_sampling(params))
    stop = [text for text in params.stop if text]
    ours.options.stop.extend(stop)
    ours.options.include_text = bool(stop)
    ours.options.skip_special_tokens = params.skip_special_tokens
    return ours


def _truncate(ours: pb.GenerateRequest, params: vllm.SamplingParams, max_model_len: int) -> None:
    """Keep the last tokens of a prompt."""
    if not params.HasField("truncate_prompt_tokens"):
        return
    most = params.truncate_prompt_tokens
    if ours.WhichOneof("prompt") == "text" or most < -1 or most == 0:
        raise InvalidRequest(
            "truncate_prompt_tokens",
            f"`truncate_prompt_tokens`={most} must be -1 or at least 1, with a prompt of token ids",
        )
    most = max_model_len - 1 if most == -1 else most
    ids = ours.token_ids.ids[-most:]
    del ours.token_ids.ids[:]
    ours.token_ids.ids.extend(ids)


def _sampling(params: vllm.SamplingParams) -> pb.SamplingParams:
    # The order is the order of the fields in `vllm_engine.proto`.
    ours = pb.SamplingParams(
        temperature=_double(params.temperature) if params.HasField("temperature") else 1.0,
        top_p=_double(params.top_p) or 1.0,
        top_k=_int32(params.top_k),
        min_p=_double(params.min_p),
        frequency_penalty=_double(params.frequency_penalty),
        presence_penalty=_double(params.presence_penalty),
        repetition_penalty=_double(params.repetition_penalty) or 1.0,
        min_tokens=_int32(params.min_tokens),
        stop_token_ids=params.stop_token_ids,
        ignore_eos=params.ignore_eos,
        n=_int32(params.n) or 1,
        logit_bias=_logit_bias(params),
    )
    if params.HasField("max_tokens"):
        ours.max_tokens = _int32(params.max_tokens)
    for name in ("seed", "logprobs", "prompt_logprobs"):
        if params.HasField(name):
            setattr(ours, name, getattr(params, name))
    _constraint(ours.structured, params)
    return ours


def _constraint(form: pb.StructuredOutput, params: vllm.SamplingParams) -> None:
    kind = params.WhichOneof("constraint")
    if kind is None or (kind == "json_object" and not params.json_object):
        return
    if kind == "choice":
        form.choice.texts.extend(params.choice.choices)
    elif kind == "json_object":
        form.json_object = True
    elif kind in ("json_schema", "regex"):
        setattr(form, kind, getattr(params, kind))
    elif kind == "grammar":
        form.lark = _lark(params.grammar)
    else:
        raise InvalidRequest(
            kind,
            f"`{kind}` is not supported; use json_schema, regex, grammar (Lark), json_object or "
            "choice",
            code="unsupported_parameter",
        )


def _lark(grammar: str) -> str:
    """A grammar in Lark's syntax, from this syntax or from GBNF, which vLLM takes too."""
    if len(grammar.encode()) > MAX_FORM_BYTES:
        return grammar  # the inference path refuses the size
    from llguidance.gbnf_to_lark import GbnfToLarkError, any_to_lark

    try:
        lark: str = any_to_lark(grammar)
    except (GbnfToLarkError, RecursionError) as error:
        raise InvalidRequest(
            "grammar", f"`grammar` is neither Lark nor GBNF: {str(error)[:500]}"
        ) from None
    return lark


def _logit_bias(params: vllm.SamplingParams) -> dict[int, float]:
    negative = [token for token in params.logit_bias if token < 0]
    if negative:
        raise InvalidRequest(
            "logit_bias", f"`logit_bias[{negative[0]}]` is no token; give ids of at least 0"
        )
    return {token: _double(value) for token, value in params.logit_bias.items()}


def _double(value: float) -> float:
    """The number of fewest digits with this float32: 0.7 for 0.7's float32.

    So a caller who sends 0.7 samples as over HTTP, where numbers are doubles.
    """
    return float(str(np.float32(value)))


def _int32(value: int) -> int:
    """An unsigned number as a signed one; numbers above 2^31 - 1 count as this number."""
    return min(value, 2**31 - 1)
