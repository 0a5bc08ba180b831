"""One pass of generation through this rank's part of a model, with the weights of megatron-core's modules.

The layers' arithmetic is written out: a new token is so little work that what training's modules do around it (hooks,
gradients, sequence parallelism, a schedule) would cost more than the token. Sequence parallelism is a matter of where
activations are split, not of weights: a model trained with it generates without.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F

from megatron_xy import device
from megatron_xy.model.attention_backends import Attend
from megatron_xy.model.build import named_parameters
from megatron_xy.model.cached_attention import KeyValueCache
from megatron_xy.model.kernels import rms_norm, swiglu
from megatron_xy.model.layer_spec import choose_layers
from megatron_xy.parallel import sum_over
from megatron_xy.role import Role
from megatron_xy.tensors.names import EMBEDDING, OUTPUT_LAYER

FINAL_NORM = "decoder.final_layernorm.weight"
Read = Callable[[int, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class LayerWeights:
    """This rank's weights of one layer."""

    input_norm: torch.Tensor
    qkv: torch.Tensor
    proj: torch.Tensor
    mlp_norm: torch.Tensor
    fc1: torch.Tensor
    fc2: torch.Tensor
    qkv_bias: torch.Tensor | None  # where the model has one


_LAYER_NAMES = {
    "input_norm": "input_layernorm.weight",
    "qkv": "self_attention.linear_qkv.weight",
    "proj": "self_attention.linear_proj.weight",
    "mlp_norm": "pre_mlp_layernorm.weight",
    "fc1": "mlp.linear_fc1.weight",
    "fc2": "mlp.linear_fc2.weight",
}


class ChunkForward:
    """The forward pass of one of a role's chunks, as the weights stand when it is made (they are not copied)."""

    def __init__(self, role: Role, *, chunk: int) -> None:
        groups, number_of_chunks = role.groups, len(role.chunks)
        module = role.chunks[chunk]
        if role.parallel.overlap_param_gather:  # what the last update left to the next forward pass
            module.start_param_sync(force_sync=True)  # type: ignore[operator]
        found = {
            named.name: named.parameter.detach() for named in named_parameters(module, model=role.model, groups=groups)
        }
        self.is_first = groups.is_first_stage and chunk == 0
        self.is_last = groups.is_last_stage and chunk == number_of_chunks - 1
        self._embedding = found.get(EMBEDDING)
        self._output = found.get(EMBEDDING if role.model.has_tied_output_layer else OUTPUT_LAYER)
        self._final_norm = found.get(FINAL_NORM)
        numbers = sorted({int(name.split(".")[2]) for name in found if name.startswith("decoder.layers.")})
        self._layers = [
            LayerWeights(
                **{field: found[f"decoder.layers.{number}.{name}"] for field, name in _LAYER_NAMES.items()},
                qkv_bias=found.get(f"decoder.layers.{number}.self_attention.linear_qkv.bias"),
            )
            for number in numbers
        ]
        self._epsilon = role.model.norm_epsilon
        self._tp: dist.ProcessGroup = groups.collection.tp
        self.attend: Attend = choose_layers(role.model).attention.attend
        assert role.model.num_attention_heads, "the shape is complete once a run starts"
        self.num_groups = (role.model.num_query_groups or role.model.num_attention_heads) // groups.tp_size
        self.head_dim = role.model.head_dim

    @property
    def num_layers(self) -> int:
        """Of this chunk."""
        return len(self._layers)

    @property
    def columns(self) -> int:
        """Of the padded vocabulary on this rank, on the last chunk."""
        assert self._output is not None, "only the last chunk has logits"
        return len(self._output)

    def new_cache(self, num_rows: int, *, dtype: torch.dtype) -> KeyValueCache:
        """An empty cache for these layers."""
        return KeyValueCache(
            num_layers=self.num_layers,
            num_rows=num_rows,
            num_groups=self.num_groups,
            head_dim=self.head_dim,
            dtype=dtype,
            device=device.current(),
        )

    def __call__(
        self,
        tokens: torch.Tensor,
        hidden: torch.Tensor | None,
        *,
        read: Read,
        outputs: torch.Tensor | None,
    ) -> torch.Tensor:
        """Hidden states [tokens, hidden] of a pass over `tokens` int64 [tokens], from those of the chunk before (None
        on the first one); on the last chunk the logits [outputs, padded vocabulary / tp].

        read: of a layer's number on this chunk and its projections [tokens, groups x (queries a group + 2) x head_dim]
        what its queries read, [tokens, heads x head_dim]. outputs: places of the tokens whose logits are wanted, None:
        of all.
        """
        if hidden is None:
            hidden = self._embedded(tokens)
        for index, weights in enumerate(self._layers):
            normed = rms_norm(hidden, weights.input_norm, eps=self._epsilon)
            qkv = F.linear(normed, weights.qkv, weights.qkv_bias)
            hidden = hidden + sum_over(F.linear(read(index, qkv), weights.proj), self._tp)
            normed = rms_norm(hidden, weights.mlp_norm, eps=self._epsilon)
            hidden = hidden + sum_over(F.linear(swiglu(F.linear(normed, weights.fc1)), weights.fc2), self._tp)
        if not self.is_last:
            return hidden
        assert self._final_norm is not None and self._output is not None, "the last chunk has a head"
        if outputs is not None:
            hidden = hidden[outputs]
        return F.linear(rms_norm(hidden, self._final_norm, eps=self._epsilon), self._output)

    def _embedded(self, tokens: torch.Tensor) -> torch.Tensor:
        assert self._embedding is not None, "the first chunk has the embedding"
        if self._tp.size() == 1:
            return F.embedding(tokens, self._embedding)
        places = tokens - self._tp.rank() * len(self._embedding)
        is_mine = (places >= 0) & (places < len(self._embedding))
        rows = F.embedding(places.where(is_mine, 0), self._embedding)
        return sum_over(rows * is_mine[:, None], self._tp)
