"""One pass of generation through this rank's part of a model, with the weights of megatron-core's modules.

The layers' arithmetic is written out: a new token is so little work that what training's modules do around it (hooks,
gradients, sequence parallelism, a schedule) would cost more than the token. Sequence parallelism is a matter of where
activations are split, not of weights: a model trained with it generates without.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from numpy.typing import NDArray

from megatron_xy import device
from megatron_xy.model.attention_backends import Attend
from megatron_xy.model.build import named_parameters
from megatron_xy.model.cached_attention import KeyValueCache
from megatron_xy.model.kernels import rms_norm, swiglu
from megatron_xy.model.layer_spec import DTYPES, choose_layers
from megatron_xy.model.rotary import inverse_frequencies
from megatron_xy.model.sampling import Sampler, SamplingOptions
from megatron_xy.parallel import receive_onward, send_onward, sum_over
from megatron_xy.role import Role
from megatron_xy.runtime.liveness import went_forward
from megatron_xy.tensors.names import EMBEDDING, OUTPUT_LAYER

Read = Callable[[int, torch.Tensor], torch.Tensor]
Sent = list[tuple[dist.Work, torch.Tensor]]  # tensors on their way to the next stage


class ChunkForward:
    """The forward pass of one of a role's chunks, as the weights stand when it is made (they are not copied)."""

    def __init__(self, role: Role, *, chunk: int) -> None:
        groups, module = role.groups, role.chunks[chunk]
        if role.parallel.overlap_param_gather:  # what the last update left to the next forward pass
            module.start_param_sync(force_sync=True)  # type: ignore[operator]
        self._weights: dict[str, torch.Tensor] = {}  # but for the layers'
        layers: dict[str, dict[str, torch.Tensor]] = {}
        for named in named_parameters(module, model=role.model, groups=groups):
            weight = named.parameter.detach()
            if match := re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", named.name):
                layers.setdefault(match[1], {})[match[2]] = weight
            else:
                self._weights[named.name] = weight
        self._layers = list(layers.values())
        self.is_first = groups.is_first_stage and chunk == 0
        self.is_last = groups.is_last_stage and chunk == len(role.chunks) - 1
        self._output_name = EMBEDDING if role.model.has_tied_output_layer else OUTPUT_LAYER
        self._epsilon = role.model.norm_epsilon
        self._tp: dist.ProcessGroup = groups.collection.tp
        self.attend: Attend = choose_layers(role.model).attention.attend
        assert role.model.num_attention_heads, "the shape is complete once a run starts"
        self.num_groups = (role.model.num_query_groups or role.model.num_attention_heads) // groups.tp_size
        self.head_dim = role.model.head_dim
        self.dtype = DTYPES[role.model.params_dtype]

    @property
    def num_layers(self) -> int:
        """Of this chunk."""
        return len(self._layers)

    @property
    def columns(self) -> int:
        """Of the padded vocabulary on this rank, on the last chunk."""
        return len(self._weights[self._output_name])

    def new_cache(self, num_rows: int) -> KeyValueCache:
        """An empty cache for these layers."""
        shape = (self.num_layers, num_rows, self.num_groups, 0, 2, self.head_dim)
        return KeyValueCache(torch.empty(shape, dtype=self.dtype, device=device.current()))

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
        for index, layer in enumerate(self._layers):
            normed = rms_norm(hidden, layer["input_layernorm.weight"], eps=self._epsilon)
            bias = layer.get("self_attention.linear_qkv.bias")  # where the model has one
            qkv = F.linear(normed, layer["self_attention.linear_qkv.weight"], bias)
            attended = F.linear(read(index, qkv), layer["self_attention.linear_proj.weight"])
            hidden = hidden + sum_over(attended, self._tp)
            normed = rms_norm(hidden, layer["pre_mlp_layernorm.weight"], eps=self._epsilon)
            activated = swiglu(F.linear(normed, layer["mlp.linear_fc1.weight"]))
            hidden = hidden + sum_over(F.linear(activated, layer["mlp.linear_fc2.weight"]), self._tp)
        if not self.is_last:
            return hidden
        if outputs is not None:
            hidden = hidden[outputs]
        normed = rms_norm(hidden, self._weights["decoder.final_layernorm.weight"], eps=self._epsilon)
        return F.linear(normed, self._weights[self._output_name])

    def _embedded(self, tokens: torch.Tensor) -> torch.Tensor:
        embedding = self._weights[EMBEDDING]
        if self._tp.size() == 1:
            return F.embedding(tokens, embedding)
        places = tokens - self._tp.rank() * len(embedding)
        is_mine = (places >= 0) & (places < len(embedding))
        rows = F.embedding(places.where(is_mine, 0), embedding)
        return sum_over(rows * is_mine[:, None], self._tp)


class ReplicaForward:
    """This rank's chunks of a model, and what travels between the pipeline stages of its replica."""

    def __init__(self, role: Role) -> None:
        self._groups, self._model = role.groups, role.model
        self.chunks = [ChunkForward(role, chunk=chunk) for chunk in range(len(role.chunks))]
        self.frequencies = inverse_frequencies(role.model).to(device.current())

    def sampler(self, options: SamplingOptions) -> Sampler | None:
        """Over this rank's part of the vocabulary; None but on the last stage."""
        last = self.chunks[-1]
        if not last.is_last:
            return None
        assert self._model.vocab_size, "the shape is complete once a run starts"
        tp_group = self._groups.collection.tp
        return Sampler(options, columns=last.columns, vocab_size=self._model.vocab_size, tp_group=tp_group)

    def forward(
        self, tokens: torch.Tensor, *, chunk: int, read: Read, outputs: torch.Tensor | None, sent: Sent
    ) -> torch.Tensor | None:
        """One chunk's part of a pass, from the stage before to the next one; on the last chunk the logits, else None.

        Arguments as of ChunkForward; sent: takes what is on its way to the next stage.
        """
        part, hidden = self.chunks[chunk], None
        if not part.is_first:
            assert self._model.hidden_size, "the shape is complete once a run starts"
            hidden = torch.empty(len(tokens), self._model.hidden_size, dtype=part.dtype, device=device.current())
            receive_onward(hidden, self._groups)
        output = part(tokens, hidden, read=read, outputs=outputs)
        went_forward()
        if part.is_last:
            return output
        sent.append((send_onward(output, self._groups), output))
        return None


def wait_until_sent(sent: Sent) -> None:
    """Lets go of what was on its way to the next stage."""
    for work, _ in sent:
        work.wait()
    sent.clear()


def on_device(values: Sequence[int] | NDArray[np.int64]) -> torch.Tensor:
    """Token ids or places, int64, on this process's device."""
    return device.moved_here(np.asarray(values, dtype=np.int64))
