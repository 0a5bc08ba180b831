"""Attention over packed documents with nothing but torch: its scaled dot product attention, and its flash kernel.

Arguments and results as in attention_backends.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect

import torch
import torch.nn.functional as F

from megatron_xy import device
from megatron_xy.model.rotary import PackedDocuments

HALF_PRECISION = (torch.bfloat16, torch.float16)


def attend_by_sdpa(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packed: PackedDocuments, scale: float | None
) -> torch.Tensor:
    """torch's own attention on each document in turn; on any device, in any dtype."""
    # [tokens, heads, head_dim] -> [1, heads, tokens, head_dim]
    query, key, value = (tensor.transpose(0, 1)[None] for tensor in (query, key, value))
    grouped = query.size(1) != key.size(1)
    if grouped and not device.is_cpu() and query.dtype not in HALF_PRECISION:
        # On a GPU no fused kernel knows groups in fp32; without one the scores of S x S would be kept.
        key, value = (tensor.repeat_interleave(query.size(1) // key.size(1), dim=1) for tensor in (key, value))
        grouped = False
    lengths = list(packed.segment_lengths)
    parts = zip(*(torch.split(tensor, lengths, dim=2) for tensor in (query, key, value)), strict=True)
    outputs = [
        F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped) for q, k, v in parts
    ]
    output = torch.cat(outputs, dim=2) if len(outputs) > 1 else outputs[0]
    return output[0].transpose(0, 1)


def attend_by_torch_varlen(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packed: PackedDocuments, scale: float | None
) -> torch.Tensor:
    """The flash kernel inside torch: by its public name from torch 2.11 on, by the operator behind it before."""
    borders, longest = packed.cu_seqlens_q, packed.max_seqlen_q
    options = _torch_varlen_options()
    if options is not None:
        # Earlier versions hand groups to the kernel, which knows them, without being told.
        extra = {"enable_gqa": True} if query.size(1) != key.size(1) and "enable_gqa" in options else {}
        public = importlib.import_module("torch.nn.attention.varlen").varlen_attn
        output: torch.Tensor = public(
            query, key, value, borders, borders, longest, longest, window_size=(-1, 0), scale=scale, **extra
        )
        return output
    output = torch.ops.aten._flash_attention_forward(
        query, key, value, borders, borders, longest, longest, 0.0, True, False, scale=scale
    )[0]
    return output


@functools.cache
def _torch_varlen_options() -> frozenset[str] | None:
    """The keywords of torch's varlen_attn; None where it is not there or not yet as it is from 2.11 on."""
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return None
    names = frozenset(inspect.signature(importlib.import_module("torch.nn.attention.varlen").varlen_attn).parameters)
    return names if {"window_size", "scale"} <= names else None
