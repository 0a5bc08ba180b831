"""RMSNorm for megatron-core's layer specs, also under sequence parallelism, which its own local spec's norm refuses."""

from __future__ import annotations

from typing import Any

import torch

from megatron_xy import device, mcore
from megatron_xy.model.kernels import rms_norm


class RMSNorm(torch.nn.RMSNorm):
    """RMSNorm that keeps its input alone, and whose weight says how its gradient is reduced.

    Under sequence parallelism each tensor parallel rank norms its own tokens: the weight carries `sequence_parallel`,
    and megatron-core's finalize_model_grads sums its gradient over the tensor parallel group.
    """

    def __init__(self, config: mcore.TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=device.current())
        self._epsilon = eps
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """[..., hidden] -> the same shape."""
        return rms_norm(values, self.weight, eps=self._epsilon)
