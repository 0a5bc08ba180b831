"""Packed documents through torch's cuDNN attention, which on Hopper is nearly twice as fast as its flash kernel.

cuDNN builds a kernel for every shape that it meets, in a tenth of a second, and what torch 2.11 has for packed
documents gives wrong gradients. So long documents are padded at their ends to one of few lengths, where causal
attention never looks, and those of one such length go as a batch. Where a batch is too small to fill the GPU, its
documents go to the flash kernel, all together.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_xy.model.rotary import PackedDocuments
from megatron_xy.model.torch_attention import attend_by_torch_varlen

SHORT = 1024  # tokens; a shorter document is never worth a batch
LEAST_WORK = 1 << 17  # heads x tokens of a batch; on an H200 smaller ones, padded, take the flash kernel's time
LENGTHS_PER_DOUBLING = 8  # padded lengths between a power of two and the next: at most an eighth is padding


class Batches(NamedTuple):
    """The documents of a row by what attends to them; each is told by its place in the row."""

    long: tuple[tuple[int, tuple[int, ...]], ...]  # (padded length, documents that are padded to it)
    short: tuple[int, ...]  # the others
    packed_short: PackedDocuments | None  # their borders, put together, where there are long ones


def attend_by_torch_cudnn(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    packed: PackedDocuments,
    scale: float | None,
    *,
    least_work: int = LEAST_WORK,
) -> torch.Tensor:
    """Shapes and result as in attention_backends."""
    lengths = packed.segment_lengths
    batches = _batches(lengths, least_work // query.size(1))
    if not batches.long:
        return attend_by_torch_varlen(query, key, value, packed, scale)
    if len(set(lengths)) == 1 and batches.long[0][0] == lengths[0]:
        query, key, value = (tensor.view(len(lengths), lengths[0], *tensor.shape[1:]) for tensor in (query, key, value))
        return _attend_to_batch(query, key, value, scale).flatten(0, 1)  # as it lies: nothing is copied
    queries, keys, values = (torch.split(tensor, list(lengths)) for tensor in (query, key, value))
    outputs: dict[int, torch.Tensor] = {}
    for length, places in batches.long:
        query, key, value = (
            torch.stack([_padded(tensors[place], length) for place in places]) for tensors in (queries, keys, values)
        )
        for place, output in zip(places, _attend_to_batch(query, key, value, scale), strict=True):
            outputs[place] = output[: lengths[place]]
    if batches.packed_short is not None:
        query, key, value = (
            torch.cat([tensors[place] for place in batches.short]) for tensors in (queries, keys, values)
        )
        together = attend_by_torch_varlen(query, key, value, batches.packed_short, scale)
        borders = list(batches.packed_short.segment_lengths)
        outputs |= zip(batches.short, torch.split(together, borders), strict=True)
    return torch.cat([outputs[place] for place in range(len(lengths))])


def padded_length(length: int) -> int:
    """The least length that kernels are built for and that is no smaller."""
    step = max(1, (1 << (length - 1).bit_length()) // 2 // LENGTHS_PER_DOUBLING)
    return -(-length // step) * step


@functools.lru_cache(maxsize=256)  # as many micro-batches as may wait for their backward pass
def _batches(lengths: tuple[int, ...], least_tokens: int) -> Batches:
    by_length: defaultdict[int, list[int]] = defaultdict(list)
    for place, length in enumerate(lengths):
        if length >= SHORT:
            by_length[padded_length(length)].append(place)
    long = {length: tuple(places) for length, places in by_length.items() if length * len(places) >= least_tokens}
    batched = {place for places in long.values() for place in places}
    short = tuple(place for place in range(len(lengths)) if place not in batched)
    packed = None
    if long and short:
        with torch.inference_mode(False):  # while answers are drawn, too: what is kept may be of use to training
            packed = PackedDocuments.of([lengths[place] for place in short])
    return Batches(tuple(long.items()), short, packed)


def _padded(document: torch.Tensor, length: int) -> torch.Tensor:
    """[tokens, heads, head_dim] -> [length, heads, head_dim]."""
    missing = length - document.size(0)
    return F.pad(document, (0, 0, 0, 0, 0, missing)) if missing else document


def _attend_to_batch(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None) -> torch.Tensor:
    """[documents, tokens, heads, head_dim], keys and values with their groups -> the queries' shape."""
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        output = F.scaled_dot_product_attention(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            is_causal=True,
            scale=scale,
            enable_gqa=query.size(2) != key.size(2),
        )
    return output.transpose(1, 2)
