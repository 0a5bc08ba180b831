"""The scalar head of reward and value models: one linear layer without bias over the hidden states, in fp32."""

from __future__ import annotations

import torch

from megatron_xy import device, mcore


class ValueHead(torch.nn.Module):
    """Stands where a language model has its output layer: hidden states -> one number a token.

    The same on all tensor parallel ranks. Under sequence parallelism each rank computes the values of its part of the
    tokens, and the values are joined: [tokens, 1, 1] on every rank.
    """

    def __init__(self, config: mcore.TransformerConfig, *, tp_group: torch.distributed.ProcessGroup) -> None:
        super().__init__()
        self.tp_group = tp_group
        self.sequence_parallel = config.sequence_parallel
        self.weight = torch.nn.Parameter(
            torch.zeros(1, config.hidden_size, dtype=torch.float32, device=device.current())
        )
        # megatron-core then adds up the gradient that each tensor parallel rank has from its part of the tokens.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(
        self, hidden_states: torch.Tensor, weight: None = None, runtime_gather_output: None = None
    ) -> tuple[torch.Tensor, None]:
        """As megatron-core calls an output layer."""
        values = torch.nn.functional.linear(hidden_states.float(), self.weight)
        if self.sequence_parallel:
            # All ranks go on with the same values, so that each takes its own part of their gradient.
            values = mcore.gather_from_sequence_parallel_region(
                values, tensor_parallel_output_grad=False, group=self.tp_group
            )
        return values, None


def values_of(output: torch.Tensor) -> torch.Tensor:
    """The value at every token, fp32 [tokens], of what a model with this head gives: [1, tokens, 1]."""
    return output[0, :, 0]
