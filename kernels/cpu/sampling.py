"""Draws of tokens and log-probabilities in C++; biases and penalties are the reference's.

Knows logits and parameters of rows; knows nothing of models.
"""

from __future__ import annotations

import ctypes
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from arriero.kernels.cpu.structs import draws_struct, float_rows
from arriero.kernels.reference import sampling as reference
from arriero.kernels.sampling_rows import Sampled, SamplingRows

if TYPE_CHECKING:
    from arriero.kernels.cpu.backend import CpuOps


def sample(ops: CpuOps, logits_RV: Tensor, rows: SamplingRows) -> Sampled:
    """See `Ops.sample`."""
    reference.check_vocabulary(logits_RV)
    raw_RV = float_rows("sample", logits_RV, logits_RV.shape[1])
    # A mask after the penalties bans the same tokens: a banned logit stays -inf under a penalty.
    adjusted_RV = reference.adjusted(raw_RV, replace(rows, allowed_RW=None))
    x_RV = float_rows("sample", adjusted_RV, raw_RV.shape[1])
    tokens_R = torch.empty(x_RV.shape[0], dtype=torch.int32)
    logits_arguments = (x_RV.data_ptr(), x_RV.stride(0), *x_RV.shape)
    if rows.all_greedy and rows.allowed_RW is None:
        ops.call("argmax", *logits_arguments, tokens_R.data_ptr())
    else:
        draws, _references = draws_struct(rows, *x_RV.shape)
        ops.call("sample", *logits_arguments, ctypes.addressof(draws), tokens_R.data_ptr())
    if rows.num_logprobs < 0:
        return Sampled(tokens_R=tokens_R)
    log_total_R = torch.empty(raw_RV.shape[0], dtype=torch.float64)
    num_top = min(rows.num_logprobs, raw_RV.shape[1])
    top_RN = torch.empty(raw_RV.shape[0], num_top, dtype=torch.int32)
    ops.call(
        "log_totals",
        raw_RV.data_ptr(),
        raw_RV.stride(0),
        *raw_RV.shape,
        log_total_R.data_ptr(),
        num_top,
        top_RN.data_ptr(),
    )
    return reference.with_logprobs(raw_RV, tokens_R.long(), num_top, log_total_R, top_RN.long())
