"""Attention over packed documents: each segment of a micro-batch attends within itself, causally.

Stands in megatron-core's layer spec as `core_attention`. On a CPU, torch's scaled dot product attention runs segment by
segment, so that no S x S mask is ever made.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from megatron_xy import mcore
from megatron_xy.model.rotary import PackedDocuments


class PackedAttention(mcore.MegatronModule):  # type: ignore[misc]
    """Causal grouped-query attention of this tensor parallel rank's heads, cut at the borders of `PackedDocuments`."""

    def __init__(
        self,
        config: mcore.TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: mcore.ProcessGroupCollection | None = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        assert pg_collection is not None, "groups are parameters here, never globals"
        self.softmax_scale = softmax_scale
        self.tp_group = pg_collection.tp  # megatron-core's sharded_state_dict reads it

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedDocuments | None = None,
        **_: Any,
    ) -> torch.Tensor:
        """Attends within each document.

        query [tokens, 1, heads/tp, head_dim], key and value [tokens, 1, groups/tp, head_dim] -> [tokens, 1, hidden/tp].
        """
        assert packed_seq_params is not None, "every forward step packs its documents"
        tokens = query.size(0)
        # [tokens, 1, heads, head_dim] -> [1, heads, tokens, head_dim]
        query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        repeats = query.size(1) // key.size(1)
        if repeats > 1:
            key, value = (tensor.repeat_interleave(repeats, dim=1) for tensor in (key, value))
        lengths = list(packed_seq_params.segment_lengths)
        parts = zip(*(torch.split(tensor, lengths, dim=2) for tensor in (query, key, value)), strict=True)
        outputs = [
            F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.softmax_scale) for q, k, v in parts
        ]
        output = torch.cat(outputs, dim=2) if len(outputs) > 1 else outputs[0]
        return output.permute(2, 0, 1, 3).reshape(tokens, 1, -1)
