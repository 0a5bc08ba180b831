"""Attention over packed documents: each document of a micro-batch attends within itself, causally, after RoPE.

Stands in megatron-core's layer spec as `core_attention`. How the scores are computed is the backend's; that queries
and keys are rotated here, and not by megatron-core, lets all layers of a micro-batch share one cos and sin, and parts
and rotates what their layer has projected in one pass over it.
"""

from __future__ import annotations

from typing import Any

import torch

from megatron_xy import mcore
from megatron_xy.model.attention_backends import Attend
from megatron_xy.model.kernels import rotated_heads
from megatron_xy.model.rotary import PackedDocuments, RotaryAngles
from megatron_xy.runtime.liveness import went_forward


class SelfAttention(mcore.SelfAttention):  # type: ignore[misc]
    """megatron-core's, with a projection that goes whole to PackedAttention."""

    def get_query_key_value_tensors(
        self, hidden_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Query, key and value in one, [tokens, 1, (heads + 2 groups)/tp x head_dim], in the place of all three."""
        projected, _ = self.linear_qkv(hidden_states)
        return projected, projected, projected


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
        self.groups = config.num_query_groups // pg_collection.tp.size()
        self.head_dim = config.kv_channels
        self.tp_group = pg_collection.tp  # megatron-core's sharded_state_dict reads it
        self._angles: RotaryAngles | None = None
        self._attend: Attend | None = None

    def connect(self, *, angles: RotaryAngles, attend: Attend) -> None:
        """Gives the layer what megatron-core's constructors do not pass on: the model's angles and the backend."""
        self._angles, self._attend = angles, attend

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

        query, which key and value are, too: what SelfAttention has projected -> [tokens, 1, hidden/tp].
        """
        assert packed_seq_params is not None, "every forward step packs its documents"
        assert self._angles is not None and self._attend is not None, "connect() follows the model's construction"
        went_forward()  # for the watchdog: a step may be long, a layer is not
        cos, sin = self._angles.of(packed_seq_params)
        projected = query.view(query.size(0), self.groups, -1, self.head_dim)
        output = self._attend(*rotated_heads(projected, cos, sin), packed_seq_params, self.softmax_scale)
        if output.requires_grad:
            output.register_hook(lambda grad: went_forward())  # type: ignore[no-untyped-call]
        return output.reshape(output.size(0), 1, -1)
