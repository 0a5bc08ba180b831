"""Attention of generation: keys and values of all earlier tokens are kept, and each pass computes the new ones alone.

A pass holds one new token for each sequence that goes on, then whole prompts of sequences that begin, one after the
other without padding. The former attend to their cache, the latter, among themselves, by the backend of training.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from megatron_xy.model.attention_backends import Attend
from megatron_xy.model.rotary import PackedDocuments

LENGTH_STEP = 64  # tokens, by which a cache grows at the least


@dataclass(frozen=True)
class Pass:
    """One forward pass over a group of sequences, as every rank of a replica sees it.

    tokens, positions, rows [tokens] int64: ids, places in their sequences, and rows of the cache. The first
    `num_going_on` tokens are one each of the rows 0 to num_going_on - 1, `longest` long with this token at most, and
    `mask` bool [num_going_on, 1, 1, longest] says what each attends to (None: all of it). `prompts`: the borders of the
    rest. copies: (places of tokens, rows): cached also for other answers to the same prompts. outputs: places of the
    tokens whose successors are wanted, None: of all.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    rows: torch.Tensor
    num_going_on: int
    longest: int
    mask: torch.Tensor | None
    prompts: PackedDocuments | None
    copies: tuple[torch.Tensor, torch.Tensor] | None
    outputs: torch.Tensor | None


class KeyValueCache:
    """Keys, rotated, and values of this rank's layers and heads, for a fixed number of rows of growing length."""

    def __init__(self, entries: torch.Tensor) -> None:
        """entries [layers, rows, key and value heads of this rank, length 0, key and value, head_dim]."""
        self._entries = entries  # a key and its value as one: written and moved together

    def reserve(self, length: int) -> None:
        """Makes room for `length` tokens a row; grows by half at the least, so that growing costs little."""
        layers, rows, groups, before, _, head_dim = self._entries.shape
        if length <= before:
            return
        after = max(length, before + before // 2)
        after += -after % LENGTH_STEP
        grown = self._entries.new_zeros(layers, rows, groups, after, 2, head_dim)
        grown[:, :, :, :before] = self._entries
        self._entries = grown

    def move(self, *, source: int, target: int, length: int) -> None:
        """Row `target` becomes the first `length` tokens of row `source`."""
        self._entries[:, target, :, :length] = self._entries[:, source, :, :length]

    def layer(self, index: int) -> torch.Tensor:
        """[rows, groups, length, 2, head_dim] of one layer."""
        return self._entries[index]


def attend_with_cache(
    projected: torch.Tensor,
    cached: torch.Tensor,
    now: Pass,
    *,
    cos: torch.Tensor,
    sin: torch.Tensor,
    attend: Attend,
) -> torch.Tensor:
    """What a layer's queries read of the sequences so far; writes the pass's keys and values into `cached`.

    projected [tokens, groups x (queries a group + 2) x head_dim]: megatron-core's layout, of this rank's groups;
    cached: of the layer; cos, sin [tokens, 1, 1, head_dim] of `rotation`. Returns [tokens, heads x head_dim].
    """
    groups, head_dim = cached.size(1), cached.size(-1)
    heads = projected.view(len(projected), groups, -1, head_dim)
    turned = turned_by(heads[:, :, :-1], cos, sin)
    queries, keys_values = turned[:, :, :-1], torch.stack([turned[:, :, -1], heads[:, :, -1]], dim=2)
    cached[now.rows, :, now.positions] = keys_values
    if now.copies is not None:
        places, rows = now.copies
        cached[rows, :, now.positions[places]] = keys_values[places]
    going_on = now.num_going_on
    parts = []
    if going_on:
        # The queries of a group stand where a longer sequence's would: they share keys, and none is repeated for them.
        known = cached[:going_on, :, : now.longest]
        read = F.scaled_dot_product_attention(
            queries[:going_on], known[:, :, :, 0], known[:, :, :, 1], attn_mask=now.mask
        )
        parts.append(read.reshape(going_on, -1))
    if now.prompts is not None:
        query = queries[going_on:].flatten(1, 2)
        keys, values = keys_values[going_on:].unbind(dim=2)
        parts.append(attend(query, keys, values, now.prompts, None).flatten(1))
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def rotation(positions: torch.Tensor, inverse_frequencies: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(cos, sin) of both halves of a head, the sines of the first one negative: [tokens, 1, 1, head_dim] fp32 each."""
    angles = torch.outer(positions.float(), inverse_frequencies)[:, None, None, :]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def turned_by(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RoPE in the halves convention, as in training; a third of its calls, since no gradient is wanted."""
    first, second = heads.chunk(2, dim=-1)
    return torch.addcmul(heads * cos, torch.cat([second, first], dim=-1), sin).to(heads.dtype)
